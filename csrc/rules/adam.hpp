#pragma once

#include <array>
#include <cmath>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// The larger of two numbers, NaN if either is NaN, as torch.maximum.
template <class T>
XC_HOST_DEVICE T maximum(T a, T b) {
  return (b > a) | (b != b) ? b : a;
}

// Adam (Kingma & Ba 2015) with bias correction and, decoupled, AdamW (Loshchilov & Hutter 2019), as
// torch.optim. AMSGrad (Reddi, Kale & Kumar 2018) keeps the largest average of squares in a third slot and
// divides by that.
template <class T, bool kDecoupled, bool kAmsgrad = false>
struct AdamRule {
  static constexpr int kSlots = kAmsgrad ? 3 : 2;

  AdamRule(Hyper h, std::int64_t updates)
      : beta1(T(h[1])),
        beta2(T(h[2])),
        fresh1(T(1.0 - h[1])),
        fresh2(T(1.0 - h[2])),
        epsilon(T(h[3])),
        decay(T(kDecoupled ? 1.0 - h[0] * h[4] : h[4])) {
    const double t = static_cast<double>(updates + 1);
    rate = T(h[0] / (1.0 - std::pow(h[1], t)));
    unbias = T(1.0 / std::sqrt(1.0 - std::pow(h[2], t)));
  }

  XC_HOST_DEVICE T scale(T square) const { return std::sqrt(square) * unbias + epsilon; }

  XC_HOST_DEVICE void average(T g, T& w, T& mean, T& square) const {
    if constexpr (kDecoupled) {
      w = w * decay;
    } else {
      g = g + decay * w;
    }
    mean = beta1 * mean + fresh1 * g;
    square = beta2 * square + (fresh2 * g) * g;
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& mean, T& square) const
    requires(!kAmsgrad)
  {
    average(g, w, mean, square);
    w = w - rate * (mean / scale(square));
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& mean, T& square, T& most) const
    requires kAmsgrad
  {
    average(g, w, mean, square);
    most = maximum(most, square);
    w = w - rate * (mean / scale(most));
  }

  XC_HOST_DEVICE T factor(T, T, T square) const
    requires(!kAmsgrad)
  {
    return T(1) / scale(square);
  }

  XC_HOST_DEVICE T factor(T, T, T, T most) const
    requires kAmsgrad
  {
    return T(1) / scale(most);
  }

  T beta1, beta2, fresh1, fresh2, epsilon, decay, rate, unbias;
};

// Adam without AMSGrad, on which other rules are built.
struct PlainAdamFamily {
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3}, Parameter{"beta1", 0.9},
                                             Parameter{"beta2", 0.999}, Parameter{"eps", 1e-8},
                                             Parameter{"weight_decay", 0.0}};
  static constexpr std::array<std::string_view, 1> kFlags = {"decoupled_weight_decay"};
  static constexpr std::array<std::string_view, 2> kSlotNames = {"exp_avg", "exp_avg_sq"};

  static constexpr unsigned kMembers = 2;
  static unsigned member(unsigned flags, Hyper) { return flags; }

  template <class T, unsigned kMember>
  using Member = AdamRule<T, (kMember & 1) != 0>;
};

struct AdamFamily {
  static constexpr std::string_view kName = "adam";
  static constexpr auto kParameters = PlainAdamFamily::kParameters;
  static constexpr std::array<std::string_view, 2> kFlags = {"decoupled_weight_decay", "amsgrad"};
  static constexpr std::array<std::string_view, 3> kSlotNames = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  static constexpr unsigned kMembers = 4;
  static unsigned member(unsigned flags, Hyper) { return flags; }

  template <class T, unsigned kMember>
  using Member = AdamRule<T, (kMember & 1) != 0, (kMember & 2) != 0>;
};

}  // namespace xc
