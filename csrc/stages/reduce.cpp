#include <limits>
#include <utility>

#include "core/clones.hpp"
#include "stages/tables.hpp"
#include "stages/tree.hpp"

// The tree sum. Up to kFan sources are summed in registers by a leaf that is unrolled for their number; more
// are summed by splitting at the largest power of two below their number, the right part into scratch, then
// added. Both are the same tree: neighbours paired bottom-up, the odd one carried. Only the last addition
// scales; the inner ones multiply by one, which changes no bit.

namespace xc {
namespace {

constexpr int kFan = 8;

template <class E, int kCount>
XC_CLONES void leaf(const std::byte* const* sources, std::int64_t first_byte, std::int64_t count,
                    Master<E> scale, Master<E>* __restrict sum) {
  const E* source[kCount];
  for (int k = 0; k < kCount; ++k) source[k] = reinterpret_cast<const E*>(sources[k] + first_byte);
  for (std::int64_t i = 0; i < count; ++i) sum[i] = tree<0, kCount>(source, i) * scale;
}

template <class T>
XC_CLONES void add(T* __restrict left, const T* __restrict right, T scale, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) left[i] = (left[i] + right[i]) * scale;
}

template <class E>
using LeafFn = void (*)(const std::byte* const*, std::int64_t, std::int64_t, Master<E>, Master<E>*);

template <class E, int... kIndex>
LeafFn<E> leaf_for(int count, std::integer_sequence<int, kIndex...>) {
  static constexpr auto pick = [](int wanted) {
    LeafFn<E> found = nullptr;
    ((wanted == kIndex + 1 ? void(found = &leaf<E, kIndex + 1>) : void()), ...);
    return found;
  };
  return pick(count);
}

template <class E>
void reduce(const std::byte* const* sources, int source_count, std::int64_t first_byte, std::int64_t count,
            Master<E> scale, Master<E>* mean, Master<E>* scratch) {
  if (source_count <= kFan) {
    leaf_for<E>(source_count, std::make_integer_sequence<int, kFan>{})(sources, first_byte, count, scale,
                                                                       mean);
    return;
  }
  const int left = left_part(source_count);
  reduce<E>(sources, left, first_byte, count, Master<E>(1), mean, scratch);
  reduce<E>(sources + left, source_count - left, first_byte, count, Master<E>(1), scratch, scratch + count);
  add(mean, scratch, scale, count);
}

template <class E>
XC_CLONES void spread(const std::byte* const* sources, int source_count, std::int64_t first_byte,
                      std::int64_t count, Master<E> own, const Master<E>* __restrict mean,
                      Master<E>* __restrict spread) {
  using T = Master<E>;
  for (std::int64_t i = 0; i < count; ++i) spread[i] = T(0);
  for (int k = 0; k < source_count; ++k) {
    const E* __restrict g = reinterpret_cast<const E*>(sources[k] + first_byte);
    for (std::int64_t i = 0; i < count; ++i) {
      const T away = (widen(g[i]) * own - mean[i]) / mean[i];
      spread[i] = spread[i] + away * away;
    }
  }
  const T share = T(1.0 / source_count);
  for (std::int64_t i = 0; i < count; ++i)
    spread[i] = mean[i] == T(0) ? std::numeric_limits<T>::infinity() : spread[i] * share;
}

}  // namespace

int reduce_scratch_tiles(int source_count) {
  int tiles = 0;
  for (; source_count > kFan; source_count = left_part(source_count)) ++tiles;
  return tiles;
}

template <>
ReduceFn<float> reduce_kernel<float>(DType element) {
  if (element == DType::f32) return &reduce<float>;
  return element == DType::bf16 ? &reduce<Bf16> : &reduce<F16>;
}

template <>
ReduceFn<double> reduce_kernel<double>(DType) {
  return &reduce<double>;
}

template <>
SpreadFn<float> spread_kernel<float>(DType element) {
  if (element == DType::f32) return &spread<float>;
  return element == DType::bf16 ? &spread<Bf16> : &spread<F16>;
}

template <>
SpreadFn<double> spread_kernel<double>(DType) {
  return &spread<double>;
}

}  // namespace xc
