#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "rules/adam.hpp"
#include "rules/sgd.hpp"
#include "stages/displaced.hpp"
#include "stages/tables.hpp"
#include "stages/tree.hpp"
#include "stages/update.hpp"

// The commonest steps as one loop each: reduce, apply and publish of a block of elements, all in registers
// and the nearest cache, while the blocks that follow are fetched from all arrays in turn. What a step does
// to an element is the same functions in the same order as in the stages, so the bits are the same.

namespace xc {
namespace {

// How far ahead, in elements, arrays are fetched.
constexpr std::int64_t kAhead = 256;

template <class T>
[[gnu::always_inline]] inline void fetch_block(const T* from) {
  fetch(reinterpret_cast<const std::byte*>(from), kStreamBlock * static_cast<std::int64_t>(sizeof(T)));
}

template <class R, class E, int kWorkers, Direction kDirection, bool kScaled>
XC_CLONES void fused(const FusedStep<Master<E>>& step) {
  using T = Master<E>;
  const R rule = *static_cast<const R*>(step.scalars);
  const E* g[kWorkers];
  std::byte* x[kWorkers];
  Displacement<T> by[kWorkers];
  StoreWidth store = step.store;
  for (int k = 0; k < kWorkers; ++k) {
    g[k] = reinterpret_cast<const E*>(step.sources[k] + step.first_byte);
    x[k] = step.targets[k] + step.first_byte;
    by[k] = {nullptr, nullptr, nullptr, step.own_rate, T(0)};
    store = store_for(x[k], store);
  }
  T *const w = step.w, *const a = step.slots[0], *const b = step.slots[1], *const c = step.slots[2];
  const std::int64_t blocks = store == StoreWidth::none ? 0 : step.count / kStreamBlock;
  alignas(kLineBytes) T mean[kStreamBlock];
  alignas(kLineBytes) T factor[kScaled ? kStreamBlock : 1];
  alignas(kLineBytes) E block[kStreamBlock];
  const auto reduce_and_apply = [&](std::int64_t i, std::int64_t count) XC_INLINE {
    const E* from[kWorkers];
    for (int k = 0; k < kWorkers; ++k) from[k] = g[k] + i;
    for (std::int64_t j = 0; j < count; ++j) mean[j] = tree<0, kWorkers>(from, j) * step.scale;
    T *const wi = w + i, *const ai = a + i, *const bi = b + i, *const ci = c + i;
#pragma GCC ivdep
    for (std::int64_t j = 0; j < count; ++j)
      update_at(rule, mean, static_cast<const T*>(nullptr), j, wi, ai, bi, ci);
    if constexpr (kScaled)
#pragma GCC ivdep
      for (std::int64_t j = 0; j < count; ++j) factor[j] = factor_at(rule, j, wi, ai, bi, ci);
  };
  for (std::int64_t n = 0; n < blocks; ++n) {
    const std::int64_t i = n * kStreamBlock;
    for (int k = 0; k < kWorkers; ++k) fetch_block(g[k] + i + kAhead);
    fetch_block(w + i + kAhead);
    if constexpr (R::kSlots > 0) fetch_block(a + i + kAhead);
    if constexpr (R::kSlots > 1) fetch_block(b + i + kAhead);
    if constexpr (R::kSlots > 2) fetch_block(c + i + kAhead);
    reduce_and_apply(i, kStreamBlock);
    for (int k = 0; k < kWorkers; ++k) {
      for (std::int64_t j = 0; j < kStreamBlock; ++j)
        block[j] = narrow<E>(displaced<kDirection, kScaled>(w[i + j], by[k], g[k] + i, mean, factor, j));
      store_past_cache<sizeof block>(block, x[k] + i * static_cast<std::int64_t>(sizeof(E)), store);
    }
  }
  for (std::int64_t i = blocks * kStreamBlock; i < step.count; i += kStreamBlock) {
    const std::int64_t count = std::min(kStreamBlock, step.count - i);
    reduce_and_apply(i, count);
    for (int k = 0; k < kWorkers; ++k) {
      E* const to = reinterpret_cast<E*>(x[k]) + i;
      for (std::int64_t j = 0; j < count; ++j)
        to[j] = narrow<E>(displaced<kDirection, kScaled>(w[i + j], by[k], g[k] + i, mean, factor, j));
    }
  }
}

template <class R, int kWorkers>
FusedFn<float> with_workers(Direction direction, bool scaled) {
  if (direction == Direction::none) return &fused<R, float, kWorkers, Direction::none, false>;
  if (direction != Direction::own) return nullptr;
  if constexpr (kHasFactor<R, float>)
    if (scaled) return &fused<R, float, kWorkers, Direction::own, true>;
  return scaled ? nullptr : &fused<R, float, kWorkers, Direction::own, false>;
}

template <class R>
FusedFn<float> of_rule(int workers, Direction direction, bool scaled) {
  switch (workers) {
    case 1:
      return with_workers<R, 1>(direction, scaled);
    case 2:
      return with_workers<R, 2>(direction, scaled);
    case 4:
      return with_workers<R, 4>(direction, scaled);
    default:
      return nullptr;
  }
}

template <class F, unsigned... kMember>
FusedFn<float> of_family(unsigned member, int workers, Direction direction, bool scaled,
                         std::integer_sequence<unsigned, kMember...>) {
  FusedFn<float> found = nullptr;
  ((member == kMember
        ? void(found = of_rule<typename F::template Member<float, kMember>>(workers, direction, scaled))
        : void()),
   ...);
  return found;
}

}  // namespace

template <>
FusedFn<float> fused_kernel<float>(DType element, int family, unsigned member, int workers,
                                   Direction direction, bool scaled) {
  if (element != DType::f32) return nullptr;
  const auto name = families()[static_cast<std::size_t>(family)].name;
  if (name == SgdFamily::kName)
    return of_family<SgdFamily>(member, workers, direction, scaled,
                                std::make_integer_sequence<unsigned, SgdFamily::kMembers>{});
  if (name == AdamFamily::kName)
    return of_family<AdamFamily>(member, workers, direction, scaled,
                                 std::make_integer_sequence<unsigned, AdamFamily::kMembers>{});
  return nullptr;
}

template <>
FusedFn<double> fused_kernel<double>(DType, int, unsigned, int, Direction, bool) {
  return nullptr;
}

}  // namespace xc
