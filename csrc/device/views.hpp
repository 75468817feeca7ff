#pragma once

#include <cstddef>
#include <cstdint>

#include "rules/clipping.hpp"
#include "rules/extrapolation.hpp"
#include "rules/rule.hpp"

namespace xc {

// What kernels on a device see. Everything that lies behind these pointers is the device's memory; master
// weights and state are float there.

// Elements that are summed together: part of one cell of the plan. A block of threads works on one of them at
// a time, each thread on as many neighbours as 16 bytes of the parameter's type hold. Layers begin on a grid
// that this number divides.
struct Cell {
  std::int64_t begin;
  std::uint32_t run;
  std::uint16_t count;
  std::uint16_t live;  // without the padding at its end
};
inline constexpr int kCellElements = 1024;

// A Run without what is the host's.
struct DeviceRun {
  std::int64_t first_byte;  // of flat element 0, had it this run's type; may be negative
  float scale;
  float own;
  float clip;
  float decay;
  float own_rate;
  float shared_rate;
  Direction direction;
  Clipped clipped;
  bool scaled;          // in units of the rule's steps
  std::int32_t random;  // -1: the shared direction is the mean gradient; else the Noise
  NoiseKey noise;
  alignas(16) std::byte scalars[kMaxScalarBytes];
};

// The team's workers: `sources` are summed, `own` displace, `targets` are published to.
struct DeviceWorkers {
  const std::byte* const* sources;
  const std::byte* const* own;
  std::byte* const* targets;
  const std::uint32_t* numbers;
  int source_count;
  int target_count;
};

// Arrays of a shard, from its element `begin` on; some may be missing.
struct DeviceShard {
  std::int64_t begin;
  float* w;
  float* slots[kMaxSlots];
  float* mean;
  float* factor;
  const float* received;  // a sum of gradients that came from other teams
};

// What the norm of a step is held to, in front of the runs that this concerns.
struct alignas(alignof(DeviceRun)) DeviceBounds {
  double max_norm;
  std::int64_t serial;  // of the step
  std::int64_t skips;
  std::int64_t run_count;
};

// What the norm led to.
struct DeviceVerdict {
  double norm;
  std::int64_t serial;
  std::int32_t skipped;
};

// The squares of the whole mean gradient: rank p of the team has those of the plan's cells from firsts[p] on.
struct DeviceSquares {
  const double* const* of_ranks;
  const std::int64_t* firsts;
  int ranks;
};

// What one launch works on. Sums go to `sums`, an array of `sum_stride` numbers for each of them: of cell c
// to number places[c], or c if there are no places. A launch that must obey a verdict does nothing in a step
// that was skipped.
struct Launch {
  const Cell* cells;
  std::int64_t cell_count;
  const DeviceRun* runs;
  DeviceWorkers workers;
  DeviceShard shard;
  double* sums;
  std::int64_t sum_stride;
  const std::uint32_t* places;
  const DeviceVerdict* obeyed;
};

// What the judge of a step works on: its runs are still to be clipped.
struct Judgement {
  DeviceSquares squares;
  DeviceBounds* bounds;
  DeviceVerdict* verdict;
};

}  // namespace xc
