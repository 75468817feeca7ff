#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.hpp"
#include "stages/tables.hpp"

namespace xc {

// Teams' partial sums: how they travel, and what they add up to.

inline constexpr std::int64_t kShortMessage = std::int64_t{60}
                                              << 10;  // bytes that MPIs send without asking first

constexpr DType wire_type(float, bool narrow) { return narrow ? DType::bf16 : DType::f32; }
constexpr DType wire_type(double, bool) { return DType::f64; }

// The same tree as over workers.
template <class T>
void add_tree(const std::vector<const std::byte*>& parts, std::int64_t count, T* sum, T* scratch) {
  constexpr DType kMaster = sizeof(T) == 8 ? DType::f64 : DType::f32;
  reduce_kernel<T>(kMaster)(parts.data(), static_cast<int>(parts.size()), 0, count, T(1), sum, scratch);
}

}  // namespace xc
