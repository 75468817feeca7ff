#include "cuda/lane.hpp"

#include "cuda/check.hpp"

namespace xc {
namespace {

// A wait refers to what the event recorded last when the wait is queued, so an event may be recorded again.
void order(cudaEvent_t event, cudaStream_t first, cudaStream_t second) {
  check(cudaEventRecord(event, first), "recording an event");
  check(cudaStreamWaitEvent(second, event, 0), "letting a stream wait for an event");
}

}  // namespace

Lane::Lane() {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for the priorities of streams");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "creating a stream");
  stream_.reset(stream);
}

void Lane::fork_from(cudaStream_t other) { order(forked_.get(), other, stream()); }

void Lane::join_to(cudaStream_t other) { order(joined_.get(), stream(), other); }

}  // namespace xc
