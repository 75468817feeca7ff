#include <cstdlib>

#include "fake_nccl.hpp"

// What newer versions of NCCL have: memory that peers reach.

FAKE_NCCL_EXPORT int ncclMemAlloc(void** at, std::size_t bytes) {
  if (const int result = fake::failure_of("ncclMemAlloc")) return result;
  *at = std::malloc(bytes);
  fake::count(1);
  return 0;
}

FAKE_NCCL_EXPORT int ncclMemFree(void* at) {
  std::free(at);
  fake::count(-1);
  return 0;
}

FAKE_NCCL_EXPORT int ncclCommWindowRegister(fake::Communicator* comm, void* at, std::size_t bytes,
                                            fake::Window** window, int flags) {
  if (flags != 1) return 4;
  if (const int result = fake::failure_of("ncclCommWindowRegister")) return result;
  return fake::enqueue_window(comm, {at, bytes}, window);
}

FAKE_NCCL_EXPORT int ncclCommWindowDeregister(fake::Communicator*, fake::Window* window) {
  fake::drop(window);
  return 0;
}

FAKE_NCCL_EXPORT int ncclGetPeerDevicePointer(fake::Window* window, std::size_t offset, int peer, void** at) {
  *at = peer == fake::faults().hidden ? nullptr : static_cast<char*>(fake::address_in(window, peer)) + offset;
  return fake::failure_of("ncclGetPeerDevicePointer");
}
