#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/host_device.hpp"
#include "rules/extrapolation.hpp"
#include "stages/tables.hpp"

namespace xc {

// Element i of one worker's next weights, before it is narrowed to their type.
template <Direction kDirection, bool kScaled, class E>
XC_HOST_DEVICE Master<E> displaced(Master<E> w, const Displacement<Master<E>>& by, const E* own,
                                   const Master<E>* shared, const Master<E>* factor, std::int64_t i) {
  if constexpr (kDirection == Direction::none) {
    return w;
  } else {
    const Master<E> mine = kDirection == Direction::shared ? Master<E>(0) : widen(own[i]);
    const Master<E> all = kDirection == Direction::own ? Master<E>(0) : shared[i];
    const Master<E> d = displacement<kDirection>(by.own_rate, mine, by.shared_rate, all);
    return kScaled ? w - d * factor[i] : w - d;
  }
}

}  // namespace xc
