#pragma once

#include "core/host_device.hpp"

namespace xc {

// Sums are taken in double and in lanes, an order in which many hands can add at once: number i belongs to
// lane i % lanes, and in the end one half of the lanes is added to the other until one is left. So neither
// the length of a tile nor the instruction set nor a device's threads change what comes out.
//
// Within a cell, element first + i belongs to lane (first + i) % kLanes.
inline constexpr int kLanes = 16;
// In the norm of the whole gradient, cell c of all belongs to lane c % kNormLanes.
inline constexpr int kNormLanes = 1024;

// Uses them up.
template <int kCount = kLanes>
XC_HOST_DEVICE double sum_of_lanes(double* lanes) {
  for (int width = kCount / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

}  // namespace xc
