#include "cuda/memory_operations.hpp"

#include <cuda_runtime.h>

#include <string>

#include "cuda/check.hpp"

namespace xc {
namespace {

constexpr unsigned kVersion = 12000;  // since when the functions are those of cuda.h
constexpr const char* kRemedy = "; take XC_GPU_SYNC=event";

template <class Function>
Function find(const char* name) {
  void* at = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &at, kVersion, cudaEnableDefault, &found),
        std::string("looking for the driver's ") + name);
  if (!at || found != cudaDriverEntryPointSuccess)
    throw DeviceError(std::string("the driver has no ") + name + kRemedy);
  return reinterpret_cast<Function>(at);
}

void check_driver(CUresult code, const char* doing) {
  if (code != CUDA_SUCCESS)
    throw DeviceError(std::string(doing) + ": the driver's error " + std::to_string(int(code)) + kRemedy);
}

// Whether what peers wrote before a word reaches this GPU only by asking.
bool can_flush() {
  int device = 0, can = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&can, cudaDevAttrCanFlushRemoteWrites, device), "asking the device");
  return can != 0;
}

CUdeviceptr address_of(std::uint32_t* word) { return reinterpret_cast<CUdeviceptr>(word); }

}  // namespace

MemoryOperations::MemoryOperations()
    : write_(find<decltype(write_)>("cuStreamWriteValue32")),
      wait_(find<decltype(wait_)>("cuStreamWaitValue32")),
      flags_(CU_STREAM_WAIT_VALUE_GEQ | (can_flush() ? unsigned(CU_STREAM_WAIT_VALUE_FLUSH) : 0u)) {}

void MemoryOperations::write(Stream stream, std::uint32_t* word, std::uint32_t value) const {
  check_driver(write_(static_cast<CUstream>(stream), address_of(word), value, CU_STREAM_WRITE_VALUE_DEFAULT),
               "letting a stream write a word");
}

void MemoryOperations::await(Stream stream, std::uint32_t* word, std::uint32_t value) const {
  check_driver(wait_(static_cast<CUstream>(stream), address_of(word), value, flags_),
               "letting a stream await a word");
}

}  // namespace xc
