#pragma once

#include <array>
#include <cmath>

#include "core/host_device.hpp"
#include "rules/projection.hpp"
#include "rules/rule.hpp"

namespace xc {

// AdamP (Heo et al. 2021, arXiv:2006.08217, Algorithm 2): Adam whose direction is projected where weights are
// scale-invariant, with decoupled decay, of which such weights take the part wd_ratio.
template <class T, bool kNesterov>
struct AdamPRule {
  static constexpr int kSlots = 2;
  static constexpr Extra kExtra = Extra::projection;
  static constexpr int kMeasures = 1;
  static constexpr std::array<int, 1> kSums = {Projection::kTerms};
  static constexpr bool kMeasuresTouchState = true;
  static constexpr bool kNeedsGradient = kNesterov;

  AdamPRule(Hyper h, std::int64_t updates)
      : beta1(T(h[1])),
        beta2(T(h[2])),
        fresh1(T(1.0 - h[1])),
        fresh2(T(1.0 - h[2])),
        epsilon(T(h[3])),
        decay(h[0] * h[4]),
        ratio(h[6]),
        projection(h[5], h[3]) {
    const double t = static_cast<double>(updates + 1);
    rate = T(h[0] / (1.0 - std::pow(h[1], t)));
    unbias2 = T(1.0 / std::sqrt(1.0 - std::pow(h[2], t)));
  }

  XC_HOST_DEVICE T scale(T square) const { return std::sqrt(square) * unbias2 + epsilon; }

  XC_HOST_DEVICE T direction(T g, T mean, T square) const {
    if constexpr (kNesterov) return (beta1 * mean + fresh1 * g) / scale(square);
    return mean / scale(square);
  }

  template <int>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T& mean, T& square) const {
    mean = beta1 * mean + fresh1 * g;
    square = beta2 * square + (fresh2 * g) * g;
    Projection::terms(g, w, direction(g, mean, square), term);
  }

  void project(std::span<const TermSums> filters, std::int64_t length, std::span<double> coefficients) {
    const bool projected = projection.settle(filters, length, coefficients);
    shrink = T(1.0 - decay * (projected ? ratio : 1.0));
  }

  XC_HOST_DEVICE void operator()(T g, T along, T& w, T& mean, T& square) const {
    const T p = direction(g, mean, square) - along * w;
    w = w * shrink - rate * p;
  }

  XC_HOST_DEVICE T factor(T, T, T square) const { return T(1) / scale(square); }

  T beta1, beta2, fresh1, fresh2, epsilon, rate, unbias2, shrink = T(1);
  double decay, ratio;
  Projection projection;
};

struct AdamPFamily {
  static constexpr std::string_view kName = "adamp";
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3},          Parameter{"beta1", 0.9},
                                             Parameter{"beta2", 0.999},      Parameter{"eps", 1e-8},
                                             Parameter{"weight_decay", 0.0}, Parameter{"delta", 0.1},
                                             Parameter{"wd_ratio", 0.1}};
  static constexpr std::array<std::string_view, 1> kFlags = {"nesterov"};
  static constexpr std::array<std::string_view, 2> kSlotNames = {"exp_avg", "exp_avg_sq"};

  static constexpr unsigned kMembers = 2;
  static unsigned member(unsigned flags, Hyper) { return flags; }

  template <class T, unsigned kMember>
  using Member = AdamPRule<T, (kMember & 1) != 0>;
};

}  // namespace xc
