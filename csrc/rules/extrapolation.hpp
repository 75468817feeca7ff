#pragma once

#include <array>
#include <string_view>

#include "core/host_device.hpp"

namespace xc {

// How worker k's next weights x_k are displaced from the new master weight w. `own` is worker k's term of the
// sum (its last gradient, before the division by K), `mean` the reduced gradient, `inner` the inner learning
// rate. Extrapolation for Large-batch Training in Deep Learning (ICML 2020): the local kind is EXTRAP-SGD.

struct NoExtrapolation {
  static constexpr std::string_view kName = "none";
  static constexpr bool kByOwn = false;
  static constexpr bool kByMean = false;
  template <class T>
  XC_HOST_DEVICE static T displace(T w, T, T, T) {
    return w;
  }
};

struct LocalGradient {
  static constexpr std::string_view kName = "local";
  static constexpr bool kByOwn = true;
  static constexpr bool kByMean = false;
  template <class T>
  XC_HOST_DEVICE static T displace(T w, T inner, T own, T) {
    return w - inner * own;
  }
};

struct GlobalGradient {
  static constexpr std::string_view kName = "global";
  static constexpr bool kByOwn = false;
  static constexpr bool kByMean = true;
  template <class T>
  XC_HOST_DEVICE static T displace(T w, T inner, T, T mean) {
    return w - inner * mean;
  }
};

template <class... E>
struct Extrapolations {
  static constexpr std::array<std::string_view, sizeof...(E)> kNames = {E::kName...};
  static constexpr std::array<bool, sizeof...(E)> kByOwn = {E::kByOwn...};
  static constexpr std::array<bool, sizeof...(E)> kByMean = {E::kByMean...};
};

// The one list of extrapolations; the first displaces nothing and stands in wherever the inner rate is zero.
using AllExtrapolations = Extrapolations<NoExtrapolation, LocalGradient, GlobalGradient>;

}  // namespace xc
