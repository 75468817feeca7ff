#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/host_device.hpp"
#include "device/views.hpp"
#include "rules/extrapolation.hpp"
#include "rules/noise.hpp"
#include "rules/rule.hpp"
#include "stages/tree.hpp"

namespace xc {

// What one thread does, as functions that any compiler takes: a launcher lets a device's threads call them,
// or a loop on the host. The arithmetic is that of the rules and extrapolations, in the order of the tile
// loops, so the bits are the same.
//
// A BODY has kPack, how many neighbouring elements a thread works on, and is called for each thread that has
// some.

#ifdef __CUDA_ARCH__
#define XC_UNROLL _Pragma("unroll")
#else
#define XC_UNROLL
#endif

inline constexpr int kSixteenBytes = 16;

template <class V, int kCount>
struct alignas(kSixteenBytes) Pack {
  V at[kCount];
};

template <class E>
inline constexpr int kPackOf = kSixteenBytes / static_cast<int>(sizeof(E));

inline constexpr int kMasterPack = kPackOf<float>;

template <class P>
XC_HOST_DEVICE P load(const void* from) {
  return *static_cast<const P*>(from);
}

template <class P>
XC_HOST_DEVICE void store(void* to, const P& pack) {
  *static_cast<P*>(to) = pack;
}

template <class E>
XC_HOST_DEVICE std::int64_t byte_of(const DeviceRun& run, std::int64_t element) {
  return run.first_byte + element * static_cast<std::int64_t>(sizeof(E));
}

// ---- the sum of the workers' gradients ----

template <int kFirst, int kCount, class E, int kPack>
XC_HOST_DEVICE float tree(const Pack<E, kPack>* packs, int e) {
  if constexpr (kCount == 1) {
    return widen(packs[kFirst].at[e]);
  } else {
    constexpr int kLeft = left_part(kCount);
    return tree<kFirst, kLeft>(packs, e) + tree<kFirst + kLeft, kCount - kLeft>(packs, e);
  }
}

// Gradients that stay in registers after they were summed.
template <class E, int kWorkers>
struct Gradients {
  Pack<E, kPackOf<E>> packs[kWorkers];

  XC_HOST_DEVICE Gradients(const DeviceWorkers& workers, std::int64_t byte) {
    XC_UNROLL
    for (int k = 0; k < kWorkers; ++k) packs[k] = load<Pack<E, kPackOf<E>>>(workers.sources[k] + byte);
  }
  XC_HOST_DEVICE Pack<float, kPackOf<E>> sum() const {
    Pack<float, kPackOf<E>> sum;
    XC_UNROLL
    for (int e = 0; e < kPackOf<E>; ++e) sum.at[e] = tree<0, kWorkers>(packs, e);
    return sum;
  }
  XC_HOST_DEVICE Pack<E, kPackOf<E>> own(const DeviceWorkers&, int k, std::int64_t) const { return packs[k]; }
};

// Any number of them: sums of 1, 2, 4, ... neighbours wait until their right neighbour is complete. They are
// read again where they displace.
template <class E>
struct Gradients<E, 0> {
  static constexpr int kLevels = 16;  // 2^15 workers
  Pack<float, kPackOf<E>> total;

  XC_HOST_DEVICE Gradients(const DeviceWorkers& workers, std::int64_t byte) {
    Pack<float, kPackOf<E>> waiting[kLevels];
    int depth = 0;
    for (int k = 0; k < workers.source_count; ++k) {
      const auto pack = load<Pack<E, kPackOf<E>>>(workers.sources[k] + byte);
      for (int e = 0; e < kPackOf<E>; ++e) total.at[e] = widen(pack.at[e]);
      for (int pairs = k + 1; pairs % 2 == 0; pairs /= 2) add_to_left(waiting[--depth]);
      waiting[depth++] = total;
    }
    total = waiting[--depth];
    while (depth > 0) add_to_left(waiting[--depth]);
  }
  XC_HOST_DEVICE void add_to_left(const Pack<float, kPackOf<E>>& left) {
    for (int e = 0; e < kPackOf<E>; ++e) total.at[e] = left.at[e] + total.at[e];
  }
  XC_HOST_DEVICE Pack<float, kPackOf<E>> sum() const { return total; }
  XC_HOST_DEVICE Pack<E, kPackOf<E>> own(const DeviceWorkers& workers, int k, std::int64_t byte) const {
    return load<Pack<E, kPackOf<E>>>(workers.own[k] + byte);
  }
};

template <int kPack>
XC_HOST_DEVICE void scale(Pack<float, kPack>& pack, float by) {
  XC_UNROLL
  for (int e = 0; e < kPack; ++e) pack.at[e] = pack.at[e] * by;
}

// ---- the rule ----

// Calls visit(w, slots...) for element e.
template <class R, int kPack, class Visit>
XC_HOST_DEVICE void with_slots(Pack<float, kPack>& w, Pack<float, kPack> (&s)[kMaxSlots], int e,
                               Visit visit) {
  static_assert(kMaxSlots == 3);
  if constexpr (R::kSlots == 0) visit(w.at[e]);
  if constexpr (R::kSlots == 1) visit(w.at[e], s[0].at[e]);
  if constexpr (R::kSlots == 2) visit(w.at[e], s[0].at[e], s[1].at[e]);
  if constexpr (R::kSlots == 3) visit(w.at[e], s[0].at[e], s[1].at[e], s[2].at[e]);
}

template <class R, class... S>
XC_HOST_DEVICE float factor_of(const R& rule, S... s) {
  if constexpr (requires { rule.factor(s...); })
    return rule.factor(s...);
  else
    return 1.0f;
}

// The master weights and the state of a thread's elements.
template <class R, int kPack>
struct Masters {
  Pack<float, kPack> w;
  Pack<float, kPack> slots[kMaxSlots];

