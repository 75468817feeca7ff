#pragma once

// Arithmetic that the CPU and the CUDA kernels share is marked XC_HOST_DEVICE. On the CPU it must be part of
// the loop that calls it, in every instruction set's clone of that loop, or the loop is not vectorised. Loops
// that need not be fast compile many times faster without that (XC_COMPILE_FAST).

#ifdef __CUDACC__
#define XC_HOST_DEVICE __host__ __device__ inline
#elif defined(XC_COMPILE_FAST)
#define XC_HOST_DEVICE inline
#else
#define XC_HOST_DEVICE [[gnu::always_inline]] inline
#endif
