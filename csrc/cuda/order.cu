#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/ipc.hpp"
#include "cuda/memory.hpp"
#include "cuda/order.hpp"

namespace xc {
namespace {

cudaStream_t cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

// ---- events ----

// Two of them take turns: the one that a fast rank records next is not the one that a slow rank has still to
// wait for.
class EventOrder final : public Order {
 public:
  explicit EventOrder(Team& team) : place_(std::size_t(team.place())) {
    for (Turn& turn : turns_) {
      Ticket<cudaIpcEventHandle_t> mine{};
      team.agree<DeviceError>(complaint_of([&] { mine = make(turn); }));
      const auto tickets = exchange_tickets(team, mine);
      team.agree<DeviceError>(complaint_of([&] {
        for (const auto& ticket : tickets) open(ticket, turn);
      }));
    }
  }
  ~EventOrder() override {
    for (Turn& turn : turns_) {
      for (const cudaEvent_t event : turn.opened) cudaEventDestroy(event);
      if (turn.own) cudaEventDestroy(turn.own);
    }
  }
  EventOrder(const EventOrder&) = delete;
  EventOrder& operator=(const EventOrder&) = delete;

  void announce(Stream stream) override {
    now_ = (now_ + 1) % 2;
    xc::check(cudaEventRecord(turns_[now_].own, cuda(stream)), "recording an event");
  }
  void follow(Stream stream) override {
    const auto& events = turns_[now_].events;
    for (std::size_t p = 0; p < events.size(); ++p)
      if (p != place_) xc::check(cudaStreamWaitEvent(cuda(stream), events[p], 0), "waiting for an event");
  }

 private:
  struct Turn {
    cudaEvent_t own = nullptr;
    std::vector<cudaEvent_t> events = {};  // of all members
    std::vector<cudaEvent_t> opened = {};
  };

  static Ticket<cudaIpcEventHandle_t> make(Turn& turn) {
    xc::check(cudaEventCreateWithFlags(&turn.own, cudaEventDisableTiming | cudaEventInterprocess),
              "creating an event");
    Ticket<cudaIpcEventHandle_t> mine{getpid(), reinterpret_cast<std::uint64_t>(turn.own), {}};
    xc::check(cudaIpcGetEventHandle(&mine.handle, turn.own), "getting an event's handle");
    return mine;
  }

  // Of threads in one process the event itself serves.
  static void open(const Ticket<cudaIpcEventHandle_t>& ticket, Turn& turn) {
    auto event = reinterpret_cast<cudaEvent_t>(ticket.address);
    if (ticket.process != getpid()) {
      xc::check(cudaIpcOpenEventHandle(&event, ticket.handle), "opening a peer's event");
      turn.opened.push_back(event);
    }
    turn.events.push_back(event);
  }

  std::size_t place_;
  Turn turns_[2];
  int now_ = 0;
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
class SpinOrder final : public Order {
 public:
  explicit SpinOrder(Team& team)
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
                        std::to_string(int(team_.limits().inside_pass.count())) + " s (announcement " +
                        std::to_string(seen.epoch) +
                        "); weights and state are no longer to be trusted: go back to the last checkpoint",
                    rank, 0, "late", "");
  }

  void announce(Stream stream) override {
    check();
    write_flags<<<1, members(), 0, cuda(stream)>>>(table(), members(), team_.place(), ++epoch_);
    xc::check(cudaGetLastError(), "starting a kernel");
  }
  void follow(Stream stream) override {
    check();
    await_flags<<<1, members(), 0, cuda(stream)>>>(flags_[static_cast<std::size_t>(team_.place())], members(),
                                                   epoch_, patience(), &report());
    xc::check(cudaGetLastError(), "starting a kernel");
  }

 private:
  int members() const { return team_.size(); }
  Flags* const* table() const { return reinterpret_cast<Flags* const*>(table_.get()); }
  Report& report() const { return *reinterpret_cast<Report*>(report_.get()); }
  std::uint64_t patience() const {
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(team_.limits().inside_pass).count());
  }

  Team& team_;
  Shared memory_;
  std::shared_ptr<std::byte> table_;
  std::shared_ptr<std::byte> report_;
  std::vector<Flags*> flags_;
  Flags epoch_ = 0;
};

}  // namespace

std::unique_ptr<Order> make_order(Team& team, Sync sync) {
  if (team.size() == 1) return nullptr;
  if (sync == Sync::event) return std::make_unique<EventOrder>(team);
  return std::make_unique<SpinOrder>(team);
}

Sync sync_from(std::string_view name) {
  if (name == "event") return Sync::event;
  if (name == "spin") return Sync::spin;
  throw UsageError("XC_GPU_SYNC is event or spin, not " + std::string(name));
}

}  // namespace xc
