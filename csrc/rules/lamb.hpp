#pragma once

#include <array>
#include <cmath>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// LAMB (You et al. 2020, arXiv:1904.00962): Adam's direction u, scaled in each layer by |w| / |u|, 1 where a
// norm is zero. Coupled, the decay is part of the gradient; otherwise, as in the paper, of u.
template <class T, bool kCoupled, bool kAlways>
struct LambRule {
  static constexpr int kSlots = 2;
  static constexpr int kMeasures = 1;
  static constexpr std::array<int, 1> kSums = {2};
  static constexpr bool kMeasuresTouchState = true;
  static constexpr bool kNeedsGradient = false;

  LambRule(Hyper h, std::int64_t updates)
      : beta1(T(h[1])),
        beta2(T(h[2])),
        fresh1(T(1.0 - h[1])),
        fresh2(T(1.0 - h[2])),
        epsilon(T(h[3])),
        decay(T(h[4])),
        lr(h[0]),
        adapts(h[5] != 0 && (kAlways || h[4] != 0)),
        most(h[6] != 0 ? 1.0 : kUnbounded) {
    const double t = static_cast<double>(updates + 1);
    unbias1 = T(1.0 / (1.0 - std::pow(h[1], t)));
    unbias2 = T(1.0 / std::sqrt(1.0 - std::pow(h[2], t)));
  }

  XC_HOST_DEVICE T scale(T square) const { return std::sqrt(square) * unbias2 + epsilon; }

  XC_HOST_DEVICE T direction(T w, T mean, T square) const {
    const T u = (mean * unbias1) / scale(square);
    return kCoupled ? u : u + decay * w;
  }

  template <int>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T& mean, T& square) const {
    if constexpr (kCoupled) g = g + decay * w;
    mean = beta1 * mean + fresh1 * g;
    square = beta2 * square + (fresh2 * g) * g;
    const T u = direction(w, mean, square);
    term[0] = product(w, w);
    term[1] = product(u, u);
  }

  void settle(int, const double* sums, std::int64_t) {
    const double w = std::sqrt(sums[0]), u = std::sqrt(sums[1]);
    const double ratio = bounded(adapts && w > 0 && u > 0 ? w / u : 1.0, most);
    trust = T(ratio);
    rate = T(lr * ratio);
  }

  XC_HOST_DEVICE void operator()(T, T& w, T& mean, T& square) const {
    w = w - rate * direction(w, mean, square);
  }

  XC_HOST_DEVICE T factor(T, T, T square) const { return trust / scale(square); }

  T beta1, beta2, fresh1, fresh2, epsilon, decay, unbias1, unbias2, trust = T(1), rate = T(0);
  double lr;
  bool adapts;
  double most;  // that the ratio may be
};

struct LambFamily {
  static constexpr std::string_view kName = "lamb";
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3},           Parameter{"beta1", 0.9},
                                             Parameter{"beta2", 0.999},       Parameter{"eps", 1e-6},
                                             Parameter{"weight_decay", 0.01}, Parameter{"adapt", 1.0},
                                             Parameter{"trust_clip", 0.0}};
  static constexpr std::array<std::string_view, 2> kFlags = {"coupled_weight_decay", "always_adapt"};
  static constexpr std::array<std::string_view, 2> kSlotNames = {"exp_avg", "exp_avg_sq"};

  static constexpr unsigned kMembers = 4;
  static unsigned member(unsigned flags, Hyper) { return flags; }

  template <class T, unsigned kMember>
  using Member = LambRule<T, (kMember & 1) != 0, (kMember & 2) != 0>;
};

}  // namespace xc
