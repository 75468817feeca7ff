#pragma once

#include <array>
#include <cmath>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// LANS (Zheng et al. 2020, arXiv:2006.13484): moments of each layer's normalised gradient, and a
// Nesterov-like mixture of two LAMB directions, p from the first moment and q from the gradient itself, each
// scaled by |w| over its own norm, 1 where a norm is zero.
template <class T>
struct LansRule {
  static constexpr int kSlots = 2;
  static constexpr int kMeasures = 2;
  static constexpr std::array<int, 2> kSums = {1, 3};
  static constexpr bool kMeasuresTouchState = true;
  static constexpr bool kNeedsGradient = true;

  LansRule(Hyper h, std::int64_t updates)
      : beta1(T(h[1])),
        beta2(T(h[2])),
        fresh1(T(1.0 - h[1])),
        fresh2(T(1.0 - h[2])),
        epsilon(T(h[3])),
        decay(T(h[4])),
        given{h[0], h[1], h[3]},
        adapts(h[5] != 0) {
    const double t = static_cast<double>(updates + 1);
    unbias1 = T(1.0 / (1.0 - std::pow(h[1], t)));
    unbias2 = T(1.0 / std::sqrt(1.0 - std::pow(h[2], t)));
  }

  XC_HOST_DEVICE T scale(T square) const { return std::sqrt(square) * unbias2 + epsilon; }
  XC_HOST_DEVICE T p(T w, T mean, T square) const { return (mean * unbias1) / scale(square) + decay * w; }
  XC_HOST_DEVICE T q(T g, T w, T square) const { return (g * unit) / scale(square) + decay * w; }

  template <int kMeasure>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T& mean, T& square) const {
    if constexpr (kMeasure == 0) {
      term[0] = product(g, g);
    } else {
      const T u = g * unit;
      mean = beta1 * mean + fresh1 * u;
      square = beta2 * square + (fresh2 * u) * u;
      const T along_p = p(w, mean, square), along_q = q(g, w, square);
      term[0] = product(w, w);
      term[1] = product(along_p, along_p);
      term[2] = product(along_q, along_q);
    }
  }

  void settle(int measure, const double* sums, std::int64_t) {
    if (measure == 0) {
      const double g = std::sqrt(sums[0]);
      unit = T(g > 0 ? 1.0 / (g + given.epsilon) : 1.0);
    } else {
      rate_p = T(given.lr * given.beta1 * ratio(sums[0], sums[1]));
      rate_q = T(given.lr * (1.0 - given.beta1) * ratio(sums[0], sums[2]));
      trust = T(static_cast<double>(unit) * ratio(sums[0], sums[2]));
    }
  }

  double ratio(double w, double direction) const {
    return adapts && w > 0 && direction > 0 ? std::sqrt(w) / std::sqrt(direction) : 1.0;
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& mean, T& square) const {
    w = w - (rate_p * p(w, mean, square) + rate_q * q(g, w, square));
  }

  XC_HOST_DEVICE T factor(T, T, T square) const { return trust / scale(square); }

  T beta1, beta2, fresh1, fresh2, epsilon, decay, unbias1, unbias2;
  T unit = T(1), rate_p = T(0), rate_q = T(0), trust = T(1);
  struct {
    double lr, beta1, epsilon;
  } given;
  bool adapts;
};

struct LansFamily {
  static constexpr std::string_view kName = "lans";
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3},           Parameter{"beta1", 0.9},
                                             Parameter{"beta2", 0.999},       Parameter{"eps", 1e-6},
                                             Parameter{"weight_decay", 0.01}, Parameter{"adapt", 1.0}};
  static constexpr std::array<std::string_view, 0> kFlags = {};
  static constexpr std::array<std::string_view, 2> kSlotNames = {"exp_avg", "exp_avg_sq"};

  static constexpr unsigned kMembers = 1;
  static unsigned member(unsigned, Hyper) { return 0; }

  template <class T, unsigned>
  using Member = LansRule<T>;
};

}  // namespace xc
