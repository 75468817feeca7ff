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

// `a`, `b` and `c` are the arrays of the slots; those that the rule lacks are not touched.
template <class R, class T>
XC_HOST_DEVICE void update_at(const R& rule, const T* mean, const T* extra, std::int64_t i, T* w, T* a, T* b,
                              T* c) {
  static_assert(kMaxSlots == 3);
  if constexpr (R::kSlots == 0) update(rule, mean, extra, i, w[i]);
  if constexpr (R::kSlots == 1) update(rule, mean, extra, i, w[i], a[i]);
  if constexpr (R::kSlots == 2) update(rule, mean, extra, i, w[i], a[i], b[i]);
  if constexpr (R::kSlots == 3) update(rule, mean, extra, i, w[i], a[i], b[i], c[i]);
}

template <class R, class T>
inline constexpr bool kHasFactor =
    requires(const R rule, T t) { rule.factor(t); } || requires(const R rule, T t) { rule.factor(t, t); } ||
    requires(const R rule, T t) { rule.factor(t, t, t); } ||
    requires(const R rule, T t) { rule.factor(t, t, t, t); };

// What a gradient is multiplied with to displace element i in the units of the rule's steps.
template <class R, class T>
XC_HOST_DEVICE T factor_at(const R& rule, std::int64_t i, const T* w, const T* a, const T* b, const T* c) {
  if constexpr (R::kSlots == 0) return rule.factor(w[i]);
  if constexpr (R::kSlots == 1) return rule.factor(w[i], a[i]);
  if constexpr (R::kSlots == 2) return rule.factor(w[i], a[i], b[i]);
  if constexpr (R::kSlots == 3) return rule.factor(w[i], a[i], b[i], c[i]);
}

}  // namespace xc
