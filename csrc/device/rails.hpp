#pragma once

#include <memory>
#include <vector>

#include "device/wire.hpp"
#include "engine/rails.hpp"
#include "engine/storage.hpp"

namespace xc {

// Rails of weights and gradients that lie on a device. Nobody waits: each leg of a chunk is given to the
// device's wire, which has a stream of its own, forked behind the work that makes what is sent and joined
// before the work that takes what is received. So while a chunk's sums travel, those of the next are taken;
// and while those travel, the first is applied, and the one before it, whose weights have come, is published.
// Two chunks have sums under way, each in a set of buffers. Numbers of the host go by the host's wire.
class DeviceRails : public Rails<float> {
 public:
  // What all kinds of them take.
  struct Site {
    const Team& team;
    const Plan& plan;
    std::int64_t channel;
    Wait wait;
    Shared memory;
    std::shared_ptr<Storage> storage;
  };

 protected:
  static constexpr std::size_t kSets = 2;  // of buffers

  DeviceRails(const Site& site, std::unique_ptr<DeviceWire> wire);

  // The reducing leg: takes the team's sums, gives them to the wire, and takes what came.
  virtual void take_sums(std::int64_t chunk, const Work& work) = 0;
  virtual void send_sums(std::int64_t chunk) = 0;
  virtual void settle_sums(std::int64_t chunk, const Work& work) = 0;
  // The gathering leg, likewise.
  virtual void lay_down(std::int64_t, const std::vector<Array>&, int) {}
  virtual void send_arrays(std::int64_t chunk, const std::vector<Array>& arrays, int from_team);
  virtual void take_up(std::int64_t, const std::vector<Array>&, int) {}

  bool is_own(int segment) const { return topology().owner(segment) == topology().rank(); }
  // Of a segment's array, where the slice begins.
  float* at(const Array& array, const Slice& slice) const;
  DeviceWire& wire() const { return *wire_; }
  Storage& storage() const { return *storage_; }
  // Elements; zeros.
  std::shared_ptr<float> allocate(std::size_t count) const;

 private:
  void run(const Work& work, const std::vector<Array>& arrays, int from_team) override;
  void hand_out(std::int64_t chunk, const std::vector<Array>& arrays, int from_team);
  void publish(std::int64_t chunk, const Work& work) const;

  std::shared_ptr<Storage> storage_;
  std::unique_ptr<DeviceWire> wire_;
};

constexpr std::int64_t bytes_of(std::int64_t elements) { return elements * std::int64_t{sizeof(float)}; }

inline Transfer transfer(int rank, float* at, std::int64_t elements) {
  return {rank, reinterpret_cast<std::byte*>(at), bytes_of(elements)};
}

}  // namespace xc
