#include "engine/filters.hpp"

#include <algorithm>
#include <cmath>

namespace xc {

template <class T>
void Filters<T>::scale(const Run<T>& run, const NoiseKey& key, std::int64_t first, std::int64_t count,
                       T* noise) {
  const std::int64_t end = first + count;
  for (std::int64_t at = first; at < std::min(end, run.filters_end);) {
    const std::int64_t begin = run.begin + (at - run.begin) / run.filter_length * run.filter_length;
    const std::int64_t last = std::min(end, begin + run.filter_length);
    if (begin != begin_ || begin + run.filter_length != end_)
      open(begin, begin + run.filter_length, shards_.size());
    double& ratio = ratios_[key.worker];
    if (ratio < 0) ratio = ratio_to(norm_of_noise(*run.extrapolation->random, key));
    for (; at < last; ++at) noise[at - first] *= T(ratio);
  }
  if (end > run.filters_end)
    std::fill(noise + std::max<std::int64_t>(run.filters_end - first, 0), noise + count, T(0));
}

template <class T>
void Filters<T>::open(std::int64_t begin, std::int64_t end, std::size_t workers) {
  begin_ = begin;
  end_ = end;
  weights_ = norm_of_weights();
  ratios_.assign(workers, -1.0);
}

template <class T>
double Filters<T>::norm_of_weights() const {
  double lanes[kLanes] = {};
  for (const Shard<T>& shard : shards_) {
    const std::int64_t from = std::max(begin_, shard.begin), to = std::min(end_, shard.end);
    if (from < to) add_squares(shard.w + (from - shard.begin), from, to - from, lanes);
  }
  return std::sqrt(sum_of_lanes(lanes));
}

template <class T>
double Filters<T>::norm_of_noise(Noise kind, const NoiseKey& key) {
  double lanes[kLanes] = {};
  const auto step = static_cast<std::int64_t>(buffer_.size());
  for (std::int64_t at = begin_; at < end_; at += step) {
    const std::int64_t count = std::min(step, end_ - at);
    make_noise(kind, key, at, count, buffer_.data());
    add_squares(buffer_.data(), at, count, lanes);
  }
  return std::sqrt(sum_of_lanes(lanes));
}

template class Filters<float>;
template class Filters<double>;

}  // namespace xc
