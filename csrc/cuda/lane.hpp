#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <type_traits>

#include "cuda/event.hpp"

namespace xc {

// A stream of high priority beside the streams of others, on the GPU that is current when it is made, as it
// is in each of its functions: what is queued here is to begin as soon as it can, whatever else the GPU has
// to do.
class Lane {
 public:
  Lane();

  cudaStream_t stream() const { return stream_.get(); }
  // What is queued here from now on comes after what is on the other stream now; and the other way round.
  void fork_from(cudaStream_t other);
  void join_to(cudaStream_t other);

 private:
  struct DestroyStream {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  };

  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream> stream_;
  Event forked_ = make_event(), joined_ = make_event();  // wherever they were recorded last
};

}  // namespace xc
