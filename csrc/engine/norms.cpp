#include "engine/norms.hpp"

#include <algorithm>

namespace xc {

SquareSums::SquareSums(const Plan& plan, const Segment& shard, double* sums)
    : cells_(cells_of(plan, shard)), sums_(sums) {
  std::fill_n(sums_, cells_.size() - 1, 0.0);
}

// Leaves the open cell for the one that holds the element `at`.
void SquareSums::open(std::int64_t at) {
  finish();
  const auto after = std::upper_bound(cells_.begin(), cells_.end(), at);
  cell_ = static_cast<std::size_t>(after - cells_.begin()) - 1;
}

template <class T>
void SquareSums::add(const T* values, std::int64_t first, std::int64_t count) {
  for (const std::int64_t end = first + count; first < end;) {
    if (first < cells_[cell_] || first >= cells_[cell_ + 1]) open(first);
    const std::int64_t piece = std::min(end, cells_[cell_ + 1]) - first;
    add_squares(values, first, piece, lanes_);
    values += piece;
    first += piece;
  }
}

void SquareSums::finish() {
  if (cells_.size() > 1) sums_[cell_] += sum_of_lanes(lanes_);
  std::fill_n(lanes_, kSquareLanes, 0.0);
}

template void SquareSums::add<float>(const float*, std::int64_t, std::int64_t);
template void SquareSums::add<double>(const double*, std::int64_t, std::int64_t);

}  // namespace xc
