#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "comm/team.hpp"

namespace xc {

struct Copy {
  const std::byte* from;
  std::byte* to;
  std::int64_t bytes;
};

// Where weights, gradients and state lie: the host's shared memory, or a device's. What is queued here runs
// in the order in which it was queued; on the host it has run when the call returns.
//
// With a device the ranks' memory is written by queued work, so a meeting of the ranks' hosts does not tell
// that it is done. Each rank ANNOUNCES what it has queued before it comes to a meeting, and after the meeting
// FOLLOWS the others: what it queues from then on waits for all that was announced. Between two
// announcements of a rank there must be a meeting after which it followed.
class Storage {
 public:
  virtual ~Storage() = default;

  // Collective. Each rank brings `bytes` of its own, zeroed, and sees its team's.
  virtual Shared share(Team& team, std::size_t bytes) = 0;
  // Of this rank alone.
  virtual std::shared_ptr<std::byte> allocate(std::size_t bytes) = 0;

  // From and to the host's memory as well. The host's may be used again on return, or after finish() if it is
  // pinned; and what is read into it is there only after finish().
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  // Many at once, within the storage's own kind of memory. They do not overlap.
  virtual void copy_all(std::span<const Copy> copies);
  virtual void clear(void* at, std::size_t bytes) = 0;
  // Returns when all that was queued has run.
  virtual void finish() = 0;
  // Returns when all has run that was queued before the last mark, but for what a recording holds.
  virtual void mark() = 0;
  virtual void await_mark() = 0;

  virtual void announce() = 0;
  virtual void follow() = 0;
};

// An array in storage that holds these values.
template <class V>
std::shared_ptr<std::byte> stored(Storage& storage, const std::vector<V>& values) {
  const std::size_t bytes = values.size() * sizeof(V);
  auto memory = storage.allocate(bytes);
  storage.copy(memory.get(), values.data(), bytes);
  return memory;
}

// The host's.
class HostStorage final : public Storage {
 public:
  Shared share(Team& team, std::size_t bytes) override;
  std::shared_ptr<std::byte> allocate(std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;
  void clear(void* at, std::size_t bytes) override;
  void finish() override {}
  void mark() override {}
  void await_mark() override {}
  void announce() override {}
  void follow() override {}
};

// An array in storage, of one rank alone.
template <class T>
class StoredArray {
 public:
  // What it held is lost if it becomes longer.
  void resize(Storage& storage, std::size_t count) {
    if (count > room_) {
      memory_ = storage.allocate(count * sizeof(T));
      room_ = count;
    }
    count_ = count;
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  bool empty() const { return count_ == 0; }

 private:
  std::shared_ptr<std::byte> memory_;
  std::size_t room_ = 0;
  std::size_t count_ = 0;
};

}  // namespace xc
