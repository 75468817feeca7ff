#pragma once

#include <cstdint>

#include "engine/plan.hpp"
#include "stages/tables.hpp"

namespace xc {

// Sums of squares of a shard, one for each of the plan's cells, taken while the shard is walked from its
// begin to its end. A cell that a tile cuts carries its lanes into the next tile, so the sums do not depend
// on the tile; and since no cell has two owners, all cells added in flat order do not depend on who owned
// which.
class SquareSums {
 public:
  // `sums` is the shard's own array, of one number for each cell that begins in it.
  SquareSums(const Plan& plan, const Segment& shard, double* sums);

  template <class T>
  void add(const T* values, std::int64_t first, std::int64_t count);
  // Brings in what the last cell still carries.
  void finish();

 private:
  void open(std::int64_t at);

  std::span<const std::int64_t> cells_;  // where each begins, and where the last ends
  double* sums_;
  std::size_t cell_ = 0;
  double lanes_[kSquareLanes] = {};
};

}  // namespace xc
