#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.hpp"

namespace xc {

// DeviceError, with CUDA's own words, unless the call succeeded. CUDA forgets the failure: who asks it later
// for its last error means another.
inline void check(cudaError_t code, const std::string& doing) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  throw DeviceError(doing + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

// How many blocks of a kernel this device runs at a time.
template <class Kernel>
int blocks_that_fit(Kernel kernel, int threads) {
  int device = 0, processors = 0, per_processor = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking the device");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0),
        "asking for a kernel's occupancy");
  return processors * (per_processor > 0 ? per_processor : 1);
}

}  // namespace xc
