#pragma once

#include <bit>

namespace xc {

// Workers are summed as a tree: neighbours paired bottom-up, the odd one carried. Of `count` > 1 in a row,
// the first so many are one subtree, the rest the other.
constexpr int left_part(int count) {
  return static_cast<int>(std::bit_floor(static_cast<unsigned>(count - 1)));
}

}  // namespace xc
