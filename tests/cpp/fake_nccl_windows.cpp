#include <cstdlib>

#include "fake_nccl.hpp"

// What newer versions of NCCL have: memory that peers reach.

FAKE_NCCL_EXPORT int ncclMemAlloc(void** at, std::size_t bytes) {
  if (const int result = stand_in::failure_of("ncclMemAlloc")) return result;
  *at = std::malloc(bytes);
  stand_in::count(1);
  return 0;
}

FAKE_NCCL_EXPORT int ncclMemFree(void* at) {
  std::free(at);
  stand_in::count(-1);
  return 0;
}

FAKE_NCCL_EXPORT int ncclCommWindowRegister(stand_in::Communicator* comm, void* at, std::size_t bytes,
                                            stand_in::Window** window, int flags) {
  if (flags != 1) return 4;
  if (const int result = stand_in::failure_of("ncclCommWindowRegister")) return result;
  return stand_in::enqueue_window(comm, {at, bytes}, window);
}

FAKE_NCCL_EXPORT int ncclCommWindowDeregister(stand_in::Communicator*, stand_in::Window* window) {
  stand_in::drop(window);
  return 0;
}

FAKE_NCCL_EXPORT int ncclGetPeerDevicePointer(stand_in::Window* window, std::size_t offset, int peer,
                                              void** at) {
  *at = peer == stand_in::faults().hidden ? nullptr
                                          : static_cast<char*>(stand_in::address_in(window, peer)) + offset;
  return stand_in::failure_of("ncclGetPeerDevicePointer");
}
