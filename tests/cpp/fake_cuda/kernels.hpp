#pragma once

#include <functional>

// What kernels are written in, for a compiler for the host. The threads of a block are fibres of one thread
// of the host, and one block runs after the other, so what a block shares belongs to that thread.

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline constinit thread_local uint3 threadIdx, blockIdx;
inline constinit thread_local dim3 blockDim, gridDim;

void __syncthreads();
void __nanosleep(unsigned nanoseconds);

// Calls `thread` for every thread of every block.
void fake_cuda_run(dim3 grid, dim3 block, const std::function<void()>& thread);
