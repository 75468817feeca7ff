#pragma once

#include <cstdint>

#include "core/host_device.hpp"
#include "rules/rule.hpp"

// A rule's functions for one element of arrays, whatever its number of slots.

namespace xc {

// Calls one of a rule's functions for element i; `s` are the arrays of its slots.
template <class R, class T, class... S>
XC_HOST_DEVICE void update(const R& rule, const T* mean, const T* extra, std::int64_t i, T& w, S&... s) {
  if constexpr (extra_of<R>() == Extra::none)
    rule(mean[i], w, s...);
  else
    rule(mean[i], extra[i], w, s...);
}

template <class R, class T>
inline constexpr bool kHasFactor =
    requires(const R rule, T t) { rule.factor(t); } || requires(const R rule, T t) { rule.factor(t, t); } ||
    requires(const R rule, T t) { rule.factor(t, t, t); } ||
    requires(const R rule, T t) { rule.factor(t, t, t, t); };

// A weight and its slots in registers: what a loop need not read again after it has written it.
template <class R, class T>
struct InHand {
  T w;
  T a = T(0), b = T(0), c = T(0);

  XC_HOST_DEVICE void update_by(const R& rule, const T& mean) {
    static_assert(kMaxSlots == 3);
    const T* const extra = nullptr;
    if constexpr (R::kSlots == 0) update(rule, &mean, extra, 0, w);
    if constexpr (R::kSlots == 1) update(rule, &mean, extra, 0, w, a);
    if constexpr (R::kSlots == 2) update(rule, &mean, extra, 0, w, a, b);
    if constexpr (R::kSlots == 3) update(rule, &mean, extra, 0, w, a, b, c);
  }

  // What a gradient is multiplied with to displace the weight in the units of the rule's steps.
  XC_HOST_DEVICE T factor(const R& rule) const {
    if constexpr (R::kSlots == 0) return rule.factor(w);
    if constexpr (R::kSlots == 1) return rule.factor(w, a);
    if constexpr (R::kSlots == 2) return rule.factor(w, a, b);
    if constexpr (R::kSlots == 3) return rule.factor(w, a, b, c);
  }
};

}  // namespace xc
