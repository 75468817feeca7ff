#include <algorithm>
#include <list>
#include <map>
#include <set>

#include "cuda.h"
#include "state.hpp"

using namespace fake_cuda;
using namespace std::chrono_literals;

// ---- queues ----

FakeStream::FakeStream(int on, bool blocks) : device(on), blocking(blocks) {
  std::thread([this] { run(); }).detach();
}

std::uint64_t FakeStream::push(Work work) {
  const std::chrono::milliseconds late(delay_ms.load());
  const std::lock_guard lock(mutex_);
  queue_.push_back([late, work = std::move(work)] {
    if (late > 0ms) std::this_thread::sleep_for(late);
    work();
  });
  changed_.notify_all();
  return ++pushed_;
}

std::uint64_t FakeStream::last() {
  const std::lock_guard lock(mutex_);
  return pushed_;
}

void FakeStream::wait_for(std::uint64_t number) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_ >= number; });
}

void FakeStream::run() {
  for (;;) {
    Work work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !queue_.empty(); });
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
    work = nullptr;
    const std::lock_guard lock(mutex_);
    ++done_;
    changed_.notify_all();
  }
}

namespace {

// All streams of the process, in the order in which they were made; the null streams among them.
struct Streams {
  std::recursive_mutex mutex;
  std::list<FakeStream*> all;
  std::map<int, FakeStream*> null;
};

Streams& streams() {
  static auto* const streams = new Streams;
  return *streams;
}

FakeStream* add_stream(int device, bool blocking) {
  auto* const stream = new FakeStream(device, blocking);
  streams().all.push_back(stream);
  return stream;
}

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

bool is_null(const FakeStream& stream) {
  const auto found = streams().null.find(stream.device);
  return found != streams().null.end() && found->second == &stream;
}

// The null stream comes after all streams that block, and they after it.
void follow_neighbours(FakeStream& stream) {
  if (!stream.blocking) return;
  for (FakeStream* const other : streams().all) {
    if (other == &stream || other->device != stream.device || !other->blocking) continue;
    if (!is_null(stream) && !is_null(*other)) continue;
    if (const std::uint64_t number = other->last()) stream.push([=] { other->wait_for(number); });
  }
}

bool breaks_a_capture(const FakeStream& stream) {
  if (!is_null(stream)) return false;
  return std::any_of(streams().all.begin(), streams().all.end(), [&](const FakeStream* other) {
    return other->device == stream.device && other->blocking && other->graph;
  });
}

}  // namespace

FakeStream& fake_cuda::stream_of(cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  if (!handle) {
    FakeStream*& null = streams().null[current_device()];
    if (!null) null = add_stream(current_device(), true);
    return *null;
  }
  const auto& all = streams().all;
  if (std::find(all.begin(), all.end(), handle) == all.end()) misuse("a stream that does not exist");
  return *handle;
}

cudaError_t fake_cuda::queue(cudaStream_t handle, Work work) {
  const std::lock_guard lock(streams().mutex);
  FakeStream& stream = stream_of(handle);
  if (stream.device != current_device()) return cudaErrorInvalidResourceHandle;
  if (breaks_a_capture(stream)) return cudaErrorStreamCaptureImplicit;
  if (stream.graph) {
    stream.graph->work.push_back(std::move(work));
    return cudaSuccess;
  }
  follow_neighbours(stream);
  stream.push(std::move(work));
  return cudaSuccess;
}

void fake_cuda::drain(int device) {
  std::vector<std::pair<FakeStream*, std::uint64_t>> queued;
  {
    const std::lock_guard lock(streams().mutex);
    for (FakeStream* const stream : streams().all)
      if (stream->device == device) queued.emplace_back(stream, stream->last());
  }
  for (const auto& [stream, number] : queued) stream->wait_for(number);
}

bool fake_cuda::capturing_forbids() {
  if (capture_mode == cudaStreamCaptureModeRelaxed) return false;
  const std::lock_guard lock(streams().mutex);
  return std::any_of(streams().all.begin(), streams().all.end(), [](const FakeStream* stream) {
    return stream->graph && stream->mode == cudaStreamCaptureModeGlobal;
  });
}

bool fake_cuda::captures(cudaStream_t handle) { return stream_of(handle).graph != nullptr; }

void fake_cuda::delay(cudaStream_t stream, std::chrono::milliseconds time) {
  stream_of(stream).delay_ms = time.count();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return call(__func__, [&] {
    const std::lock_guard lock(streams().mutex);
    *stream = add_stream(current_device(), !(flags & cudaStreamNonBlocking));
    return cudaSuccess;
  });
}

