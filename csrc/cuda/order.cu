#include "cuda/order.hpp"

#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/ipc.hpp"
#include "cuda/memory.hpp"

namespace xc {
namespace {

cudaStream_t cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

// ---- events ----

class EventOrder final : public Order {
 public:
  explicit EventOrder(Team& team) : place_(std::size_t(team.place())) {
    Ticket<cudaIpcEventHandle_t> mine{};
    team.agree<DeviceError>(complaint_of([&] { mine = make(); }));
    const auto tickets = exchange_tickets(team, mine);
    team.agree<DeviceError>(complaint_of([&] {
      for (const auto& ticket : tickets) open(ticket);
    }));
  }
  ~EventOrder() override {
    for (const cudaEvent_t event : opened_) cudaEventDestroy(event);
    if (own_) cudaEventDestroy(own_);
  }
  EventOrder(const EventOrder&) = delete;
  EventOrder& operator=(const EventOrder&) = delete;

  void announce(Stream stream) override { check(cudaEventRecord(own_, cuda(stream)), "recording an event"); }
  void follow(Stream stream) override {
    for (std::size_t p = 0; p < events_.size(); ++p)
      if (p != place_) xc::check(cudaStreamWaitEvent(cuda(stream), events_[p], 0), "waiting for an event");
  }

 private:
  using Order::check;
  static void check(cudaError_t code, const char* doing) { xc::check(code, doing); }

  Ticket<cudaIpcEventHandle_t> make() {
    xc::check(cudaEventCreateWithFlags(&own_, cudaEventDisableTiming | cudaEventInterprocess),
              "creating an event");
    Ticket<cudaIpcEventHandle_t> mine{getpid(), reinterpret_cast<std::uint64_t>(own_), {}};
    xc::check(cudaIpcGetEventHandle(&mine.handle, own_), "getting an event's handle");
    return mine;
  }

  // Of threads in one process the event itself serves.
  void open(const Ticket<cudaIpcEventHandle_t>& ticket) {
    auto event = reinterpret_cast<cudaEvent_t>(ticket.address);
    if (ticket.process != getpid()) {
      xc::check(cudaIpcOpenEventHandle(&event, ticket.handle), "opening a peer's event");
      opened_.push_back(event);
    }
    events_.push_back(event);
  }

  std::size_t place_;
  cudaEvent_t own_ = nullptr;
  std::vector<cudaEvent_t> events_;
  std::vector<cudaEvent_t> opened_;
};

// ---- words in the ranks' memory ----

// A rank's own words, one for each member, in which that member counts its announcements.
using Flags = std::uint32_t;

// Why a follower gave up, in the host's memory, where the device writes it.
struct Report {
  std::uint32_t gave_up;
  std::uint32_t place;  // of the rank that did not come
  std::uint32_t epoch;
};

__global__ void write_flags(Flags* const* flags, int members, int place, Flags epoch) {
  const int p = static_cast<int>(threadIdx.x);
  __threadfence_system();
  if (p < members) *static_cast<volatile Flags*>(flags[p] + place) = epoch;
}

__device__ std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Counters wrap around, so what counts is the sign of the difference.
__global__ void await_flags(const Flags* own, int members, Flags epoch, std::uint64_t patience,
                            volatile Report* report) {
  const int p = static_cast<int>(threadIdx.x);
  if (p >= members) return;
  const std::uint64_t begin = nanoseconds();
  while (static_cast<std::int32_t>(*static_cast<const volatile Flags*>(own + p) - epoch) < 0) {
    if (report->gave_up) return;
    if (nanoseconds() - begin > patience) {
      report->place = static_cast<std::uint32_t>(p);
      report->epoch = epoch;
      __threadfence_system();
      report->gave_up = 1;
      return;
    }
    __nanosleep(200);
  }
  __threadfence_system();
}

// The words of all members, as this rank reaches them.
class FlagOrder : public Order {
 public:
  explicit FlagOrder(Team& team)
      : team_(team),
        memory_(share_device_memory(team, sizeof(Flags) * static_cast<std::size_t>(team.size()))),
        table_(allocate_device_memory(sizeof(Flags*) * static_cast<std::size_t>(team.size()))),
        report_(allocate_mapped_memory(sizeof(Report))) {
    for (const auto& mapping : memory_) flags_.push_back(reinterpret_cast<Flags*>(mapping->data()));
    xc::check(cudaMemcpy(table_.get(), flags_.data(), flags_.size() * sizeof(Flags*), cudaMemcpyHostToDevice),
              "copying to the device");
  }

