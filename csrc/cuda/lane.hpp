#pragma once

#include <cuda_runtime.h>

namespace xc {

// A stream of high priority beside the streams of others, on the GPU that is current when it is made, in
// which each of its functions is called. What is queued on it is to begin as soon as it can, whatever else
// the GPU has to do.
class Lane {
 public:
  Lane();
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  cudaStream_t stream() const { return stream_; }
  // What is queued here from now on comes after what is on the other stream now; and the other way round.
  void fork_from(cudaStream_t other);
  void join_to(cudaStream_t other);

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;  // wherever they were recorded last
};

}  // namespace xc