// Its thread stays, and waits for ever.
// Here all streams run side by side, so priorities mean nothing.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return call(__func__, [&] {
    *least = *greatest = 0;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call(__func__, [&] {
    stream_of(stream).wait_for(stream->last());
    const std::lock_guard lock(streams().mutex);
    streams().all.remove(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return call(__func__, [&] {
    FakeStream& stream = stream_of(handle);
    if (stream.graph || breaks_a_capture(stream)) return cudaErrorStreamCaptureUnsupported;
    stream.wait_for(stream.last());
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    drain(current_device());
    return cudaSuccess;
  });
}

cudaError_t fake_cuda_launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
  return call("cudaLaunchKernelEx", [&] {
    if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024)
      return cudaErrorInvalidValue;
    return queue(config.stream, [grid = config.gridDim, block = config.blockDim, thread] {
      fake_cuda_run(grid, block, thread);
    });
  });
}

// ---- events ----

struct FakeEvent {
  std::shared_ptr<SharedPages> pages;
  int device;
  bool interprocess;
};

namespace {

struct Events {
  std::mutex mutex;
  std::set<cudaEvent_t> live;
};

Events& events() {
  static auto* const events = new Events;
  return *events;
}

cudaEvent_t add_event(std::shared_ptr<SharedPages> pages, bool interprocess) {
  const std::lock_guard lock(events().mutex);
  return *events().live.insert(new FakeEvent{std::move(pages), current_device(), interprocess}).first;
}

std::shared_ptr<SharedPages> pages_of(cudaEvent_t event) {
  const std::lock_guard lock(events().mutex);
  if (events().live.count(event) == 0) misuse("an event that does not exist");
  if (event->pages->front().gone) misuse("an event that its owner has destroyed");
  return event->pages;
}

void wait_for_value(const std::atomic<std::uint64_t>& counter, std::uint64_t value) {
  while (counter.load() < value) std::this_thread::sleep_for(20us);
}

}  // namespace

int fake_cuda::events_left() {
  const std::lock_guard lock(events().mutex);
  return static_cast<int>(events().live.size());
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call(__func__, [&] {
    const bool interprocess = flags & cudaEventInterprocess;
    if (interprocess && !(flags & cudaEventDisableTiming)) return cudaErrorInvalidValue;
    *event = add_event(SharedPages::make(1), interprocess);
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    if (pages->is_own() && pages->front().opened > 0) misuse("an event is destroyed that others have open");
    if (pages->is_own())
      pages->front().gone = true;
    else
      --pages->front().opened;
    const std::lock_guard lock(events().mutex);
    events().live.erase(event);
    delete event;
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    if (event->device != stream_of(stream).device) return cudaErrorInvalidResourceHandle;
    const std::uint64_t number = ++pages->front().recorded;
    return queue(stream, [=] { pages->front().completed = number; });
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    const std::uint64_t number = pages->front().recorded;
    return queue(stream, [=] { wait_for_value(pages->front().completed, number); });
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    return pages->front().completed < pages->front().recorded ? cudaErrorNotReady : cudaSuccess;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    wait_for_value(pages->front().completed, pages->front().recorded);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  return call(__func__, [&] {
    const auto pages = pages_of(event);
    if (!event->interprocess || !pages->is_own()) return cudaErrorInvalidResourceHandle;
    pages->write_handle(handle->reserved);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  return call(__func__, [&] {
    auto pages = SharedPages::open(handle.reserved);
    if (!pages) return cudaErrorInvalidResourceHandle;
    *event = add_event(std::move(pages), false);
    return cudaSuccess;
  });
}

// ---- captures ----

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return call(__func__, [&] {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  return call(__func__, [&] {
    const FakeStream& stream = stream_of(handle);
    if (breaks_a_capture(stream)) return cudaErrorStreamCaptureImplicit;
    *status = stream.graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  return call(__func__, [&] {
    if (!handle) return cudaErrorStreamCaptureUnsupported;
    FakeStream& stream = stream_of(handle);
    stream.graph = new FakeGraph;
    stream.mode = mode;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  return call(__func__, [&] {
    *graph = std::exchange(stream_of(handle).graph, nullptr);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return call(__func__, [&] {
    *executable = new FakeGraph(*graph);
    return cudaSuccess;
  });
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return call(__func__, [&] {
    return queue(stream, [work = executable->work] {
      for (const Work& each : work) each();
    });
  });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

// ---- operations on words ----

namespace {

std::atomic_ref<std::uint32_t> word_at(CUdeviceptr at) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(at));
}

CUresult of_driver(cudaError_t error) { return static_cast<CUresult>(error); }

}  // namespace

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned) {
  return of_driver(call(__func__, [&] { return queue(stream, [=] { word_at(at).store(value); }); }));
}

CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned) {
  return of_driver(call(__func__, [&] {
    return queue(stream, [=] {
      while (static_cast<std::int32_t>(word_at(at).load() - value) < 0) std::this_thread::sleep_for(20us);
    });
  }));
}
