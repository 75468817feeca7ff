#include "cuda/memory.hpp"

#include <cuda_runtime.h>

#include "cuda/check.hpp"
#include "cuda/ipc.hpp"

namespace xc {
namespace {

constexpr std::size_t kLeast = 256;
constexpr std::size_t kShared = std::size_t{2} << 20;  // what is exported is exported in blocks of so much

std::byte* allocate(std::size_t bytes) {
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

std::shared_ptr<Mapping> open(const MemoryTicket& ticket, std::size_t bytes) {
  if (ticket.process == getpid())
    return std::make_shared<Mapping>(reinterpret_cast<std::byte*>(ticket.address), bytes, [] {});
  void* at = nullptr;
  check(cudaIpcOpenMemHandle(&at, ticket.handle, cudaIpcMemLazyEnablePeerAccess),
        "opening the memory of another rank's GPU (do the GPUs reach each other, and do the ranks share the "
        "host's process and IPC namespaces?)");
  return std::make_shared<Mapping>(static_cast<std::byte*>(at), bytes, [at] { cudaIpcCloseMemHandle(at); });
}

}  // namespace

std::shared_ptr<std::byte> allocate_device_memory(std::size_t bytes) {
  return {allocate(bytes), [](std::byte* at) { cudaFree(at); }};
}

std::shared_ptr<std::byte> allocate_mapped_memory(std::size_t bytes) {
  void* at = nullptr;
  check(cudaHostAlloc(&at, bytes > kLeast ? bytes : kLeast, cudaHostAllocMapped | cudaHostAllocPortable),
        "pinning memory of the host");
  std::memset(at, 0, bytes);
  return {static_cast<std::byte*>(at), [](std::byte* mine) { cudaFreeHost(mine); }};
}

Shared share_device_memory(Team& team, std::size_t bytes) {
  std::shared_ptr<Mapping> own;
  MemoryTicket mine{};
  team.agree<DeviceError>(complaint_of([&] {
    std::byte* const at = allocate((bytes + kShared - 1) / kShared * kShared);
    own = std::make_shared<Mapping>(at, bytes, [at] { cudaFree(at); });
    if (team.size() > 1) mine = ticket_of(at);
  }));
  if (team.size() == 1) return {own};
  const auto tickets = exchange_tickets(team, mine);
  Shared all;
  team.agree<DeviceError>(complaint_of([&] {
    for (int p = 0; p < team.size(); ++p)
      all.push_back(p == team.place() ? own : open(tickets[static_cast<std::size_t>(p)], bytes));
  }));
  return all;
}

}  // namespace xc