  XC_HOST_DEVICE Masters(const DeviceShard& shard, std::int64_t place) {
    w = load<Pack<float, kPack>>(shard.w + place);
    XC_UNROLL
    for (int s = 0; s < R::kSlots; ++s) slots[s] = load<Pack<float, kPack>>(shard.slots[s] + place);
  }
  XC_HOST_DEVICE void store_slots(const DeviceShard& shard, std::int64_t place) const {
    XC_UNROLL
    for (int s = 0; s < R::kSlots; ++s) store(shard.slots[s] + place, slots[s]);
  }
  XC_HOST_DEVICE void apply(const R& rule, const Pack<float, kPack>& mean) {
    XC_UNROLL
    for (int e = 0; e < kPack; ++e)
      with_slots<R>(w, slots, e, [&](float& weight, auto&... s) { rule(mean.at[e], weight, s...); });
  }
  XC_HOST_DEVICE Pack<float, kPack> factor(const R& rule) {
    Pack<float, kPack> factor{};
    XC_UNROLL
    for (int e = 0; e < kPack; ++e)
      with_slots<R>(w, slots, e,
                    [&](float& weight, auto&... s) { factor.at[e] = factor_of(rule, weight, s...); });
    return factor;
  }
};

template <class R>
XC_HOST_DEVICE const R& rule_of(const DeviceRun& run) {
  return *reinterpret_cast<const R*>(run.scalars);
}

// ---- publication ----

template <class K, int kPack>
XC_HOST_DEVICE void make_noise(const NoiseKey& key, std::int64_t first, Pack<float, kPack>& noise) {
  XC_UNROLL
  for (int e = 0; e < kPack; e += kNoiseLanes) {
    const Numbers numbers =
        K::numbers(noise_words(key, static_cast<std::uint64_t>((first + e) / kNoiseLanes)));
    noise.at[e] = numbers.at0;
    noise.at[e + 1] = numbers.at1;
    noise.at[e + 2] = numbers.at2;
    noise.at[e + 3] = numbers.at3;
  }
}

// What displaces worker k beside its own gradient.
template <int kPack>
XC_HOST_DEVICE Pack<float, kPack> shared_direction(const DeviceRun& run, std::uint32_t worker,
                                                   std::int64_t first, const Pack<float, kPack>& mean) {
  if (run.random < 0) return mean;
  NoiseKey key = run.noise;
  key.worker = worker;
  Pack<float, kPack> noise;
  if (run.random == static_cast<std::int32_t>(Noise::gaussian))
    make_noise<GaussianNoise>(key, first, noise);
  else
    make_noise<UniformNoise>(key, first, noise);
  return noise;
}

// What a publication goes by: pieces that a direction does not look at may be anything.
template <class E>
struct Displaced {
  Pack<float, kPackOf<E>> w{}, mean{}, factor{};

  template <Direction kDirection>
  XC_HOST_DEVICE Pack<E, kPackOf<E>> along(const DeviceRun& run, const Pack<E, kPackOf<E>>& own,
                                           const Pack<float, kPackOf<E>>& shared) const {
    Pack<E, kPackOf<E>> x;
    XC_UNROLL
    for (int e = 0; e < kPackOf<E>; ++e) {
      const float d = displacement<kDirection>(run.own_rate, widen(own.at[e]), run.shared_rate, shared.at[e]);
      x.at[e] = narrow<E>(run.scaled ? w.at[e] - d * factor.at[e] : w.at[e] - d);
    }
    return x;
  }

  XC_HOST_DEVICE Pack<E, kPackOf<E>> as_they_are() const {
    Pack<E, kPackOf<E>> x;
    XC_UNROLL
    for (int e = 0; e < kPackOf<E>; ++e) x.at[e] = narrow<E>(w.at[e]);
    return x;
  }

  // Stores every worker's next weights. Only a direction by own gradients asks `gradients` for them.
  template <class G>
  XC_HOST_DEVICE void publish(const DeviceRun& run, const DeviceWorkers& workers, std::int64_t first,
                              std::int64_t byte, const G& gradients) const {
    const int count = G::kCount > 0 ? G::kCount : workers.target_count;
    XC_UNROLL
    for (int k = 0; k < count; ++k)
      store(workers.targets[k] + byte, next(run, workers, first, byte, gradients, k));
  }

