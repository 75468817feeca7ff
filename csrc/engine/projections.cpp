#include "engine/projections.hpp"

namespace xc {

template <class T>
Projections<T>::Projections(const Plan& plan) : plan_(plan), first_(1, 0) {
  for (const Layer& layer : plan.layers)
    first_.push_back(first_.back() + static_cast<std::size_t>(filter_count(layer.spec)));
}

template <class T>
void Projections<T>::clear() {
  sums_.assign(first_.back(), {});
  coefficients_.resize(first_.back());
}

template <class T>
void Projections<T>::add(std::size_t layer, std::int64_t at, int sum, double number) {
  const std::int64_t length = filter_length(plan_.layers[layer].spec);
  if (length == 0) return;
  const auto filter = static_cast<std::size_t>((at - plan_.layers[layer].begin) / length);
  sums_[first_[layer] + filter][static_cast<std::size_t>(sum)] += number;
}

template <class T>
void Projections<T>::settle(Run<T>& run) {
  const std::size_t first = first_[run.layer], count = first_[run.layer + 1] - first;
  const auto coefficients = std::span(coefficients_).subspan(first, count);
  run.kernel->project(run.scalars, std::span(sums_).subspan(first, count), run.filter_length, coefficients);
  run.coefficients = count > 0 ? coefficients.data() : nullptr;
}

template class Projections<float>;
template class Projections<double>;

}  // namespace xc
