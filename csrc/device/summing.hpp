#pragma once

#include <cstdint>

#include "device/bodies.hpp"
#include "rules/rule.hpp"
#include "stages/lanes.hpp"

namespace xc {

// A SUMMING body writes, in each of its rounds, kSums terms for every element of a cell, and the launcher
// adds them up, lane by lane in the order of the tile loops.

// Where a thread leaves the terms of one sum.
XC_HOST_DEVICE double* terms_of(double* terms, int sum, int element) {
  return terms + sum * kCellElements + element;
}

struct MeanSquaresBody {
  static constexpr int kPack = kMasterPack, kSums = 1;
  XC_HOST_DEVICE static int rounds(const Launch&) { return 1; }

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread, int, double* terms) const {
    const std::int64_t place = cell.begin - at.shard.begin + thread * kPack;
    const auto mean = load<Pack<float, kPack>>(at.shard.mean + place);
    XC_UNROLL
    for (int e = 0; e < kPack; ++e) *terms_of(terms, 0, thread * kPack + e) = product(mean.at[e], mean.at[e]);
  }
};

// The same of gradients that are reduced for nothing else.
template <class E, int kWorkers>
struct GradientSquaresBody {
  static constexpr int kPack = kPackOf<E>, kSums = 1;
  XC_HOST_DEVICE static int rounds(const Launch&) { return 1; }

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread, int, double* terms) const {
    const DeviceRun& run = at.runs[cell.run];
    Pack<float, kPack> mean =
        Gradients<E, kWorkers>(at.workers, byte_of<E>(run, cell.begin + thread * kPack)).sum();
    scale(mean, run.scale);
    XC_UNROLL
    for (int e = 0; e < kPack; ++e) *terms_of(terms, 0, thread * kPack + e) = product(mean.at[e], mean.at[e]);
  }
};

// Of every worker's gradient, in a round of its own.
template <class E>
struct WorkerSquaresBody {
  static constexpr int kPack = kPackOf<E>, kSums = 1;
  XC_HOST_DEVICE static int rounds(const Launch& at) { return at.workers.source_count; }

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread, int round,
                                 double* terms) const {
    const DeviceRun& run = at.runs[cell.run];
    const std::int64_t byte = byte_of<E>(run, cell.begin + thread * kPack);
    const auto gradient = load<Pack<E, kPack>>(at.workers.sources[round] + byte);
    XC_UNROLL
    for (int e = 0; e < kPack; ++e) {
      const float value = widen(gradient.at[e]) * run.own;
      *terms_of(terms, 0, thread * kPack + e) = product(value, value);
    }
  }
};

// The same of clipped gradients with the decay of the weights.
template <class E>
struct OwnSquaresBody {
  static constexpr int kPack = kPackOf<E>, kSums = 1;
  XC_HOST_DEVICE static int rounds(const Launch& at) { return at.workers.source_count; }

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread, int round,
                                 double* terms) const {
    const DeviceRun& run = at.runs[cell.run];
    const std::int64_t first = cell.begin + thread * kPack;
    const auto gradient = load<Pack<E, kPack>>(at.workers.sources[round] + byte_of<E>(run, first));
    const auto w = load<Pack<float, kPack>>(at.shard.w + (first - at.shard.begin));
    const float own = run.own * run.clip;
    XC_UNROLL
    for (int e = 0; e < kPack; ++e) {
      float value = widen(gradient.at[e]) * own;
      if (run.decay != 0.0f) value = value + run.decay * w.at[e];
      *terms_of(terms, 0, thread * kPack + e) = thread * kPack + e < cell.live ? product(value, value) : 0.0;
    }
  }
};

// Padding has no terms, and its state stays.
template <class R, int kMeasure>
struct MeasureBody {
  static constexpr int kPack = kMasterPack, kSums = R::kSums[kMeasure];
  XC_HOST_DEVICE static int rounds(const Launch&) { return 1; }

  XC_HOST_DEVICE void operator()(const Launch& at, const Cell& cell, int thread, int, double* terms) const {
    const std::int64_t place = cell.begin - at.shard.begin + thread * kPack;
    Masters<R, kPack> masters(at.shard, place);
    const auto mean = load<Pack<float, kPack>>(at.shard.mean + place);
    const R rule = rule_of<R>(at.runs[cell.run]);
    XC_UNROLL
    for (int e = 0; e < kPack; ++e) {
      const int element = thread * kPack + e;
      double term[kSums] = {};
      if (element < cell.live)
        with_slots<R>(masters.w, masters.slots, e, [&](float& w, auto&... s) {
          rule.template measure<kMeasure>(mean.at[e], term, w, s...);
        });
      for (int q = 0; q < kSums; ++q) *terms_of(terms, q, element) = term[q];
    }
    if constexpr (R::kMeasuresTouchState) masters.store_slots(at.shard, place);
  }
};

// Where the launcher leaves a sum of cell number c.
XC_HOST_DEVICE double& sum_at(const Launch& at, int sum, std::int64_t c) {
  return at.sums[sum * at.sum_stride + (at.places ? at.places[c] : c)];
}

// One lane of one sum over a cell, in the order of the tile loops.
XC_HOST_DEVICE double lane_of(const double* terms, int sum, int lane, int count) {
  double total = 0.0;
  for (int j = lane; j < count; j += kLanes) total += *(terms + sum * kCellElements + j);
  return total;
}

}  // namespace xc
