#pragma once

#include <array>
#include <cmath>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888): each layer's rate is multiplied by its trust ratio
// eta |w| / (|g| + decay |w|), 1 where a norm is zero. Published versions differ in where the ratio stands,
// which matters as soon as it changes: with the rate in the buffer (the paper), in the buffer without the
// rate, or outside of the buffer.
enum class LarsTrust { with_rate, inside, outside };

template <class T, LarsTrust kTrust>
struct LarsRule {
  static constexpr int kSlots = 1;
  static constexpr int kMeasures = 1;
  static constexpr std::array<int, 1> kSums = {2};
  static constexpr bool kMeasuresTouchState = false;
  static constexpr bool kNeedsGradient = true;

  LarsRule(Hyper h, std::int64_t)
      : lr(T(h[0])),
        momentum(T(h[1])),
        decay(T(h[2])),
        given{h[0], h[2], h[3], h[4]},
        adapts(h[5] != 0 && (h[6] != 0 || h[2] != 0)),
        most(h[7] != 0 ? 1.0 : kUnbounded) {}

  template <int>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T&) const {
    term[0] = product(w, w);
    term[1] = product(g, g);
  }

  void settle(int, const double* sums, std::int64_t) {
    const double w = std::sqrt(sums[0]), g = std::sqrt(sums[1]);
    take(adapts && w > 0 && g > 0 ? given.coefficient * w / (g + given.decay * w + given.epsilon) : 1.0);
  }

  void take(double ratio) {
    ratio = bounded(ratio, most);
    trust = T(ratio);
    rate = T(given.lr * ratio);
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& buffer) const {
    const T d = g + decay * w;
    if constexpr (kTrust == LarsTrust::with_rate) {
      buffer = momentum * buffer + rate * d;
      w = w - buffer;
    } else if constexpr (kTrust == LarsTrust::inside) {
      buffer = momentum * buffer + trust * d;
      w = w - lr * buffer;
    } else {
      buffer = momentum * buffer + d;
      w = w - rate * buffer;
    }
  }

  XC_HOST_DEVICE T factor(T, T) const { return trust; }

  T lr, momentum, decay;
  struct {
    double lr, decay, coefficient, epsilon;
  } given;
  T trust = T(1), rate = T(0);
  bool adapts;
  double most;  // that the ratio may be
};

// CLARS (Huo, Gu & Huang 2020, arXiv:2002.01576): the ratio's denominator is the mean of the norms of the
// workers' own gradients, each with its decay, which is never below the norm of their mean.
template <class T, LarsTrust kTrust>
struct ClarsRule : LarsRule<T, kTrust> {
  static constexpr std::array<int, 1> kSums = {1};

  using LarsRule<T, kTrust>::LarsRule;

  T own_decay() const { return this->decay; }

  template <int>
  XC_HOST_DEVICE void measure(T, double* term, T& w, T&) const {
    term[0] = product(w, w);
  }

  void settle(int, const double* sums, std::int64_t) {
    const double w = std::sqrt(sums[0]), mean_norm = sums[kMaxSums - 1];
    this->take(this->adapts && w > 0 && mean_norm > 0
                   ? this->given.coefficient * w / (mean_norm + this->given.epsilon)
                   : 1.0);
  }
};

struct LarsFamily {
  static constexpr std::string_view kName = "lars";
  static constexpr std::array kParameters = {
      Parameter{"lr", 0.1},           Parameter{"momentum", 0.9},
      Parameter{"weight_decay", 0.0}, Parameter{"trust_coefficient", 1e-3},
      Parameter{"eps", 1e-8},         Parameter{"adapt", 1.0},
      Parameter{"always_adapt", 1.0}, Parameter{"trust_clip", 0.0}};
  static constexpr std::array<std::string_view, 2> kFlags = {"trust_in_buffer", "trust_outside"};
  static constexpr std::array<std::string_view, 1> kSlotNames = {"momentum_buffer"};

  static constexpr unsigned kMembers = 3;
  static unsigned member(unsigned flags, Hyper) { return flags < 3 ? flags : 2; }

  template <class T, unsigned kMember>
  using Member = LarsRule<T, static_cast<LarsTrust>(kMember)>;
};

struct ClarsFamily : LarsFamily {
  static constexpr std::string_view kName = "clars";

  template <class T, unsigned kMember>
  using Member = ClarsRule<T, static_cast<LarsTrust>(kMember)>;
};

}  // namespace xc
