#pragma once

#include <algorithm>
#include <cstdint>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "stages/tables.hpp"

// The loop that all sums share. Terms are computed for a block of elements, which the compiler can vectorise
// whatever they are, and then added to the lanes row by row.

namespace xc {

// Element j of `terms` belongs to lane (lane + j) % kLanes.
XC_HOST_DEVICE void add_to_lanes(const double* terms, int lane, int count, double* lanes) {
  int j = 0;
  if (lane == 0)
    for (; j + kLanes <= count; j += kLanes)
      for (int l = 0; l < kLanes; ++l) lanes[l] += terms[j + l];
  for (; j < count; ++j) lanes[(lane + j) % kLanes] += terms[j];
}

// Adds `terms_of(i, term)`, which writes kSums numbers, for i < count to kSums sums of kLanes lanes each.
// Meanwhile what lies upcoming is fetched: computing and waiting for memory take about as long.
template <int kSums, class TermsOf>
XC_HOST_DEVICE void add_terms(std::int64_t first, std::int64_t count, double* lanes, const Upcoming& next,
                              TermsOf terms_of) {
  constexpr int kBlock = 4 * kLanes;
  double terms[kSums][kBlock];
  for (std::int64_t i = 0; i < count;) {
    const int lane = static_cast<int>((first + i) % kLanes);
    const int n = static_cast<int>(std::min<std::int64_t>(count - i, lane == 0 ? kBlock : kLanes - lane));
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) {
      double term[kSums];
      terms_of(i + j, term);
      for (int q = 0; q < kSums; ++q) terms[q][j] = term[q];
    }
    for (int a = 0; a < next.count; ++a)
      fetch(next.at[a] + i * next.element_size[a], n * next.element_size[a]);
    for (int q = 0; q < kSums; ++q) add_to_lanes(terms[q], lane, n, lanes + q * kLanes);
    i += n;
  }
}

}  // namespace xc