  // Thrown by every later call as well: what this rank computed since is worth nothing.
  void check() override {
    const volatile Report& seen = report();
    if (!seen.gave_up) return;
    const int rank = team_.member(static_cast<int>(seen.place));
    throw PeerError("rank " + std::to_string(rank) + " did not bring its work on the GPU to an end within " +
                        std::to_string(int(team_.limits().inside_pass.count())) +
                        " s (announcement " + std::to_string(seen.epoch) +
                        "); weights and state are no longer to be trusted: go back to the last checkpoint",
                    rank, 0, "late", "");
  }

 protected:
  Flags next() { return ++epoch_; }
  Flags epoch() const { return epoch_; }
  int members() const { return team_.size(); }
  int place() const { return team_.place(); }
  const std::vector<Flags*>& flags() const { return flags_; }
  Flags* const* table() const { return reinterpret_cast<Flags* const*>(table_.get()); }
  Report& report() const { return *reinterpret_cast<Report*>(report_.get()); }
  std::uint64_t patience() const {
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(team_.limits().inside_pass).count());
  }

 private:
  Team& team_;
  Shared memory_;
  std::shared_ptr<std::byte> table_;
  std::shared_ptr<std::byte> report_;
  std::vector<Flags*> flags_;
  Flags epoch_ = 0;
};

class SpinOrder final : public FlagOrder {
 public:
  using FlagOrder::FlagOrder;
  void announce(Stream stream) override {
    check();
    write_flags<<<1, members(), 0, cuda(stream)>>>(table(), members(), place(), next());
    xc::check(cudaGetLastError(), "starting a kernel");
  }
  void follow(Stream stream) override {
    check();
    await_flags<<<1, members(), 0, cuda(stream)>>>(flags()[static_cast<std::size_t>(place())], members(),
                                                   epoch(), patience(), &report());
    xc::check(cudaGetLastError(), "starting a kernel");
  }
};

// ---- the stream's own operations ----

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  xc::check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (!found) throw DeviceError(std::string("this driver has no ") + name);
  return reinterpret_cast<Function>(found);
}

class MemopOrder final : public FlagOrder {
 public:
  explicit MemopOrder(Team& team)
      : FlagOrder(team),
        write_(driver_function<Operation>("cuStreamWriteValue32")),
        wait_(driver_function<Operation>("cuStreamWaitValue32")) {}

  void announce(Stream stream) override {
    const Flags epoch = next();
    for (Flags* const flags : this->flags())
      require(write_(static_cast<CUstream>(stream), address(flags + place()), epoch, 0));
  }
  void follow(Stream stream) override {
    Flags* const own = flags()[static_cast<std::size_t>(place())];
    for (int p = 0; p < members(); ++p)
      require(wait_(static_cast<CUstream>(stream), address(own + p), epoch(), CU_STREAM_WAIT_VALUE_GEQ));
  }

 private:
  using Operation = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
  static CUdeviceptr address(const Flags* flag) { return reinterpret_cast<CUdeviceptr>(flag); }
  static void require(CUresult code) {
    if (code != CUDA_SUCCESS)
      throw DeviceError("an operation of the stream on memory failed with the driver's code " +
                        std::to_string(static_cast<int>(code)) + "; take XC_GPU_SYNC=event");
  }
  Operation write_, wait_;
};

}  // namespace

std::unique_ptr<Order> make_order(Team& team, Sync sync) {
  if (team.size() == 1) return nullptr;
  if (sync == Sync::event) return std::make_unique<EventOrder>(team);
  if (sync == Sync::spin) return std::make_unique<SpinOrder>(team);
  return std::make_unique<MemopOrder>(team);
}

Sync sync_from(std::string_view name) {
  if (name == "event") return Sync::event;
  if (name == "spin") return Sync::spin;
  if (name == "memop") return Sync::memop;
  throw UsageError("XC_GPU_SYNC is event, spin or memop, not " + std::string(name));
}

}  // namespace xc
