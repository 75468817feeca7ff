#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <type_traits>

#include "cuda/check.hpp"

namespace xc {

// A place in a GPU's work, for the host or a stream to wait for.
struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent>;

inline Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  return Event(event);
}

}  // namespace xc
