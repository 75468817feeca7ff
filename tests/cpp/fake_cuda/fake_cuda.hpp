#pragma once

#include <chrono>
#include <map>
#include <string>

#include "cuda_runtime.h"

// How tests steer the stand-in for CUDA's runtime, and what they ask it.
namespace fake_cuda {

// How many devices a process sees; 1 at first.
void set_devices(int count);
// Whether streams know operations on words in memory; true at first.
void set_memory_operations(bool known);

// The calling thread's n-th next call of a function fails; then all goes on as if it had not been made.
// Functions that only end something end it, and fail then.
void fail(const std::string& function, int n, cudaError_t error);
bool only_ends(const std::string& function);
void fail_nothing();
// How often this thread has called each function since fail_nothing().
std::map<std::string, int> calls();

// What is queued on the stream from now on waits so long before it runs.
void delay(cudaStream_t stream, std::chrono::milliseconds time);

// What this process has not let go of: memory of devices, memory opened and pinned, events.
int left();
std::string what_is_left();

}  // namespace fake_cuda
