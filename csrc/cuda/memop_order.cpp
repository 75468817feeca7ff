#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/memory_operations.hpp"
#include "cuda/order.hpp"

namespace xc {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr std::size_t kPage = 4096;

// ---- pinned memory ----

std::mutex pinned_mutex;
std::map<std::byte*, int> pinned;  // how many ranks of this process have a page of it

void pin_page(std::byte* at) {
  const std::lock_guard lock(pinned_mutex);
  if (pinned.count(at) == 0)
    check(cudaHostRegister(at, kPage, cudaHostRegisterMapped | cudaHostRegisterPortable),
          "pinning the ranks' shared memory");
  ++pinned[at];
}

void unpin_page(std::byte* at) {
  const std::lock_guard lock(pinned_mutex);
  if (--pinned[at] > 0) return;
  pinned.erase(at);
  cudaHostUnregister(at);
}

// A page of the ranks' shared memory, for streams of this process.
std::shared_ptr<std::uint32_t> pin(const std::shared_ptr<Mapping>& memory) {
  pin_page(memory->data());
  const std::shared_ptr<void> held(nullptr, [memory](void*) { unpin_page(memory->data()); });
  void* seen = nullptr;
  check(cudaHostGetDevicePointer(&seen, memory->data(), 0), "mapping the ranks' shared memory");
  return {held, static_cast<std::uint32_t*>(seen)};
}

// ---- the order ----

// A rank's own page: for each member a word in which that member counts its announcements, then what the
// rank's own stream tells its host of itself, so that the host knows how long a wait has lasted.
struct OwnWords {
  std::uint32_t announced;  // the last announcement that was written
  std::uint32_t began;      // the last announcement that is or was awaited
  std::uint32_t ended;      // the last one that all members have made
};

// A wait of a stream has no end of its own, so a GUARD, a thread of the host, sees that it begins and how
// long it lasts. Past the deadline it notes who is missing and stores the missing words itself, which ends
// the wait; then all is lost, and whatever else waits is let go at once.
class MemopOrder final : public Order {
 public:
  explicit MemopOrder(Team& team)
      : team_(team),
        memory_(team.share(kPage)),
        place_(std::size_t(team.place())),
        patience_(team.limits().inside_pass) {
    team.agree<DeviceError>(complaint_of([&] {
      if (words_of_page() < team.size())
        throw DeviceError("too many ranks of one team for XC_GPU_SYNC=memop");
      operations_.emplace();
      for (const auto& mapping : memory_) pages_.push_back(pin(mapping));
      try_out();
    }));
    guard_ = std::thread([this] { guard(); });
  }

  // What is queued still needs its guard.
  ~MemopOrder() override {
    {
      const std::lock_guard lock(mutex_);
      leaving_ = Clock::now();
    }
    changed_.notify_all();
    guard_.join();
  }
  MemopOrder(const MemopOrder&) = delete;
  MemopOrder& operator=(const MemopOrder&) = delete;

  // Thrown by every later call as well.
  void check() override {
    const std::lock_guard lock(mutex_);
    if (late_) raise_late(team_, late_->place, late_->announcement);
  }

  void announce(Stream stream) override {
    check();
    const std::uint32_t next = announced_ + 1;
    for (std::size_t p = 0; p < pages_.size(); ++p)
      if (p != place_) operations_->write(stream, pages_[p].get() + place_, next);
    operations_->write(stream, seen_by_device(&own().announced), next);
    const std::lock_guard lock(mutex_);
    announced_ = next;
  }

  void follow(Stream stream) override {
    check();
    begin_to_queue();
    const std::string complaint = complaint_of([&] { queue_wait(stream); });
    const std::lock_guard lock(mutex_);
    queues_ = false;
    if (!complaint.empty()) throw DeviceError(complaint);
    followed_ = announced_;
  }

 private:
  struct Late {
    int place;
    std::uint32_t announcement;
  };

  static constexpr int words_of_page() { return int((kPage - sizeof(OwnWords)) / sizeof(std::uint32_t)); }
  std::uint32_t* words() const { return reinterpret_cast<std::uint32_t*>(memory_[place_]->data()); }
  OwnWords& own() const { return *reinterpret_cast<OwnWords*>(words() + words_of_page()); }
  std::uint32_t* seen_by_device(std::uint32_t* word) const { return pages_[place_].get() + (word - words()); }
  static std::uint32_t read(std::uint32_t& word) { return std::atomic_ref(word).load(); }

  void queue_wait(Stream stream) {
    operations_->write(stream, seen_by_device(&own().began), announced_);
    for (std::size_t p = 0; p < pages_.size(); ++p)
      if (p != place_) operations_->await(stream, pages_[place_].get() + p, announced_);
    operations_->write(stream, seen_by_device(&own().ended), announced_);
  }

  // Some GPUs have the functions and do not carry them out.
  void try_out() const {
    operations_->write(nullptr, seen_by_device(&own().began), 1);
    operations_->await(nullptr, seen_by_device(&own().began), 1);
    operations_->write(nullptr, seen_by_device(&own().began), 0);
    xc::check(cudaStreamSynchronize(nullptr), "trying what streams do with words");
  }

  void begin_to_queue() {
    const std::lock_guard lock(mutex_);
    guarded_ = queues_ = true;
    changed_.notify_all();
  }

  bool waits() const {
    const std::uint32_t awaited = read(own().began);
    return awaited != read(own().ended) && awaited != released_;
  }
  bool is_idle() const {
    return read(own().announced) == announced_ && read(own().ended) == followed_ && !waits();
  }

  void guard() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return leaving_ || guarded_; });
      look();
      if (is_idle() && !queues_) guarded_ = false;
      if (leaving_ && (is_idle() || Clock::now() - *leaving_ > 2 * patience_ + 1s)) return;
      changed_.wait_for(lock, std::clamp<std::chrono::duration<double>>(patience_ / 16, 1ms, 100ms));
    }
  }

  void look() {
    const std::uint32_t awaited = read(own().began);
    if (!waits() || awaited != seen_) since_ = Clock::now();
    seen_ = awaited;
    if (waits() && (late_ || Clock::now() - since_ > patience_)) release(awaited);
  }

  // A member that comes just now is not late.
  void release(std::uint32_t awaited) {
    for (int p = 0; p < static_cast<int>(pages_.size()); ++p) {
      std::atomic_ref word(words()[p]);
      std::uint32_t came = word.load();
      if (std::size_t(p) == place_ || static_cast<std::int32_t>(came - awaited) >= 0) continue;
      if (word.compare_exchange_strong(came, awaited) && !late_) late_ = Late{p, awaited};
    }
    released_ = awaited;
  }

  Team& team_;
  Shared memory_;
  std::size_t place_;
  std::chrono::duration<double> patience_;
  std::optional<MemoryOperations> operations_;
  std::vector<std::shared_ptr<std::uint32_t>> pages_;
  std::uint32_t announced_ = 0, followed_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Late> late_;
  std::optional<Clock::time_point> leaving_;
  bool guarded_ = false, queues_ = false;
  std::uint32_t seen_ = 0, released_ = 0;
  Clock::time_point since_;
  std::thread guard_;
};

}  // namespace

std::unique_ptr<Order> make_memop_order(Team& team) { return std::make_unique<MemopOrder>(team); }

}  // namespace xc
