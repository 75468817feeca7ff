#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/plan.hpp"
#include "stages/tables.hpp"

namespace xc {

// Sums over a shard, a number for each of the plan's cells, taken while the shard is walked from its begin to
// its end, by one stage only: what goes back to a cell begins its lanes anew. A cell that a tile cuts carries
// its lanes into the next tile, so the sums do not depend on the tile; and since no cell has two owners, all
// cells added in flat order do not depend on who owned which.
class CellSums {
 public:
  // `arrays` are where the sums go, each of one number for every cell that begins in the shard. Two of them
  // may be the same: their sums are added up in each cell, as the tree of neighbours that gradients are.
  CellSums(const Plan& plan, const Segment& shard, std::vector<double*> arrays);

  // Calls add(offset, first, count, lanes) for every part of `count` elements from `first` that lies in one
  // cell; `lanes` are of kLanes for each sum, one sum after the other.
  template <class Add>
  void add(std::int64_t first, std::int64_t count, Add add) {
    for (std::int64_t at = first; at < first + count;) {
      if (at < cells_[cell_] || at >= cells_[cell_ + 1]) open(at);
      const std::int64_t piece = std::min(first + count, cells_[cell_ + 1]) - at;
      add(at - first, at, piece, lanes_.data());
      at += piece;
    }
  }

  // The lanes, if all these elements lie in one cell; null otherwise.
  double* lanes_within(std::int64_t first, std::int64_t count) {
    if (first < cells_[cell_] || first >= cells_[cell_ + 1]) open(first);
    return first + count <= cells_[cell_ + 1] ? lanes_.data() : nullptr;
  }

  // Adds sums that somebody else took, of the shard's cells with these places, to array number `array`.
  void take(std::size_t array, std::span<const std::uint32_t> places, std::span<const double> numbers) {
    for (std::size_t i = 0; i < places.size(); ++i) arrays_[array][places[i]] += numbers[i];
  }

  // Brings in what the last cell still carries.
  void finish();

 private:
  void open(std::int64_t at);
  double tree_sum(std::size_t first, std::size_t count);

  std::span<const std::int64_t> cells_;  // where each begins, and where the last ends
  std::vector<double*> arrays_;
  std::vector<double> lanes_;
  std::size_t cell_ = 0;
};

}  // namespace xc
