#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/host_device.hpp"
#include "rules/adam.hpp"
#include "rules/lamb.hpp"
#include "rules/lars.hpp"
#include "rules/rule.hpp"
#include "rules/sgd.hpp"

namespace xc {

// VRGD (Jiang et al. 2023, arXiv:2309.13681): any rule on a gradient whose elements are multiplied by their
// gradient signal-to-noise ratio. With s the relative spread of the workers' gradients, an element's ratio is
// r = 1 / (s + eps), which is g^2 over the variance; it is divided by the mean of r in its layer and clipped
// to [floor, 1]. The small eps stands for what the paper leaves open: with no variance at all every element
// has the same ratio, and the rule is the plain one. A gradient of zero has the ratio 0.
//
// SMOOTH rules (of Adam's kind) keep an average of the clipped ratios, corrected for its start, and multiply
// by that, before either moment. A LAGGED rule takes the mean of r of the step before, which saves a pass.

// What a rule says of its measures, with the answers of one that does not measure.
template <class Base>
struct MeasuresOf {
  static constexpr int kMeasures = 0;
  static constexpr bool kTouchState = false;
  static constexpr bool kNeedsGradient = true;
  static constexpr std::array<int, 0> kSums = {};
};
template <Measuring Base>
struct MeasuresOf<Base> {
  static constexpr int kMeasures = Base::kMeasures;
  static constexpr bool kTouchState = Base::kMeasuresTouchState;
  static constexpr bool kNeedsGradient = Base::kNeedsGradient;
  static constexpr std::array kSums = Base::kSums;
};

template <bool kLagged>
struct MayLag {};
template <>
struct MayLag<true> {
  static constexpr bool kLags = true;
};

template <class T, class Base, bool kSmooth, bool kLagged>
struct VarianceReduced : MayLag<kLagged> {
  using OfBase = MeasuresOf<Base>;
  static constexpr int kSlots = Base::kSlots + (kSmooth ? 1 : 0);  // the average ratio comes first
  static constexpr Extra kExtra = Extra::spread;
  static constexpr int kMeasures = 1 + OfBase::kMeasures;
  static constexpr std::array kSums = [] {
    std::array<int, kMeasures> sums = {1};
    std::copy(OfBase::kSums.begin(), OfBase::kSums.end(), sums.begin() + 1);
    return sums;
  }();
  static constexpr bool kMeasuresTouchState = OfBase::kTouchState;
  static constexpr bool kNeedsGradient = OfBase::kNeedsGradient;

  // Finite, as the ratio of a gradient of zero is multiplied with it.
  static constexpr double kMost = static_cast<double>(std::numeric_limits<T>::max());

  // Its own hyper-parameters come after the base rule's: floor, eps and, for smooth rules, beta3.
  static constexpr std::size_t kOwn = kSmooth ? 3 : 2;

  VarianceReduced(Hyper h, std::int64_t updates)
      : base(h.first(h.size() - kOwn), updates),
        floor(T(h[h.size() - kOwn])),
        epsilon(T(h[h.size() - kOwn + 1])) {
    if constexpr (!kSmooth) return;
    keep = T(h.back());
    fresh = T(1.0 - h.back());
    unbias = T(1.0 / (1.0 - std::pow(h.back(), static_cast<double>(updates + 1))));
  }

  XC_HOST_DEVICE T ratio(T spread) const { return T(1) / (spread + epsilon); }

  XC_HOST_DEVICE T clipped(T spread) const {
    const T r = ratio(spread) * per_mean;
    const T low = r < floor ? floor : r;
    return low > T(1) ? T(1) : low;
  }

  XC_HOST_DEVICE T smoothed(T spread, T& average) const {
    average = keep * average + fresh * clipped(spread);
    return average * unbias;
  }

  template <int kMeasure, class... S>
  XC_HOST_DEVICE void measure(T g, T spread, double* term, T& w, S&... slots) const {
    if constexpr (kMeasure == 0)
      term[0] = static_cast<double>(ratio(spread));
    else
      measure_base<kMeasure - 1>(g, spread, term, w, slots...);
  }

