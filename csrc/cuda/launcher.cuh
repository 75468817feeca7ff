#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/check.hpp"
#include "cuda/launch.cuh"
#include "device/tables.hpp"

namespace xc {

// The launcher of CUDA: a block of threads for a cell at a time, and as many blocks as fill the device, no
// more than there are cells. The next cell is asked for before the present one's elements, so nobody waits
// for it.

template <class Body>
inline constexpr int kThreads = kCellElements / Body::kPack;

// Left to itself the compiler would rather spill registers than run fewer blocks at a time.
inline constexpr int kFewestBlocks = 1;

template <class Body>
__global__ void __launch_bounds__(kThreads<Body>, kFewestBlocks) over_cells(const Launch at) {
  if (at.obeyed && at.obeyed->skipped) return;
  const int thread = static_cast<int>(threadIdx.x);
  Cell next = at.cells[blockIdx.x];
  for (std::int64_t c = blockIdx.x; c < at.cell_count; c += gridDim.x) {
    const Cell cell = next;
    if (c + gridDim.x < at.cell_count) next = at.cells[c + gridDim.x];
    if (thread * Body::kPack < cell.count) Body{}(at, cell, thread);
  }
}

// Terms wait in shared memory, where a thread for each lane adds them up.
template <class Body>
__global__ void __launch_bounds__(kThreads<Body>) sum_over_cells(const Launch at) {
  __shared__ double terms[Body::kSums * kCellElements];
  __shared__ double lanes[Body::kSums * kLanes];
  static_assert(Body::kSums * kLanes <= kThreads<Body>);
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t c = blockIdx.x; c < at.cell_count; c += gridDim.x) {
    const Cell cell = at.cells[c];
    for (int round = 0; round < Body::rounds(at); ++round) {
      if (thread * Body::kPack < cell.count) Body{}(at, cell, thread, round, terms);
      __syncthreads();
      if (thread < Body::kSums * kLanes)
        lanes[thread] = lane_of(terms, thread / kLanes, thread % kLanes, cell.count);
      __syncthreads();
      if (thread < Body::kSums)
        sum_at(at, round * Body::kSums + thread, c) = sum_of_lanes(lanes + thread * kLanes);
    }
  }
}

struct CudaLauncher {
  template <class Body>
  static void launch(const Launch& at, Stream stream) {
    static const int blocks = blocks_that_fit(&over_cells<Body>, kThreads<Body>);
    start(&over_cells<Body>, grid(at, blocks), kThreads<Body>, static_cast<cudaStream_t>(stream), at);
  }
  template <class Body>
  static void sum(const Launch& at, Stream stream) {
    static const int blocks = blocks_that_fit(&sum_over_cells<Body>, kThreads<Body>);
    start(&sum_over_cells<Body>, grid(at, blocks), kThreads<Body>, static_cast<cudaStream_t>(stream), at);
  }

 private:
  static unsigned grid(const Launch& at, int blocks) {
    return static_cast<unsigned>(std::min<std::int64_t>(at.cell_count, blocks));
  }
};

}  // namespace xc
