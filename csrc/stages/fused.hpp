#pragma once

#include <string_view>
#include <utility>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "rules/all.hpp"
#include "stages/displaced.hpp"
#include "stages/tables.hpp"
#include "stages/tree.hpp"
#include "stages/update.hpp"

// The commonest steps as one loop each: an element's mean gradient, its new weight and what every worker is
// given stay in registers. What is done to an element is the same functions in the same order as in the
// stages, so the bits are the same.

namespace xc {

// Elements that go past the cache together: whole lines of weights, stored between the reads of one block and
// the next.
inline constexpr std::int64_t kFusedBlock = 32;

// The distance, in elements, at which arrays past the cache are fetched ahead.
inline constexpr std::int64_t kAhead = 256;

// True if the rule looks at the mean gradient. Some that measure have taken it into their slots before.
template <class R>
constexpr bool reduces() {
  if constexpr (Measuring<R>)
    return R::kNeedsGradient;
  else
    return true;
}
template <class R>
inline constexpr bool kReduces = reduces<R>();

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
    T mean = T(0);
    if constexpr (kReduces<R>) mean = tree<0, kWorkers>(g, i) * scale * clip;
    InHand<R, T> now{w[i]};
    if constexpr (R::kSlots > 0) now.a = a[i];
    if constexpr (R::kSlots > 1) now.b = b[i];
    if constexpr (R::kSlots > 2) now.c = c[i];
    now.update_by(rule, mean);
    w[i] = now.w;
    if constexpr (R::kSlots > 0) a[i] = now.a;
    if constexpr (R::kSlots > 1) b[i] = now.b;
    if constexpr (R::kSlots > 2) c[i] = now.c;
    T factor = T(1);
    if constexpr (kScaled) factor = now.factor(rule);
    for (int k = 0; k < kWorkers; ++k)
      to[k][j] = narrow<E>(displaced<kDirection, kScaled>(now.w, by, g[k] + i, &mean, &factor, 0));
  }

  [[gnu::always_inline]] void elements(std::int64_t begin, std::int64_t end, E* const* to) const {
#pragma GCC ivdep
    for (std::int64_t i = begin; i < end; ++i) element(i, to, i);
  }

  [[gnu::always_inline]] void fetch_ahead(std::int64_t i) const {
    constexpr std::int64_t kBytes = kFusedBlock * static_cast<std::int64_t>(sizeof(T));
    const auto from = [](const auto* at) { return reinterpret_cast<const std::byte*>(at); };
    for (int k = 0; k < kWorkers && (kReduces<R> || kDirection == Direction::own); ++k)
      fetch(from(g[k] + i + kAhead), kFusedBlock * static_cast<std::int64_t>(sizeof(E)));
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
  alignas(kLineBytes) E block[kWorkers][kFusedBlock];
  E* blocks[kWorkers];
  for (int k = 0; k < kWorkers; ++k) blocks[k] = block[k];
  const std::int64_t end = count - count % kFusedBlock;
  for (std::int64_t i = 0; i < end; i += kFusedBlock) {
    loop.fetch_ahead(i);
#pragma GCC ivdep
    for (std::int64_t j = 0; j < kFusedBlock; ++j) loop.element(i + j, blocks, j);
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

// The choice among loops, beside the family and the type of weights and gradients.
struct FusedChoice {
  unsigned member;
  int workers;
  Direction direction;
  bool scaled;
};

template <class R, class E, int kWorkers>
FusedFn<float> displaced_as(const FusedChoice& choice) {
  if (choice.direction == Direction::none) return &fused<R, E, kWorkers, Direction::none, false>;
  if (choice.direction != Direction::own) return nullptr;
  if (!choice.scaled) return &fused<R, E, kWorkers, Direction::own, false>;
  if constexpr (kHasFactor<R, float>) return &fused<R, E, kWorkers, Direction::own, true>;
  return nullptr;
}

template <class R, class E>
FusedFn<float> for_workers(const FusedChoice& choice) {
  switch (choice.workers) {
    case 1:
      return displaced_as<R, E, 1>(choice);
    case 2:
      return displaced_as<R, E, 2>(choice);
    case 4:
      return displaced_as<R, E, 4>(choice);
    default:
      return nullptr;
  }
}

template <class F, class E, unsigned... kMember>
FusedFn<float> of_member(const FusedChoice& choice, std::integer_sequence<unsigned, kMember...>) {
  FusedFn<float> found = nullptr;
  ((choice.member == kMember
        ? void(found = for_workers<typename F::template Member<float, kMember>, E>(choice))
        : void()),
   ...);
  return found;
}

// Rules whose last pass, often the only one, is worth a loop.
using WithLoops = Families<SgdFamily, AdamFamily, LarsFamily, LambFamily, LansFamily>;

template <class E, class... F>
FusedFn<float> of_family(std::string_view name, const FusedChoice& choice, Families<F...>) {
  FusedFn<float> found = nullptr;
  ((name == F::kName
        ? void(found = of_member<F, E>(choice, std::make_integer_sequence<unsigned, F::kMembers>{}))
        : void()),
   ...);
  return found;
}

// One file for each type, because they take long to compile.
FusedFn<float> fused_f32(std::string_view family, const FusedChoice& choice);
FusedFn<float> fused_bf16(std::string_view family, const FusedChoice& choice);

}  // namespace xc
