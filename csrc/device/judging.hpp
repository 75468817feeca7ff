#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.hpp"
#include "device/views.hpp"
#include "rules/clipping.hpp"
#include "stages/lanes.hpp"

namespace xc {

#ifdef __CUDA_ARCH__
#define XC_UNROLL_SOME _Pragma("unroll 4")
#else
#define XC_UNROLL_SOME
#endif

// What the norm of the mean gradient leads to, decided on the device: pieces of a kernel of one block, as
// functions that a loop on the host calls as well.

// One lane of the sum of all cells' squares: every kNormLanes-th of them, in flat order.
XC_HOST_DEVICE double lane_of(const DeviceSquares& squares, int lane) {
  double total = 0.0;
  for (int p = 0; p < squares.ranks; ++p) {
    const std::int64_t first = squares.firsts[p], end = squares.firsts[p + 1];
    const std::int64_t after = first % kNormLanes, skipped = (lane - after + kNormLanes) % kNormLanes;
    const double* const numbers = squares.of_ranks[p] - first;
    XC_UNROLL_SOME  // the loads need not wait for the additions
        for (std::int64_t c = first + skipped; c < end; c += kNormLanes) total += numbers[c];
  }
  return total;
}

XC_HOST_DEVICE DeviceVerdict verdict_on(const DeviceBounds& bounds, double squares) {
  const double norm = std::sqrt(squares);
  return {norm, bounds.serial, bounds.skips != 0 && !std::isfinite(norm)};
}

// What follows for one run.
XC_HOST_DEVICE void clip(const Judgement& at, const DeviceVerdict& verdict, int number) {
  if (!(at.bounds->max_norm > 0)) return;
  DeviceRun& run = reinterpret_cast<DeviceRun*>(at.bounds + 1)[number];
  const double clip = clip_for(verdict.norm, at.bounds->max_norm);
  run.clip = static_cast<float>(clip);
  clip_rates(run.clipped, clip, run.own_rate, run.shared_rate);
}

}  // namespace xc
