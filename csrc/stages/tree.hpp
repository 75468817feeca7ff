#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.hpp"

namespace xc {

// Workers are summed as a tree: neighbours paired bottom-up, the odd one carried. Of `count` > 1 in a row,
// the first so many are one subtree, the rest the other.
constexpr int left_part(int count) {
  return static_cast<int>(std::bit_floor(static_cast<unsigned>(count - 1)));
}

// The sum of element i of `kCount` sources from `kFirst` on, as one tree in registers.
template <int kFirst, int kCount, class E>
[[gnu::always_inline]] inline Master<E> tree(const E* const* source, std::int64_t i) {
  if constexpr (kCount == 1) {
    return widen(source[kFirst][i]);
  } else {
    constexpr int kLeft = left_part(kCount);
    return tree<kFirst, kLeft>(source, i) + tree<kFirst + kLeft, kCount - kLeft>(source, i);
  }
}

}  // namespace xc
