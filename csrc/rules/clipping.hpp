#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.hpp"

namespace xc {

// What follows from the norm of the mean gradient when it is held to `max_norm`.

// As torch.nn.utils.clip_grad_norm_, the tiny number included; a norm that is NaN stays so. An infinite bound
// only measures, and 0 is none.
XC_HOST_DEVICE double clip_for(double norm, double max_norm) {
  if (!(max_norm > 0) || std::isinf(max_norm)) return 1.0;
  const double clip = max_norm / (norm + 1e-6);
  return clip > 1.0 ? 1.0 : clip;
}

// Displacements that are clipped alike take the clip into the rate of a worker's own gradient. Others are by
// gradients as they came, so the rate of the mean, which is clipped when it displaces, takes the clip out.
enum class Clipped : std::uint8_t { neither, own_rate, shared_rate };

template <class T>
XC_HOST_DEVICE void clip_rates(Clipped which, double clip, T& own_rate, T& shared_rate) {
  if (which == Clipped::own_rate)
    own_rate = T(static_cast<double>(own_rate) * clip);
  else if (which == Clipped::shared_rate && clip > 0)
    shared_rate = T(static_cast<double>(shared_rate) / clip);
}

}  // namespace xc
