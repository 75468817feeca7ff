#include <algorithm>
#include <cmath>

#include "engine/step.hpp"

// The sums of a step: where passes leave them, cell by cell, and what they come to.

namespace xc {

void Sinks::finish() {
  mean.finish();
  together.finish();
  measured.finish();
  own.finish();
}

// Of segment k, `count` of the set's sums from number `first` on.
template <class T>
std::vector<double*> Stepper<T>::arrays(std::size_t k, int first, int count) const {
  std::vector<double*> arrays;
  for (int sum = first; sum < first + count; ++sum) arrays.push_back(arenas_.sums(k, sum, set_).data());
  return arrays;
}

// Those of the team's workers one by one.
template <class T>
std::vector<double*> Stepper<T>::arrays_of_workers(std::size_t k) const {
  std::vector<double*> arrays;
  for (const std::uint32_t worker : arenas_.workers().numbers)
    arrays.push_back(arenas_.sums(k, kStatistics + kMaxSums + static_cast<int>(worker), set_).data());
  return arrays;
}

// All workers' squares are added up in one sum.
template <class T>
Sinks Stepper<T>::sinks(std::size_t k, Sums sums) const {
  const Segment& segment = plan_.segments[k];
  const std::size_t workers = sums.workers ? arenas_.workers().sources.size() : 0;
  return {{plan_, segment, sums.mean ? arrays(k, 0, 1) : std::vector<double*>()},
          {plan_, segment, std::vector<double*>(workers, workers ? arrays(k, 1, 1).front() : nullptr)},
          {plan_, segment, sums.measure >= 0 ? arrays(k, kStatistics, kMaxSums) : std::vector<double*>()},
          {plan_, segment, sums.own_squares ? arrays_of_workers(k) : std::vector<double*>()}};
}

template <class T>
Kept<T> Stepper<T>::kept(Sinks& sinks) {
  return {.mean_squares = &sinks.mean,
          .worker_squares = &sinks.together,
          .measured = &sinks.measured,
          .own_squares = &sinks.own,
          .filters = &filters_};
}

template <class T>
void Stepper<T>::walk_segment(const Pass& pass, Sums sums, std::size_t k, const Shard<T>& shard) {
  Sinks sinks = this->sinks(k, sums);
  Kept<T> kept = this->kept(sinks);
  if (rails_) kept.received = total_of(k);
  walker_.walk(pass, arenas_.workers(), runs_, shard, kept);
  sinks.finish();
}

template <class T>
void Stepper<T>::walk_own(const Pass& pass, Sums sums) {
  std::size_t k = arenas_.first_worker();
  for (const Shard<T>& shard : arenas_.own_shards()) walk_segment(pass, sums, k++, shard);
}

template <class T>
void Stepper<T>::sum_all(Gradient gradient, Sums sums) {
  set_ = (set_ + 1) % kSumSets;
  if (rails_) return sum_over_rails(gradient, sums);
  walk_own(summing_pass(gradient, sums), sums);
}

template <class T>
double Stepper<T>::norm() const {
  double lanes[kNormLanes] = {};
  std::size_t cell = 0;
  for_each_cell(0, [&](std::size_t, std::int64_t, double square) { lanes[cell++ % kNormLanes] += square; });
  return std::sqrt(sum_of_lanes<kNormLanes>(lanes));
}

// Per group, the square of the mean gradient and the squares of all workers' gradients.
template <class T>
std::vector<double> Stepper<T>::statistics() const {
  std::vector<double> sums(maker_.groups() * kStatistics, 0.0);
  for (int sum = 0; sum < kStatistics; ++sum)
    for_each_cell(sum, [&](std::size_t layer, std::int64_t, double square) {
      const auto group = static_cast<std::size_t>(plan_.layers[layer].spec.group);
      sums[group * kStatistics + static_cast<std::size_t>(sum)] += square;
    });
  return sums;
}

// What the rule measured in every layer, its cells added in flat order.
template <class T>
typename Stepper<T>::LayerSums Stepper<T>::layer_sums() const {
  LayerSums sums(plan_.layers.size());
  for (int q = 0; q < kMaxSums; ++q)
    for_each_cell(kStatistics + q, [&](std::size_t layer, std::int64_t, double number) {
      sums[layer][static_cast<std::size_t>(q)] += number;
    });
  return sums;
}

// The first sum of every group's layers, in the form of statistics.
template <class T>
std::vector<double> Stepper<T>::sums_of_groups(const LayerSums& sums) const {
  std::vector<double> of_groups(maker_.groups() * kStatistics, 0.0);
  for (std::size_t i = 0; i < sums.size(); ++i)
    of_groups[static_cast<std::size_t>(plan_.layers[i].spec.group) * kStatistics] += sums[i][0];
  return of_groups;
}

// As every layer's last sum, the mean over the workers of the norms of their own gradients.
template <class T>
void Stepper<T>::add_mean_norms_of_workers(LayerSums& sums) const {
  const std::size_t workers = arenas_.shards().size(), layers = sums.size();
  std::vector<double> squares(workers * layers, 0.0);
  for (const std::uint32_t k : arenas_.workers().numbers)
    for_each_cell(
        kStatistics + kMaxSums + static_cast<int>(k),
        [&](std::size_t layer, std::int64_t, double number) { squares[k * layers + layer] += number; });
  if (rails_) rails_->largest_of_all(squares);
  for (std::size_t k = 0; k < workers; ++k)
    for (std::size_t i = 0; i < layers; ++i)
      sums[i].back() += std::sqrt(squares[k * layers + i]) / static_cast<double>(workers);
}

template class Stepper<float>;
template class Stepper<double>;

}  // namespace xc
