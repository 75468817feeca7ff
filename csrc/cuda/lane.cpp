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
  check(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest), "making a stream");
  check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "making an event");
  check(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming), "making an event");
}

Lane::~Lane() {
  cudaEventDestroy(joined_);
  cudaEventDestroy(forked_);
  cudaStreamDestroy(stream_);
}

void Lane::fork_from(cudaStream_t other) { order(forked_, other, stream_); }

void Lane::join_to(cudaStream_t other) { order(joined_, stream_, other); }

}  // namespace xc
