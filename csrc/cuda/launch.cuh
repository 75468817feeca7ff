#pragma once

#include <cuda_runtime.h>

#include "cuda/check.hpp"

namespace xc {

// Queues a kernel of so many blocks of so many threads.
template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), unsigned blocks, int threads, cudaStream_t stream,
           const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "starting a kernel");
}

}  // namespace xc