  template <int kMeasure, class... S>
  XC_HOST_DEVICE void measure_base(T g, T spread, double* term, T& w, S&... slots) const
    requires(!kSmooth)
  {
    base.template measure<kMeasure>(clipped(spread) * g, term, w, slots...);
  }

  template <int kMeasure, class... S>
  XC_HOST_DEVICE void measure_base(T g, T spread, double* term, T& w, T& average, S&... slots) const
    requires kSmooth
  {
    base.template measure<kMeasure>(smoothed(spread, average) * g, term, w, slots...);
  }

  void settle(int measure, const double* sums, std::int64_t elements) {
    if (measure == 0)
      per_mean = T(std::min(sums[0] > 0 ? static_cast<double>(elements) / sums[0] : 1.0, kMost));
    else if constexpr (Measuring<Base>)
      base.settle(measure - 1, sums, elements);
  }

  template <class... S>
  XC_HOST_DEVICE void operator()(T g, T spread, T& w, S&... slots) const
    requires(!kSmooth)
  {
    base(clipped(spread) * g, w, slots...);
  }

  template <class... S>
  XC_HOST_DEVICE void operator()(T g, T spread, T& w, T& average, S&... slots) const
    requires kSmooth
  {
    if constexpr (kNeedsGradient) g = smoothed(spread, average) * g;
    base(g, w, slots...);
  }

  template <class... S>
  XC_HOST_DEVICE T factor(T w, S... slots) const
    requires(!kSmooth && requires(const Base rule) { rule.factor(w, slots...); })
  {
    return base.factor(w, slots...);
  }

  template <class... S>
  XC_HOST_DEVICE T factor(T w, T, S... slots) const
    requires(kSmooth && requires(const Base rule) { rule.factor(w, slots...); })
  {
    return base.factor(w, slots...);
  }

  Base base;
  T floor, epsilon, per_mean = T(1), keep = T(0), fresh = T(1), unbias = T(1);
};

template <class E, std::size_t N, std::size_t M>
constexpr std::array<E, N + M> joined(const std::array<E, N>& a, const std::array<E, M>& b) {
  std::array<E, N + M> all{};
  std::copy(b.begin(), b.end(), std::copy(a.begin(), a.end(), all.begin()));
  return all;
}

inline constexpr std::array kRatioParameters = {Parameter{"gsnr_floor", 0.1}, Parameter{"gsnr_eps", 1e-8}};
inline constexpr std::array kSmoothRatioParameters =
    joined(kRatioParameters, std::array{Parameter{"beta3", 0.9}});

template <class F, bool kSmooth>
struct VarianceReducedFamily {
  static constexpr auto kParameters = [] {
    if constexpr (kSmooth)
      return joined(F::kParameters, kSmoothRatioParameters);
    else
      return joined(F::kParameters, kRatioParameters);
  }();
  static constexpr auto kFlags = joined(F::kFlags, std::array<std::string_view, 1>{"lagged_mean"});
  static constexpr auto kSlotNames = [] {
    if constexpr (kSmooth)
      return joined(std::array<std::string_view, 1>{"gsnr_avg"}, F::kSlotNames);
    else
      return F::kSlotNames;
  }();

  // The lowest bit says that the mean lags.
  static constexpr unsigned kMembers = 2 * F::kMembers;
  static unsigned member(unsigned flags, Hyper h) {
    const unsigned lagged = flags >> F::kFlags.size();
    return F::member(flags & ((1u << F::kFlags.size()) - 1), h) * 2 + lagged;
  }

  template <class T, unsigned kMember>
  using Member = VarianceReduced<T, typename F::template Member<T, kMember / 2>, kSmooth, (kMember & 1) != 0>;
};

struct VrSgdFamily : VarianceReducedFamily<SgdFamily, false> {
  static constexpr std::string_view kName = "vrsgd";
};
struct VrAdamFamily : VarianceReducedFamily<PlainAdamFamily, true> {
  static constexpr std::string_view kName = "vradam";
};
struct VrLarsFamily : VarianceReducedFamily<LarsFamily, false> {
  static constexpr std::string_view kName = "vrlars";
};
struct VrLambFamily : VarianceReducedFamily<LambFamily, true> {
  static constexpr std::string_view kName = "vrlamb";
};

}  // namespace xc
