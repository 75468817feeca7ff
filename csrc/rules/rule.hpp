#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>

namespace xc {

// A RULE is the arithmetic of one update of one element: a small value type over float or double that knows
// no element type, no loop and no device. It is constructed once per step from hyper-parameters (in double,
// so that 1 - beta and the bias corrections are right to the last bit of T) and the number of updates its
// layer has had.
//
// A FAMILY lists what users may set and enumerates its members: one rule type per combination of flags, so
// that no flag is asked in the inner loop.

// A rule that needs norms of whole layers also MEASURES: passes before the one that applies it, which may
// bring the slots up to date and name for each element up to kMaxSums quantities. Their squares are summed
// over the layer, all ranks learn the sums, and settle() turns them into scalars of that layer.

struct Parameter {
  std::string_view name;
  double preset;
};

// One group's hyper-parameters in the order of the family's list.
using Hyper = std::span<const double>;

inline constexpr int kMaxSlots = 2;
inline constexpr int kMaxMeasures = 2;
inline constexpr int kMaxSums = 3;
inline constexpr int kMaxScalarBytes = 128;

template <class R, class T>
concept Rule = std::constructible_from<R, Hyper, std::int64_t> && sizeof(R) <= kMaxScalarBytes &&
               R::kSlots <= kMaxSlots && (requires(const R rule, T g, T& w) { rule(g, w); } ||
                                          requires(const R rule, T g, T& w, T& s) { rule(g, w, s); } ||
                                          requires(const R rule, T g, T& w, T& s, T& u) { rule(g, w, s, u); });

template <class R>
concept Measuring = requires(R rule, const double* squares) {
  R::kMeasures;
  R::kSums;                // of quantities, for each measure
  R::kMeasuresTouchState;  // whether a measure changes slots
  R::kNeedsGradient;       // whether the last pass looks at the gradient
  rule.settle(0, squares);
};

template <class F>
concept Family = requires(unsigned flags, Hyper hyper) {
  { F::kName } -> std::convertible_to<std::string_view>;
  std::span<const Parameter>(F::kParameters);
  std::span<const std::string_view>(F::kFlags);
  std::span<const std::string_view>(F::kSlotNames);
  { F::kExtrapolates } -> std::convertible_to<bool>;  // by raw gradients
  { F::kMembers } -> std::convertible_to<unsigned>;
  { F::member(flags, hyper) } -> std::same_as<unsigned>;
};

}  // namespace xc
