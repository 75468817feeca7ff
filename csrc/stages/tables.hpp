#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/dtype.hpp"
#include "rules/noise.hpp"
#include "rules/rule.hpp"

namespace xc {

// The CPU kernels, each a small loop over one tile, looked up once when a plan is made. Reduce and publish
// know the element type, apply knows the rule; so the number of kernels is a sum and not a product. T is the
// master type.

// mean[i] = scale * (tree sum over the sources of their i-th element), i < count. The tree pairs neighbours
// bottom-up and carries the odd one. `scratch` holds reduce_scratch_tiles(sources) tiles of `count`.
template <class T>
using ReduceFn = void (*)(const std::byte* const* sources, int source_count, std::int64_t first_byte,
                          std::int64_t count, T scale, T* mean, T* scratch);

// Updates w and the slots in place from the reduced gradient.
template <class T>
using ApplyFn = void (*)(const void* scalars, const T* mean, T* w, T* const* slots, std::int64_t count);

// x = narrow(displaced w) for one worker; `own` is that worker's gradient.
template <class T>
using PublishFn = void (*)(const T* w, T inner, const std::byte* own, const T* mean, std::byte* x,
                           std::int64_t count);

// Two arrays that the next tile will read, and how many bytes each has for a block of kStreamBlock elements.
inline constexpr std::int64_t kStreamBlock = 64;
struct Ahead {
  const std::byte* at[2] = {};
  std::int64_t block_bytes[2] = {};
};

// The same past the cache: x is written by non-temporal stores, so its lines are not read first, and
// meanwhile what lies ahead is fetched.
template <class T>
using StreamFn = void (*)(const T* w, T inner, const std::byte* own, const T* mean, std::byte* x,
                          std::int64_t count, const Ahead& ahead);

// Displaces x in place: extrapolation as a pass of its own, which only the unfused comparison takes.
template <class T>
using DisplaceFn = void (*)(T inner, const std::byte* own, const T* mean, std::byte* x, std::int64_t count);

// Adds the squares of `count` values to kSquareLanes sums; values[i] belongs to lane (first + i) %
// kSquareLanes.
inline constexpr int kSquareLanes = 16;
template <class T>
void add_squares(const T* values, std::int64_t first, std::int64_t count, double* lanes);
double sum_of_lanes(double* lanes);  // uses them up

// noise[i] is the random number of flat element first + i, whatever run it is part of.
template <class T>
void make_noise(Noise kind, const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise);

// Writes a rule's scalars for one step into kMaxScalarBytes of storage.
using PrepareFn = void (*)(Hyper hyper, std::int64_t updates, void* scalars);

// Brings the slots up to date and writes each of a rule's quantities into an array of its own.
template <class T>
using MeasureFn = void (*)(const void* scalars, const T* mean, T* w, T* const* slots, T* const* quantities,
                           std::int64_t count);

// Turns a layer's sums of squares into scalars of the rule.
using SettleFn = void (*)(void* scalars, int measure, const double* squares);

template <class T>
struct RuleKernel {
  int slots;
  PrepareFn prepare;
  ApplyFn<T> apply;
  // What rules that measure have beside.
  int measures = 0;
  int sums[kMaxMeasures] = {};
  MeasureFn<T> measure[kMaxMeasures] = {};
  SettleFn settle = nullptr;
  bool measures_touch_state = false;
  bool needs_gradient = true;
};

// What users may know about a rule, without types.
struct FamilyInfo {
  std::string_view name;
  std::span<const Parameter> parameters;
  std::span<const std::string_view> flags;
  std::span<const std::string_view> slot_names;
  bool extrapolates;
  int measures;
  unsigned (*member)(unsigned flags, Hyper hyper);
};

const std::vector<FamilyInfo>& families();
int family_index(std::string_view name);         // -1 if there is none
int extrapolation_index(std::string_view name);  // -1 if there is none
bool displaces_by_own(int extrapolation);        // by each worker's own gradient
bool displaces_by_mean(int extrapolation);

std::string_view instruction_set();  // the one that this machine's tile loops use

int reduce_scratch_tiles(int source_count);
template <class T>
ReduceFn<T> reduce_kernel(DType element);
template <class T>
const RuleKernel<T>& rule_kernel(int family, unsigned member);
template <class T>
PublishFn<T> publish_kernel(DType element, int extrapolation);
template <class T>
StreamFn<T> stream_kernel(DType element, int extrapolation);
template <class T>
DisplaceFn<T> displace_kernel(DType element, int extrapolation);

}  // namespace xc
