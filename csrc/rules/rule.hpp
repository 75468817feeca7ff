#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

#include "core/host_device.hpp"

namespace xc {

// A RULE is the arithmetic of one update of one element: a small value type over float or double that knows
// no element type, no loop and no device. It is constructed once per step from hyper-parameters (in double,
// so that 1 - beta and the bias corrections are right to the last bit of T) and the number of updates its
// layer has had.
//
// A FAMILY lists what users may set and enumerates its members: one rule type per combination of flags, so
// that no flag is asked in the inner loop.

// A rule that needs norms of whole layers also MEASURES: passes before the one that applies it, which may
// bring the slots up to date and name for each element up to kMaxSums terms, in double. They are summed over
// the layer, all ranks learn the sums, and settle() turns them, and the layer's number of elements, into
// scalars of that layer.
//
// A rule may ask for an EXTRA number per element beside the mean gradient: the relative spread of the
// workers' gradients, mean_k (g_k - g)^2 / g^2; or the coefficient of the projection of its filter. It comes
// right after the gradient among the arguments.

// A rule that PROJECTS measures filters: its terms are summed over each, all ranks learn the sums, and
// project() turns those of a layer into a coefficient for each of its filters and into scalars of the layer.
//
// A rule whose steps are not in the gradient's own units has a FACTOR: what a gradient must be multiplied
// with, after the update of its element, to displace weights in the units of the rule's own step.

struct Parameter {
  std::string_view name;
  double preset;
};

// One group's hyper-parameters in the order of the family's list.
using Hyper = std::span<const double>;

inline constexpr int kMaxSlots = 3;
inline constexpr int kMaxMeasures = 2;
inline constexpr int kMaxSums = 4;
inline constexpr int kMaxScalarBytes = 192;

enum class Extra { none, spread, projection };

template <class R>
constexpr Extra extra_of() {
  if constexpr (requires { R::kExtra; })
    return R::kExtra;
  else
    return Extra::none;
}

// A term of a sum: the product of two numbers, exact for two floats and beyond the range of their squares.
template <class T>
XC_HOST_DEVICE double product(T a, T b) {
  return static_cast<double>(a) * static_cast<double>(b);
}

template <class R, class T>
concept Rule = std::constructible_from<R, Hyper, std::int64_t> && sizeof(R) <= kMaxScalarBytes &&
               R::kSlots <= kMaxSlots && std::is_trivially_copyable_v<R> && std::floating_point<T>;

// A trust ratio that is held to `most`; NaN stays NaN.
inline constexpr double kUnbounded = std::numeric_limits<double>::infinity();
inline double bounded(double ratio, double most) { return ratio > most ? most : ratio; }

// What a rule measured in one filter or layer, sum by sum.
using TermSums = std::array<double, kMaxSums>;

// project() gets the sums of all filters of a layer (none where there is but one dimension) and how many
// elements each has; the coefficients that it writes are the extra numbers of the last pass.
template <class R>
concept Projecting = extra_of<R>() == Extra::projection && R::kMeasures == 1 &&
                     requires(R rule, std::span<const TermSums> filters, std::span<double> coefficients) {
                       rule.project(filters, std::int64_t{}, coefficients);
                     };

template <class R>
concept Measuring = requires {
  R::kMeasures;
  R::kSums;                // how many, for each measure
  R::kMeasuresTouchState;  // whether a measure changes slots
  R::kNeedsGradient;       // whether the last pass looks at the gradient
} && (Projecting<R> || requires(R rule, const double* sums, std::int64_t elements) {
                      rule.settle(0, sums, elements);
                    });

// Whether a rule's first measure is beside the norms of each worker's own gradient, decayed by own_decay();
// settle() gets their mean as the last sum.
template <class R>
concept MeasuringWorkers = Measuring<R> && requires(const R rule) { rule.own_decay(); };

// Whether the sums of a rule's only measure change its group's hyper-parameters, which the caller then gives.
template <class R>
concept Revising = Measuring<R> && requires { R::kRevises; };

// Whether a rule's first measure may be that of the step before, taken along in that step's last pass.
template <class R>
concept Lagging = Measuring<R> && requires { R::kLags; };

template <class F>
concept Family = requires(unsigned flags, Hyper hyper) {
  { F::kName } -> std::convertible_to<std::string_view>;
  std::span<const Parameter>(F::kParameters);
  std::span<const std::string_view>(F::kFlags);
  std::span<const std::string_view>(F::kSlotNames);
  { F::kMembers } -> std::convertible_to<unsigned>;
  { F::member(flags, hyper) } -> std::same_as<unsigned>;
};

}  // namespace xc
