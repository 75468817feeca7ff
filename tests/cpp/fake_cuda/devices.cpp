#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda.h"
#include "state.hpp"

using namespace fake_cuda;

namespace {

std::atomic<int> devices{1};
std::atomic<bool> memory_operations{true};
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Orders {
  std::map<std::string, int> calls;
  std::string function;
  int n = 0;
  cudaError_t error = cudaSuccess;
};
thread_local Orders orders;

bool is_device(int index) { return index >= 0 && index < devices; }

}  // namespace

void fake_cuda::misuse(const std::string& what) {
  std::fprintf(stderr, "fake CUDA: %s\n", what.c_str());
  std::abort();
}

cudaError_t fake_cuda::call(const char* function, const std::function<cudaError_t()>& body) {
  const int n = ++orders.calls[function];
  const bool fails = orders.function == function && orders.n == n;
  const bool runs = !fails || only_ends(function);
  const cudaError_t result = runs ? body() : cudaSuccess;
  const cudaError_t error = fails ? orders.error : result;
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

bool fake_cuda::only_ends(const std::string& function) {
  for (const char* each : {"cudaFree", "cudaFreeHost", "cudaEventDestroy", "cudaIpcCloseMemHandle",
                           "cudaHostUnregister", "cudaThreadExchangeStreamCaptureMode"})
    if (function == each) return true;
  return false;
}

void fake_cuda::fail(const std::string& function, int n, cudaError_t error) {
  orders.function = function;
  orders.n = orders.calls[function] + n;
  orders.error = error;
}

void fake_cuda::fail_nothing() { orders = {}; }
std::map<std::string, int> fake_cuda::calls() { return orders.calls; }
void fake_cuda::set_devices(int count) { devices = count; }
void fake_cuda::set_memory_operations(bool known) { memory_operations = known; }
int fake_cuda::current_device() { return device; }
int fake_cuda::device_count() { return devices; }

const char* cudaGetErrorString(cudaError_t) { return "the fake was told to fail, or found a reason"; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "another error";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  return call(__func__, [&] {
    *count = devices;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* index) {
  return call(__func__, [&] {
    *index = device;
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int index) {
  return call(__func__, [&] {
    if (!is_device(index)) return cudaErrorInvalidDevice;
    device = index;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  return call(__func__, [&] {
    if (!is_device(index)) return cudaErrorInvalidDevice;
    *properties = {};
    std::strcpy(properties->name, "Fake");
    std::memcpy(properties->uuid.bytes, &index, sizeof index);
    properties->totalGlobalMem = std::size_t{1} << 30;
    properties->major = 9;
    properties->multiProcessorCount = 2;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return call(__func__, [&] {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 1;
    return cudaSuccess;
  });
}

cudaError_t fake_cuda_occupancy(int* blocks) {
  return call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", [&] {
    *blocks = 1;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  return call(__func__, [&] {
    *function = nullptr;
    if (memory_operations && std::strcmp(symbol, "cuStreamWriteValue32") == 0)
      *function = reinterpret_cast<void*>(&cuStreamWriteValue32);
    if (memory_operations && std::strcmp(symbol, "cuStreamWaitValue32") == 0)
      *function = reinterpret_cast<void*>(&cuStreamWaitValue32);
    *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
  });
}
