#pragma once

#include <cstdint>

#include "cuda_runtime.h"

// Of CUDA's driver: the operations of streams on words in memory.

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_NOT_SUPPORTED = 801 };
enum { CU_STREAM_WAIT_VALUE_GEQ = 0, CU_STREAM_WAIT_VALUE_FLUSH = 1 << 30 };
enum { CU_STREAM_WRITE_VALUE_DEFAULT = 0 };
using CUstream = cudaStream_t;
using CUdeviceptr = unsigned long long;

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned flags);
CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned flags);
