#pragma once

#include <array>

#include "core/elementary.hpp"
#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// Step sizes by exponentiated gradients (Amid, Anil, Fifty & Warmuth 2022, arXiv:2202.00145): momentum SGD
// with a gain p for every element and one scale s for all, both multiplied at every step by an exponential:
// p's of how well the element's gradient agrees with its average, s's of how well the whole gradient agrees
// with the momentum. Slots hold the logarithm of p, the average and the momentum; s is a hyper-parameter that
// the sum of momentum times gradient revises. No exponent leaves [-1, 1].
template <class T>
struct EgRule {
  static constexpr int kSlots = 3;
  static constexpr int kMeasures = 1;
  static constexpr std::array<int, 1> kSums = {1};
  static constexpr bool kMeasuresTouchState = false;
  static constexpr bool kNeedsGradient = true;
  static constexpr bool kRevises = true;

  EgRule(Hyper h, std::int64_t)
      : lr(T(h[0])),
        momentum(T(h[1])),
        beta(T(h[2])),
        fresh(T(1.0 - h[2])),
        lr_gain(T(h[3])),
        decay(T(h[5])),
        scale(T(h[6])) {}

  template <int>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T&, T&, T& step) const {
    term[0] = product(step, g + decay * w);
  }

  void settle(int, const double*, std::int64_t) {}

  XC_HOST_DEVICE T within_one(T x) const {
    const T low = x < T(-1) ? T(-1) : x;
    return low > T(1) ? T(1) : low;
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& log_gain, T& mean, T& step) const {
    g = g + decay * w;
    log_gain = log_gain + within_one(lr_gain * (mean * g));
    mean = beta * mean + fresh * g;
    step = momentum * step + lr * (exp_of(log_gain) * g);
    w = w - scale * step;
  }

  XC_HOST_DEVICE T factor(T, T log_gain, T, T) const { return scale * exp_of(log_gain); }

  T lr, momentum, beta, fresh, lr_gain, decay, scale;
};

struct EgFamily {
  static constexpr std::string_view kName = "eg";
  static constexpr std::array kParameters = {Parameter{"lr", 0.1},        Parameter{"momentum", 0.9},
                                             Parameter{"smoothing", 0.9}, Parameter{"lr_gain", 1e-3},
                                             Parameter{"lr_scale", 1e-3}, Parameter{"weight_decay", 0.0},
                                             Parameter{"scale", 1.0}};
  static constexpr std::array<std::string_view, 0> kFlags = {};
  static constexpr std::array<std::string_view, 3> kSlotNames = {"log_gain", "exp_avg", "momentum_buffer"};

  static constexpr unsigned kMembers = 1;
  static unsigned member(unsigned, Hyper) { return 0; }

  template <class T, unsigned>
  using Member = EgRule<T>;
};

}  // namespace xc
