#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda.hpp"

// What the parts of the stand-in know of one another. Nothing of it is ever destroyed, as threads of streams
// run until the process ends.

namespace fake_cuda {

// What CUDA leaves undefined: the program ends here.
[[noreturn]] void misuse(const std::string& what);

// One call of the runtime: counted, failed if that was asked for, and its error remembered.
cudaError_t call(const char* function, const std::function<cudaError_t()>& body);

int current_device();
int device_count();

using Work = std::function<void()>;

// The stream that a handle means on the current device.
FakeStream& stream_of(cudaStream_t handle);
// Queues work, or records it while the stream captures.
cudaError_t queue(cudaStream_t handle, Work work);
// Returns when all that this process has queued on a device has run.
void drain(int device);
// Whether this thread must not make or free memory now, as a stream captures.
bool capturing_forbids();
bool captures(cudaStream_t handle);

int events_left();
int memory_left();

// A file in memory with one page in front for what the processes that open it share.
class SharedPages {
 public:
  static std::shared_ptr<SharedPages> make(std::size_t bytes);
  // Null if it is not there any more.
  static std::shared_ptr<SharedPages> open(const char* handle);
  void write_handle(char* handle) const;
  ~SharedPages();
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  struct Front {
    std::atomic<std::uint64_t> serial;
    std::atomic<int> opened;  // by other processes, now
    std::atomic<bool> gone;   // its owner has destroyed it
    std::atomic<std::uint64_t> recorded, completed;
  };
  Front& front() const { return *reinterpret_cast<Front*>(front_); }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  bool is_own() const { return fd_ >= 0; }

 private:
  SharedPages(int fd, bool own, std::size_t bytes);
  int fd_ = -1;
  std::size_t bytes_;
  std::byte* front_;
  std::byte* room_;  // with a page at either end that nobody may touch
  std::byte* data_;
};

}  // namespace fake_cuda

struct FakeGraph {
  std::vector<fake_cuda::Work> work;
};

struct FakeStream {
  FakeStream(int on, bool blocks);
  std::uint64_t push(fake_cuda::Work work);
  std::uint64_t last();
  void wait_for(std::uint64_t number);

  const int device;
  const bool blocking;  // takes turns with the device's null stream
  FakeGraph* graph = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::atomic<std::int64_t> delay_ms{0};

 private:
  void run();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<fake_cuda::Work> queue_;
  std::uint64_t pushed_ = 0, done_ = 0;
};
