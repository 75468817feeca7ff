#pragma once

#include <array>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

namespace xc {

// Stochastic gradient descent as torch.optim.SGD: the buffer holds gradients and the rate multiplies at the
// end; the first update of a layer fills the buffer with the gradient itself, undamped. With Nesterov
// momentum the stored weight is the look-ahead point (Sutskever et al. 2013 in torch's variables).
template <class T, bool kMomentum, bool kNesterov, bool kDecoupled>
struct SgdRule {
  static constexpr int kSlots = kMomentum ? 1 : 0;

  SgdRule(Hyper h, std::int64_t updates)
      : lr(T(h[0])),
        momentum(T(h[1])),
        fresh(T(updates == 0 ? 1.0 : 1.0 - h[2])),
        decay(T(kDecoupled ? 1.0 - h[0] * h[3] : h[3])) {}

  XC_HOST_DEVICE T decayed(T g, T& w) const {
    if constexpr (!kDecoupled) return g + decay * w;
    w = w * decay;
    return g;
  }

  XC_HOST_DEVICE void operator()(T g, T& w) const
    requires(!kMomentum)
  {
    const T d = decayed(g, w);
    w = w - lr * d;
  }

  XC_HOST_DEVICE void operator()(T g, T& w, T& buffer) const
    requires kMomentum
  {
    const T d = decayed(g, w);
    buffer = momentum * buffer + fresh * d;
    w = w - lr * (kNesterov ? d + momentum * buffer : buffer);
  }

  T lr, momentum, fresh, decay;
};

struct SgdFamily {
  static constexpr std::string_view kName = "sgd";
  static constexpr std::array kParameters = {Parameter{"lr", 1e-3}, Parameter{"momentum", 0.0},
                                             Parameter{"dampening", 0.0}, Parameter{"weight_decay", 0.0}};
  static constexpr std::array<std::string_view, 2> kFlags = {"nesterov", "decoupled_weight_decay"};
  static constexpr std::array<std::string_view, 1> kSlotNames = {"momentum_buffer"};

  // Bits 0 and 1 are the flags; bit 2 says that there is momentum and so a buffer.
  static constexpr unsigned kMembers = 8;
  static unsigned member(unsigned flags, Hyper h) { return flags | (h[1] != 0.0 ? 4u : 0u); }

  template <class T, unsigned kMember>
  using Member = SgdRule<T, (kMember & 4) != 0, (kMember & 1) != 0, (kMember & 2) != 0>;
};

}  // namespace xc
