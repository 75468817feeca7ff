#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/launch.cuh"
#include "cuda/memory.hpp"
#include "cuda/order.hpp"
#include "cuda/system.cuh"

namespace xc {
namespace {

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
  if (p < members) store_to_system(flags[p] + place, epoch);
}

// Counters wrap around, so what counts is the sign of the difference.
__global__ void await_flags(const Flags* own, int members, Flags epoch, std::uint64_t patience,
                            Report* report) {
  const int p = static_cast<int>(threadIdx.x);
  if (p >= members) return;
  const std::uint64_t begin = system_clock();
  while (static_cast<std::int32_t>(load_from_system(own + p) - epoch) < 0) {
    if (load_from_system(&report->gave_up)) return;
    if (system_clock() - begin > patience) {
      report->place = static_cast<std::uint32_t>(p);
      report->epoch = epoch;
      store_to_system(&report->gave_up, 1);
      return;
    }
    __nanosleep(200);
  }
}

// The words of all members, as this rank reaches them.
class SpinOrder final : public Order {
 public:
  explicit SpinOrder(Team& team)
      : team_(team),
        memory_(share_device_memory(team, sizeof(Flags) * static_cast<std::size_t>(team.size()))) {
    for (const auto& mapping : memory_) flags_.push_back(reinterpret_cast<Flags*>(mapping->data()));
    team.agree<DeviceError>(complaint_of([&] {
      const std::size_t bytes = flags_.size() * sizeof(Flags*);
      report_ = allocate_mapped_memory(sizeof(Report));
      table_ = allocate_device_memory(bytes);
      xc::check(cudaMemcpy(table_.get(), flags_.data(), bytes, cudaMemcpyHostToDevice),
                "copying to the device");
    }));
  }

  // Thrown by every later call as well: what this rank computed since is worth nothing.
  void check() override {
    if (std::atomic_ref(report().gave_up).load())
      raise_late(team_, static_cast<int>(report().place), report().epoch);
  }

  void announce(Stream stream) override {
    check();
    start(&write_flags, 1, members(), static_cast<cudaStream_t>(stream), table(), members(), team_.place(),
          epoch_ + 1);
    ++epoch_;
  }
  void follow(Stream stream) override {
    check();
    start(&await_flags, 1, members(), static_cast<cudaStream_t>(stream),
          flags_[static_cast<std::size_t>(team_.place())], members(), epoch_, patience(), &report());
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

std::unique_ptr<Order> make_spin_order(Team& team) { return std::make_unique<SpinOrder>(team); }

}  // namespace xc