  template <class G>
  XC_HOST_DEVICE Pack<E, kPackOf<E>> next(const DeviceRun& run, const DeviceWorkers& workers,
                                          std::int64_t first, std::int64_t byte, const G& gradients,
                                          int k) const {
    switch (run.direction) {
      case Direction::own:
        return along<Direction::own>(run, gradients.own(workers, k, byte), {});
      case Direction::shared:
        if constexpr (G::kMayBeRandom)
          return along<Direction::shared>(run, {}, shared_direction(run, workers.numbers[k], first, mean));
        else
          return along<Direction::shared>(run, {}, mean);
      case Direction::deviation:
        return along<Direction::deviation>(run, gradients.own(workers, k, byte), mean);
      default:
        return as_they_are();
    }
  }
};

// Gradients that are read when they are asked for.
template <class E>
struct GradientsInMemory {
  static constexpr int kCount = 0;
  static constexpr bool kMayBeRandom = true;
  XC_HOST_DEVICE Pack<E, kPackOf<E>> own(const DeviceWorkers& workers, int k, std::int64_t byte) const {
    return load<Pack<E, kPackOf<E>>>(workers.own[k] + byte);
  }
};

template <class E, int kWorkers>
struct GradientsInRegisters : Gradients<E, kWorkers> {
  static constexpr int kCount = kWorkers;
  static constexpr bool kMayBeRandom = false;
  using Gradients<E, kWorkers>::Gradients;
};

// ---- bodies ----

// The whole step in one pass: the gradients are read, the weights of all workers written, and nothing waits
// in memory in between. Random displacements take so many registers that they are left to a publication.
template <class E, class R, int kWorkers>
struct StepBody {
  static constexpr int kPack = kPackOf<E>;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const DeviceRun& run = at.runs[cell.run];
    const std::int64_t first = cell.begin + thread * kPack;
    const std::int64_t place = first - at.shard.begin, byte = byte_of<E>(run, first);
    const GradientsInRegisters<E, kWorkers> gradients(at.workers, byte);
    Masters<R, kPack> masters(at.shard, place);
    Displaced<E> next;
    next.mean = gradients.sum();
    scale(next.mean, run.scale);
    scale(next.mean, run.clip);
    const R rule = rule_of<R>(run);
    masters.apply(rule, next.mean);
    store(at.shard.w + place, masters.w);
    masters.store_slots(at.shard, place);
    next.w = masters.w;
    if (run.scaled) next.factor = masters.factor(rule);
    next.publish(run, at.workers, first, byte, gradients);
  }
};

template <class E, int kWorkers>
struct ReduceBody {
  static constexpr int kPack = kPackOf<E>;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const DeviceRun& run = at.runs[cell.run];
    const std::int64_t first = cell.begin + thread * kPack;
    Pack<float, kPack> mean = Gradients<E, kWorkers>(at.workers, byte_of<E>(run, first)).sum();
    scale(mean, run.scale);
    store(at.shard.mean + (first - at.shard.begin), mean);
  }
};

template <class E>
struct PublishBody {
  static constexpr int kPack = kPackOf<E>;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const DeviceRun& run = at.runs[cell.run];
    const std::int64_t first = cell.begin + thread * kPack, place = first - at.shard.begin;
    Displaced<E> next;
    next.w = load<Pack<float, kPack>>(at.shard.w + place);
    if (at.shard.mean) next.mean = load<Pack<float, kPack>>(at.shard.mean + place);
    if (run.scaled) next.factor = load<Pack<float, kPack>>(at.shard.factor + place);
    next.publish(run, at.workers, first, byte_of<E>(run, first), GradientsInMemory<E>{});
  }
};

struct TakeBody {
  static constexpr int kPack = kMasterPack;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const std::int64_t place = cell.begin - at.shard.begin + thread * kPack;
    auto mean = load<Pack<float, kPack>>(at.shard.received + place);
    scale(mean, at.runs[cell.run].scale);
    store(at.shard.mean + place, mean);
  }
};

struct ClipBody {
  static constexpr int kPack = kMasterPack;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    float* const at_mean = at.shard.mean + (cell.begin - at.shard.begin) + thread * kPack;
    auto mean = load<Pack<float, kPack>>(at_mean);
    scale(mean, at.runs[cell.run].clip);
    store(at_mean, mean);
  }
};

template <class R>
struct ApplyBody {
  static constexpr int kPack = kMasterPack;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const std::int64_t place = cell.begin - at.shard.begin + thread * kPack;
    Masters<R, kPack> masters(at.shard, place);
    Pack<float, kPack> mean{};
    if (at.shard.mean) mean = load<Pack<float, kPack>>(at.shard.mean + place);
    masters.apply(rule_of<R>(at.runs[cell.run]), mean);
    store(at.shard.w + place, masters.w);
    masters.store_slots(at.shard, place);
  }
};

template <class R>
struct FactorBody {
  static constexpr int kPack = kMasterPack;

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread) const {
    const std::int64_t place = cell.begin - at.shard.begin + thread * kPack;
    Masters<R, kPack> masters(at.shard, place);
    store(at.shard.factor + place, masters.factor(rule_of<R>(at.runs[cell.run])));
  }
};

}  // namespace xc
