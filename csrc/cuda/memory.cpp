#include "cuda/memory.hpp"

#include <cuda_runtime.h>

#include "cuda/check.hpp"
#include "cuda/exported.hpp"
#include "cuda/ipc.hpp"

namespace xc {
namespace {

constexpr std::size_t kLeast = 256;
constexpr std::size_t kShared = std::size_t{2} << 20;  // what is exported is exported in blocks of so much

// While a stream captures, memory may only be made or freed by threads that say that they know what they do.
class WhileCapturing {
 public:
  WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  WhileCapturing(const WhileCapturing&) = delete;
  WhileCapturing& operator=(const WhileCapturing&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void free_memory(std::byte* at) {
  const WhileCapturing allowed;
  cudaFree(at);
}

void free_pinned(std::byte* at) {
  const WhileCapturing allowed;
  cudaFreeHost(at);
}

// It is zeroed on return: streams that the null stream does not wait for, and peers, may use it at once.
std::shared_ptr<std::byte> allocate(std::size_t bytes) {
  const WhileCapturing allowed;
  void* at = nullptr;
  const std::size_t wanted = bytes > kLeast ? bytes : kLeast;
  check(cudaMalloc(&at, wanted), "allocating " + std::to_string(wanted) + " bytes on the GPU");
  const std::shared_ptr<std::byte> memory(static_cast<std::byte*>(at), &free_memory);
  check(cudaMemset(at, 0, wanted), "clearing memory of the GPU");
  check(cudaStreamSynchronize(nullptr), "clearing memory of the GPU");
  return memory;
}

using MemoryTicket = Ticket<cudaIpcMemHandle_t>;

MemoryTicket ticket_of(std::byte* at) {
  MemoryTicket ticket{getpid(), reinterpret_cast<std::uint64_t>(at), {}};
  check(cudaIpcGetMemHandle(&ticket.handle, at), "exporting memory of the GPU to other processes");
  return ticket;
}

// What one GPU opened is closed there.
void close(void* at, int device) {
  int before = 0;
  cudaGetDevice(&before);
  if (before != device) cudaSetDevice(device);
  cudaIpcCloseMemHandle(at);
  if (before != device) cudaSetDevice(before);
}

// A look at another rank's memory; threads of one process have its address.
std::shared_ptr<Mapping> open(const MemoryTicket& ticket, std::size_t bytes, std::shared_ptr<void> opened) {
  void* at = reinterpret_cast<void*>(ticket.address);
  if (ticket.process == getpid())
    return std::make_shared<Mapping>(static_cast<std::byte*>(at), bytes, [opened] {});
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaIpcOpenMemHandle(&at, ticket.handle, cudaIpcMemLazyEnablePeerAccess),
        "opening the memory of another rank's GPU (do the GPUs reach each other, and do the ranks share the "
        "host's process and IPC namespaces?)");
  return std::make_shared<Mapping>(static_cast<std::byte*>(at), bytes, [=] {
    close(at, device);
    (void)opened;
  });
}

}  // namespace

std::shared_ptr<std::byte> allocate_device_memory(std::size_t bytes) { return allocate(bytes); }

std::shared_ptr<std::byte> allocate_mapped_memory(std::size_t bytes) {
  const WhileCapturing allowed;
  void* at = nullptr;
  check(cudaHostAlloc(&at, bytes > kLeast ? bytes : kLeast, cudaHostAllocMapped | cudaHostAllocPortable),
        "pinning memory of the host");
  std::memset(at, 0, bytes);
  return {static_cast<std::byte*>(at), &free_pinned};
}

Shared share_device_memory(Team& team, std::size_t bytes) {
  const Export exported(team);
  const auto place = static_cast<std::size_t>(team.place());
  std::shared_ptr<Mapping> own;
  MemoryTicket mine{};
  team.agree<DeviceError>(complaint_of([&] {
    const auto memory = allocate((bytes + kShared - 1) / kShared * kShared);
    own = std::make_shared<Mapping>(memory.get(), bytes, [kept = exported.keep(memory)] {});
    if (team.size() > 1) mine = ticket_of(memory.get());
  }));
  if (team.size() == 1) return {own};
  const auto tickets = exchange_tickets(team, mine);
  Shared all;
  team.agree<DeviceError>(complaint_of([&] {
    for (std::size_t p = 0; p < tickets.size(); ++p)
      all.push_back(p == place ? own : open(tickets[p], bytes, exported.opened(p)));
  }));
  return all;
}

}  // namespace xc
