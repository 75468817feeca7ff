#include "fake_nccl.hpp"

// A library that lacks almost everything.
FAKE_NCCL_EXPORT int ncclGetVersion(int* version) {
  *version = 23007;
  return 0;
}
