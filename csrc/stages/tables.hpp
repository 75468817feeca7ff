#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "core/dtype.hpp"
#include "core/streaming.hpp"
#include "rules/extrapolation.hpp"
#include "rules/noise.hpp"
#include "rules/rule.hpp"
#include "stages/lanes.hpp"

namespace xc {

// The CPU kernels, each a small loop over one tile, looked up once when a plan is made. Reduce and publish
// know the element type, apply knows the rule; so the number of kernels is a sum and not a product. T is the
// master type.

// mean[i] = scale * (tree sum over the sources of their i-th element), i < count. The tree pairs neighbours
// bottom-up and carries the odd one. `scratch` holds reduce_scratch_tiles(sources) tiles of `count`.
template <class T>
using ReduceFn = void (*)(const std::byte* const* sources, int source_count, std::int64_t first_byte,
                          std::int64_t count, T scale, T* mean, T* scratch);

// spread[i] = the mean over the sources of ((own * source[i] - mean[i]) / mean[i])^2, infinite where the mean
// is zero: how far the workers' gradients lie apart. It has no unit, so whatever scales all of them cancels.
template <class T>
using SpreadFn = void (*)(const std::byte* const* sources, int source_count, std::int64_t first_byte,
                          std::int64_t count, T own, const T* mean, T* spread);

// What an update sees of a tile. `extra` is what the rule asks for beside the mean gradient.
template <class T>
struct Elements {
  const T* mean;
  const T* extra;
  T* w;
  T* const* slots;
};

// Updates w and the slots in place.
template <class T>
using ApplyFn = void (*)(const void* scalars, const Elements<T>& at, std::int64_t count);

// factor[i] = what a gradient is multiplied with to displace element i in the units of the rule's steps.
template <class T>
using FactorFn = void (*)(const void* scalars, const Elements<T>& at, T* factor, std::int64_t count);

// By what one worker's weights are displaced: its own gradient, a direction that all share or that was made
// for it, and the rates of both; `factor` is null where the gradients' own units are meant.
template <class T>
struct Displacement {
  const std::byte* own;
  const T* shared;
  const T* factor;
  T own_rate;
  T shared_rate;
};

// x = narrow(displaced w) for one worker.
template <class T>
using PublishFn = void (*)(const T* w, const Displacement<T>& by, std::byte* x, std::int64_t count);

// Two arrays that the next tile will read, and how many bytes each has for a block of kStreamBlock elements;
// and how the weights are stored meanwhile.
inline constexpr std::int64_t kStreamBlock = 64;
struct Ahead {
  const std::byte* at[2] = {};
  std::int64_t block_bytes[2] = {};
  StoreWidth store = StoreWidth::bytes16;
};

// Squares to add up while weights are streamed, which hides them behind the stores: of the worker's own
// gradient, times `own`, and of the mean gradient, each into the lanes of a sum if there are any.
template <class T>
struct Observed {
  double* own_lanes = nullptr;
  double* mean_lanes = nullptr;
  const T* mean = nullptr;
  T own = T(1);
  std::int64_t first = 0;  // flat
};

// The same past the cache: x is written by non-temporal stores, so its lines are not read first, and
// meanwhile what lies ahead is fetched.
template <class T>
using StreamFn = void (*)(const T* w, const Displacement<T>& by, std::byte* x, std::int64_t count,
                          const Ahead& ahead, const Observed<T>& observed);

// A whole step of some elements in one loop, for the commonest steps: what the stages do to a tile.
template <class T>
struct FusedStep {
  const std::byte* const* sources;  // the workers' gradients, which displace their weights, too
  std::byte* const* targets;
  std::int64_t first_byte;
  std::int64_t count;
  T* w;
  T* const* slots;
  const void* scalars;
  T scale;
  T clip;  // times the mean gradient; 1 changes no bit
  T own_rate;
  StoreWidth store;  // none: weights stay in the caches
};
template <class T>
using FusedFn = void (*)(const FusedStep<T>& step);

// Displaces x in place: extrapolation as a pass of its own, which only the unfused comparison takes.
template <class T>
using DisplaceFn = void (*)(const Displacement<T>& by, std::byte* x, std::int64_t count);

// Arrays that the next tile will read; `at` is where they go on after the elements in hand.
struct Upcoming {
  static constexpr int kMost = 12;
  const std::byte* at[kMost] = {};
  std::int64_t element_size[kMost] = {};
  int count = 0;
};

// Adds the squares of `count` values to a sum's lanes.
template <class T>
void add_squares(const T* values, std::int64_t first, std::int64_t count, double* lanes,
                 const Upcoming& next = {});

// Adds the squares of own * gradient + decay * w, or without a decay of own * gradient.
template <class T>
using OwnSquaresFn = void (*)(const std::byte* gradient, T own, T decay, const T* w, std::int64_t first,
                              std::int64_t count, double* lanes);

// Adds the squares of the mean gradient, which is the tree of the sources times `scale`, and of every source
// times `own`, to the lanes of a sum each; element `first` is the first.
template <class T>
using ObserveFn = void (*)(const std::byte* const* sources, std::int64_t first_byte, std::int64_t first,
                           std::int64_t count, T scale, T own, double* mean_lanes, double* own_lanes);

// noise[i] is the random number of flat element first + i, whatever run it is part of.
template <class T>
void make_noise(Noise kind, const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise);

// Writes a rule's scalars for one step into kMaxScalarBytes of storage.
using PrepareFn = void (*)(Hyper hyper, std::int64_t updates, void* scalars);

// Brings the slots up to date and adds a rule's terms to the lanes of its sums, one sum after the other.
template <class T>
using MeasureFn = void (*)(const void* scalars, const Elements<T>& at, std::int64_t first, std::int64_t count,
                           double* lanes, const Upcoming& next);

// Turns a layer's sums into scalars of the rule.
using SettleFn = void (*)(void* scalars, int measure, const double* sums, std::int64_t elements);

// Turns the sums of a layer's filters, of `length` elements each, into scalars of the rule and a coefficient
// for each filter.
using ProjectFn = void (*)(void* scalars, std::span<const TermSums> filters, std::int64_t length,
                           std::span<double> coefficients);

template <class T>
struct RuleKernel {
  int slots;
  PrepareFn prepare;
  ApplyFn<T> apply;
  FactorFn<T> factor = nullptr;
  Extra extra = Extra::none;
  // What rules that measure have beside.
  int measures = 0;
  int sums[kMaxMeasures] = {};
  MeasureFn<T> measure[kMaxMeasures] = {};
  SettleFn settle = nullptr;
  ProjectFn project = nullptr;  // instead of settle
  T (*own_decay)(const void* scalars) = nullptr;
  bool revises = false;
  bool lags = false;
  bool measures_touch_state = false;
  bool needs_gradient = true;
};

// What users may know about a rule, without types.
struct FamilyInfo {
  std::string_view name;
  std::span<const Parameter> parameters;
  std::span<const std::string_view> flags;
  std::span<const std::string_view> slot_names;
  int measures;
  bool projects;
  bool has_factor;
  bool revises;
  bool compares_workers;  // element by element, so that all their gradients must lie in one place
  unsigned (*member)(unsigned flags, Hyper hyper);
};

const std::vector<FamilyInfo>& families();
int family_index(std::string_view name);  // -1 if there is none

std::string_view instruction_set();  // the one that this machine's tile loops use

int reduce_scratch_tiles(int source_count);
template <class T>
ReduceFn<T> reduce_kernel(DType element);
template <class T>
const RuleKernel<T>& rule_kernel(int family, unsigned member);
template <class T>
SpreadFn<T> spread_kernel(DType element);
template <class T>
OwnSquaresFn<T> own_squares_kernel(DType element, bool decayed);
template <class T>
PublishFn<T> publish_kernel(DType element, Direction direction, bool scaled);
template <class T>
StreamFn<T> stream_kernel(DType element, Direction direction, bool scaled);
// Returns none for steps that have no loop of their own.
template <class T>
FusedFn<T> fused_kernel(DType element, int family, unsigned member, int workers, Direction direction,
                        bool scaled);
template <class T>
DisplaceFn<T> displace_kernel(DType element, Direction direction);
// Returns none for numbers of workers and types that have no loop of their own.
template <class T>
ObserveFn<T> observe_kernel(DType element, int workers);

}  // namespace xc
