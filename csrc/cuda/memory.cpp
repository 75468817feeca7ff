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
  WhileCapturing() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "asking for memory while capturing");
  }
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

std::byte* allocate(std::size_t bytes) {
  const WhileCapturing allowed;
  void* at = nullptr;
  const std::size_t wanted = bytes > kLeast ? bytes : kLeast;
  check(cudaMalloc(&at, wanted), "allocating " + std::to_string(wanted) + " bytes on the GPU");
  if (const cudaError_t code = cudaMemset(at, 0, wanted); code != cudaSuccess) {
    cudaFree(at);
    check(code, "clearing memory on the GPU");
  }
  return static_cast<std::byte*>(at);
}

using MemoryTicket = Ticket<cudaIpcMemHandle_t>;

MemoryTicket ticket_of(std::byte* at) {
  MemoryTicket ticket{getpid(), reinterpret_cast<std::uint64_t>(at), {}};
  check(cudaIpcGetMemHandle(&ticket.handle, at), "exporting memory of the GPU to other processes");
  return ticket;
}

// A look at another rank's memory; threads of one process have its address.
std::shared_ptr<Mapping> open(const MemoryTicket& ticket, std::size_t bytes, std::shared_ptr<Mapping> word) {
  const bool is_here = ticket.process == getpid();
  void* at = reinterpret_cast<void*>(ticket.address);
  if (!is_here)
    check(
        cudaIpcOpenMemHandle(&at, ticket.handle, cudaIpcMemLazyEnablePeerAccess),
        "opening the memory of another rank's GPU (do the GPUs reach each other, and do the ranks share the "
        "host's process and IPC namespaces?)");
  return std::make_shared<Mapping>(static_cast<std::byte*>(at), bytes, [=] {
    if (!is_here) cudaIpcCloseMemHandle(at);
    count_closed(*word);
  });
}

}  // namespace

std::shared_ptr<std::byte> allocate_device_memory(std::size_t bytes) {
  return {allocate(bytes), &free_memory};
}

std::shared_ptr<std::byte> allocate_mapped_memory(std::size_t bytes) {
  const WhileCapturing allowed;
  void* at = nullptr;
  check(cudaHostAlloc(&at, bytes > kLeast ? bytes : kLeast, cudaHostAllocMapped | cudaHostAllocPortable),
        "pinning memory of the host");
  std::memset(at, 0, bytes);
  return {static_cast<std::byte*>(at), &free_pinned};
}

Shared share_device_memory(Team& team, std::size_t bytes) {
  const Shared words = team.share(sizeof(std::uint32_t));
  const auto others = static_cast<std::uint32_t>(team.size() - 1);
  const auto place = static_cast<std::size_t>(team.place());
  std::shared_ptr<Mapping> own;
  MemoryTicket mine{};
  team.agree<DeviceError>(complaint_of([&] {
    std::byte* const at = allocate((bytes + kShared - 1) / kShared * kShared);
    own = std::make_shared<Mapping>(at, bytes, [at, others, word = words[place]] {
      free_when_closed(word, others, [at] { free_memory(at); });
    });
    if (others > 0) mine = ticket_of(at);
  }));
  if (others == 0) return {own};
  const auto tickets = exchange_tickets(team, mine);
  Shared all;
  team.agree<DeviceError>(complaint_of([&] {
    for (std::size_t p = 0; p < tickets.size(); ++p)
      all.push_back(p == place ? own : open(tickets[p], bytes, words[p]));
  }));
  return all;
}

}  // namespace xc
