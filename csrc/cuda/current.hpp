#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/check.hpp"

namespace xc {

// What follows concerns this GPU, and the caller's goes back to what it was.
class Current {
 public:
  explicit Current(int index) : index_(index) {
    check(cudaGetDevice(&before_), "asking for the current GPU");
    if (before_ != index_) check(cudaSetDevice(index_), "choosing GPU " + std::to_string(index_));
  }
  ~Current() {
    if (before_ != index_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int index_;
  int before_ = 0;
};

}  // namespace xc
