#pragma once

#include <algorithm>
#include <cstdint>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "stages/tables.hpp"

// The loop that all sums share. Lanes are taken in rows: the terms of a row are computed together, which the
// compiler can vectorise whatever they are, and added to sums that stay in registers.

namespace xc {

// Elements whose memory is fetched at once.
inline constexpr std::int64_t kFetched = 4 * kLanes;

// Fetches the memory that is upcoming beside elements i, ..., i + kFetched - 1.
[[gnu::always_inline]] inline void fetch_beside(std::int64_t i, const Upcoming& next) {
  for (int a = 0; a < next.count; ++a) {
    const std::byte* const at = next.at[a] + i * next.element_size[a];
    if (next.element_size[a] == sizeof(float))
      fetch(at, kFetched * sizeof(float));  // of known length
    else
      fetch(at, kFetched * next.element_size[a]);
  }
}

// Rows whose terms are computed together. One, which leaves registers for the sums, takes the fewest
// instructions for most rules with up to two sums; those with more compute more for each, and take fewer with
// several rows.
template <int kSums>
inline constexpr int kRows = kSums > 2 ? 4 : 1;

// Adds `terms_of(i, term)`, which writes kSums numbers, for i < count to kSums sums of kLanes lanes each;
// element i belongs to lane (first + i) % kLanes. Meanwhile what lies upcoming is fetched: computing and
// waiting for memory take about as long.
template <int kSums, class TermsOf>
XC_HOST_DEVICE void add_terms(std::int64_t first, std::int64_t count, double* lanes, const Upcoming& next,
                              TermsOf terms_of) {
  constexpr int kBlock = kRows<kSums> * kLanes;
  const auto singly = [&](std::int64_t begin, std::int64_t end) XC_INLINE {
    for (std::int64_t i = begin; i < end; ++i) {
      double term[kSums];
      terms_of(i, term);
      for (int q = 0; q < kSums; ++q) lanes[q * kLanes + (first + i) % kLanes] += term[q];
    }
  };
  const std::int64_t head = std::min(count, (kLanes - first % kLanes) % kLanes);
  const std::int64_t end = head + (count - head) / kBlock * kBlock;
  singly(0, head);
  double sums[kSums][kLanes];
  std::copy_n(lanes, kSums * kLanes, &sums[0][0]);
  for (std::int64_t i = head; i < end; i += kBlock) {
    if ((i - head) % kFetched == 0) fetch_beside(i, next);
    double terms[kSums][kBlock];
#pragma GCC ivdep
    for (int j = 0; j < kBlock; ++j) {
      double term[kSums];
      terms_of(i + j, term);
      for (int q = 0; q < kSums; ++q) terms[q][j] = term[q];
    }
    for (int q = 0; q < kSums; ++q)
      for (int row = 0; row < kBlock; row += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) sums[q][lane] += terms[q][row + lane];
  }
  std::copy_n(&sums[0][0], kSums * kLanes, lanes);
  singly(end, count);
}

}  // namespace xc
