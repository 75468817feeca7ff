#pragma once

// Arithmetic that the CPU and the CUDA kernels share is marked XC_HOST_DEVICE.

#ifdef __CUDACC__
#define XC_HOST_DEVICE __host__ __device__
#else
#define XC_HOST_DEVICE
#endif
