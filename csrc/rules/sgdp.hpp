#pragma once

#include <array>

#include "core/host_device.hpp"
#include "rules/projection.hpp"
#include "rules/rule.hpp"

namespace xc {

// SGDP (Heo et al. 2021, arXiv:2006.08217, Algorithm 1): momentum SGD whose update is projected where weights
// are scale-invariant. The buffer starts at zero and is dampened from the first update on. The decay is
// decoupled and, as a decayed gradient would have it in the long run, 1 / (1 - momentum) times as strong.
template <class T, bool kNesterov>
struct SgdPRule {
  static constexpr int kSlots = 1;
  static constexpr Extra kExtra = Extra::projection;
  static constexpr int kMeasures = 1;
  static constexpr std::array<int, 1> kSums = {Projection::kTerms};
  static constexpr bool kMeasuresTouchState = true;
  static constexpr bool kNeedsGradient = kNesterov;

  SgdPRule(Hyper h, std::int64_t)
      : lr(T(h[0])),
        momentum(T(h[1])),
        fresh(T(1.0 - h[2])),
        given{h[0] * h[3], h[1], h[6]},
        projection(h[5], h[4]) {}

  XC_HOST_DEVICE T direction(T g, T buffer) const { return kNesterov ? g + momentum * buffer : buffer; }

  template <int>
  XC_HOST_DEVICE void measure(T g, double* term, T& w, T& buffer) const {
    buffer = momentum * buffer + fresh * g;
    Projection::terms(g, w, direction(g, buffer), term);
  }

  void project(std::span<const TermSums> filters, std::int64_t length, std::span<double> coefficients) {
    const bool projected = projection.settle(filters, length, coefficients);
    shrink = T(1.0 - given.decay * (projected ? given.ratio : 1.0) / (1.0 - given.momentum));
  }

  XC_HOST_DEVICE void operator()(T g, T along, T& w, T& buffer) const {
    const T p = direction(g, buffer) - along * w;
    w = w * shrink - lr * p;
  }

  T lr, momentum, fresh, shrink = T(1);
  struct {
    double decay, momentum, ratio;
  } given;
  Projection projection;
};

struct SgdPFamily {
  static constexpr std::string_view kName = "sgdp";
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3},       Parameter{"momentum", 0.0},
                                             Parameter{"dampening", 0.0}, Parameter{"weight_decay", 0.0},
                                             Parameter{"eps", 1e-8},      Parameter{"delta", 0.1},
                                             Parameter{"wd_ratio", 0.1}};
  static constexpr std::array<std::string_view, 1> kFlags = {"nesterov"};
  static constexpr std::array<std::string_view, 1> kSlotNames = {"momentum"};

  static constexpr unsigned kMembers = 2;
  static unsigned member(unsigned flags, Hyper) { return flags; }

  template <class T, unsigned kMember>
  using Member = SgdPRule<T, (kMember & 1) != 0>;
};

}  // namespace xc
