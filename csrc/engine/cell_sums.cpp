#include "engine/cell_sums.hpp"

#include "stages/tree.hpp"

namespace xc {

CellSums::CellSums(const Plan& plan, const Segment& shard, std::vector<double*> arrays)
    : cells_(cells_of(plan, shard)),
      arrays_(std::move(arrays)),
      lanes_(arrays_.size() * static_cast<std::size_t>(kLanes), 0.0) {
  for (double* const array : arrays_) std::fill_n(array, cells_.size() - 1, 0.0);
}

// Leaves the open cell for the one that holds the element `at`.
void CellSums::open(std::int64_t at) {
  finish();
  const auto after = std::upper_bound(cells_.begin(), cells_.end(), at);
  cell_ = static_cast<std::size_t>(after - cells_.begin()) - 1;
}

// Of `count` sums from number `first` on.
double CellSums::tree_sum(std::size_t first, std::size_t count) {
  if (count == 1) return sum_of_lanes(&lanes_[first * kLanes]);
  const auto left = static_cast<std::size_t>(left_part(static_cast<int>(count)));
  const double sum = tree_sum(first, left);
  return sum + tree_sum(first + left, count - left);
}

void CellSums::finish() {
  if (cells_.size() > 1)
    for (std::size_t s = 0, count = 1; s < arrays_.size(); s += count) {
      count =
          static_cast<std::size_t>(std::find_if(arrays_.begin() + std::ptrdiff_t(s), arrays_.end(),
                                                [&](const double* array) { return array != arrays_[s]; }) -
                                   (arrays_.begin() + std::ptrdiff_t(s)));
      arrays_[s][cell_] += tree_sum(s, count);
    }
  std::fill(lanes_.begin(), lanes_.end(), 0.0);
}

}  // namespace xc
