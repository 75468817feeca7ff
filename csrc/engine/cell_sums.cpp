#include "engine/cell_sums.hpp"

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

void CellSums::finish() {
  if (cells_.size() > 1)
    for (std::size_t s = 0; s < arrays_.size(); ++s) arrays_[s][cell_] += sum_of_lanes(&lanes_[s * kLanes]);
  std::fill(lanes_.begin(), lanes_.end(), 0.0);
}

}  // namespace xc
