#pragma once

#include <array>
#include <optional>
#include <string_view>

#include "core/host_device.hpp"
#include "rules/noise.hpp"

namespace xc {

// How worker k's next weights x_k are displaced from the new master weights w. A displacement goes against a
// DIRECTION: the worker's own last gradient, one that is given for it (the mean gradient, or random numbers),
// or its own less the mean. Extrapolation for Large-batch Training in Deep Learning (ICML 2020): its
// framework takes any direction that does not depend on the next gradient's sample; the local kind is
// EXTRAP-SGD.
enum class Direction { none, own, shared, deviation };
inline constexpr int kDirections = 4;

struct Extrapolation {
  std::string_view name;
  Direction direction;
  std::optional<Noise> random = {};  // where the shared direction comes from, if not from the gradients
  bool per_filter = false;           // random numbers as long as the filter they displace

  constexpr bool by_own() const { return direction == Direction::own || direction == Direction::deviation; }
  constexpr bool by_mean() const {
    return (direction == Direction::shared || direction == Direction::deviation) && !random;
  }
  constexpr bool by_gradient() const { return direction != Direction::none && !random; }
};

// The one list of extrapolations; the first displaces nothing and stands in wherever the inner rate is zero.
inline constexpr std::array kExtrapolations = {
    Extrapolation{"none", Direction::none},
    Extrapolation{"local", Direction::own},
    Extrapolation{"global", Direction::shared},
    Extrapolation{"anisotropic", Direction::deviation},
    Extrapolation{"gaussian", Direction::shared, Noise::gaussian},
    Extrapolation{"uniform", Direction::shared, Noise::uniform},
    Extrapolation{"filter", Direction::shared, Noise::gaussian, true},
};

// -1 if there is none.
constexpr int extrapolation_index(std::string_view name) {
  for (std::size_t i = 0; i < kExtrapolations.size(); ++i)
    if (kExtrapolations[i].name == name) return static_cast<int>(i);
  return -1;
}

template <Direction kDirection, class T>
XC_HOST_DEVICE T displacement(T own_rate, T own, T shared_rate, T shared) {
  if constexpr (kDirection == Direction::own)
    return own_rate * own;
  else if constexpr (kDirection == Direction::shared)
    return shared_rate * shared;
  else
    return own_rate * own - shared_rate * shared;
}

}  // namespace xc
