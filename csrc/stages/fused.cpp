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

// The commonest steps as one loop each: an element's mean gradient, its new weight and what every worker is
// given stay in registers. What is done to an element is the same functions in the same order as in the
// stages, so the bits are the same.

namespace xc {
namespace {

// How far ahead, in elements, arrays past the cache are fetched.
constexpr std::int64_t kAhead = 256;

template <class R, class E, int kWorkers, Direction kDirection, bool kScaled>
struct Loop {
  using T = Master<E>;
  const R rule;
  const E* g[kWorkers] = {};
  T *w, *a, *b, *c;
  T scale, clip;
  Displacement<T> by;

  // Element i; what worker k is given goes to to[k][j].
  [[gnu::always_inline]] void element(std::int64_t i, E* const* to, std::int64_t j) const {
    const T mean = tree<0, kWorkers>(g, i) * scale * clip;
    update_at(rule, &mean, static_cast<const T*>(nullptr), 0, w + i, a + i, b + i, c + i);
    T factor = T(1);
    if constexpr (kScaled) factor = factor_at(rule, 0, w + i, a + i, b + i, c + i);
    for (int k = 0; k < kWorkers; ++k)
      to[k][j] = narrow<E>(displaced<kDirection, kScaled>(w[i], by, g[k] + i, &mean, &factor, 0));
  }

  [[gnu::always_inline]] void elements(std::int64_t begin, std::int64_t end, E* const* to) const {
#pragma GCC ivdep
    for (std::int64_t i = begin; i < end; ++i) element(i, to, i);
  }

  [[gnu::always_inline]] void fetch_ahead(std::int64_t i) const {
    constexpr std::int64_t kBytes = kStreamBlock * static_cast<std::int64_t>(sizeof(T));
    const auto from = [](const auto* at) { return reinterpret_cast<const std::byte*>(at); };
    for (int k = 0; k < kWorkers; ++k)
      fetch(from(g[k] + i + kAhead), kStreamBlock * static_cast<std::int64_t>(sizeof(E)));
    fetch(from(w + i + kAhead), kBytes);
    if constexpr (R::kSlots > 0) fetch(from(a + i + kAhead), kBytes);
    if constexpr (R::kSlots > 1) fetch(from(b + i + kAhead), kBytes);
    if constexpr (R::kSlots > 2) fetch(from(c + i + kAhead), kBytes);
  }
};

// Weights go past the cache in whole blocks, if their arrays are aligned for it; returns where the last one
// ends.
template <class L, class E, int kWorkers>
[[gnu::always_inline]] inline std::int64_t stream_blocks(const L& loop, std::int64_t count, E* const* to,
                                                         StoreWidth store) {
  for (int k = 0; k < kWorkers; ++k) store = store_for(to[k], store);
  if (store == StoreWidth::none) return 0;
  alignas(kLineBytes) E block[kWorkers][kStreamBlock];
  E* blocks[kWorkers];
  for (int k = 0; k < kWorkers; ++k) blocks[k] = block[k];
  const std::int64_t end = count - count % kStreamBlock;
  for (std::int64_t i = 0; i < end; i += kStreamBlock) {
    loop.fetch_ahead(i);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < kStreamBlock; ++j) loop.element(i + j, blocks, j);
    for (int k = 0; k < kWorkers; ++k) store_past_cache<sizeof block[0]>(block[k], to[k] + i, store);
  }
  return end;
}

template <class R, class E, int kWorkers, Direction kDirection, bool kScaled>
XC_CLONES void fused(const FusedStep<Master<E>>& step) {
  using T = Master<E>;
  Loop<R, E, kWorkers, kDirection, kScaled> loop{
      .rule = *static_cast<const R*>(step.scalars),
      .w = step.w,
      .a = step.slots[0],
      .b = step.slots[1],
      .c = step.slots[2],
      .scale = step.scale,
      .clip = step.clip,
      .by = {nullptr, nullptr, nullptr, step.own_rate, T(0)},
  };
  E* to[kWorkers];
  for (int k = 0; k < kWorkers; ++k) {
    loop.g[k] = reinterpret_cast<const E*>(step.sources[k] + step.first_byte);
    to[k] = reinterpret_cast<E*>(step.targets[k] + step.first_byte);
  }
  const std::int64_t streamed = step.store == StoreWidth::none ? 0
                                                               : stream_blocks<decltype(loop), E, kWorkers>(
                                                                     loop, step.count, to, step.store);
  loop.elements(streamed, step.count, to);
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
