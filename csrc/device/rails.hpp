#pragma once

#include <memory>
#include <vector>

#include "device/device.hpp"
#include "device/walker.hpp"
#include "engine/rails.hpp"

namespace xc {

// Rails of weights and gradients that lie on a device. The legs are the same, and the tree: all partial sums
// go to the owner, who adds them in the order of teams. But nobody waits: each leg of a chunk is one group of
// transfers on the stream, behind the work that makes what is sent and before the work that takes what is
// received. Numbers of the host go by the host's wire.
class DeviceRails final : public Rails<float> {
 public:
  DeviceRails(const Team& team, const Plan& plan, std::int64_t channel, Wait wait, Shared memory,
              std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
              std::unique_ptr<DeviceWire> wire);

 private:
  void run(const Work& work, const std::vector<Array>& arrays, int from_team) override;
  void reduce_chunk(std::int64_t chunk, const Work& work);
  void gather_chunk(std::int64_t chunk, const std::vector<Array>& arrays, int from_team);
  void add_teams(const Slice& slice, const float* incoming, float* mine, float* total);
  bool is_own(int segment) const { return topology().owner(segment) == topology().rank(); }
  std::size_t teams() const { return static_cast<std::size_t>(topology().team_count()); }

  std::shared_ptr<Device> device_;
  std::unique_ptr<DeviceWire> wire_;
  DeviceWalker adder_;
  Run<float> whole_;                     // of all elements, for adding up
  std::shared_ptr<std::byte> outgoing_;  // a chunk of every segment that others own
  std::shared_ptr<std::byte> incoming_;  // of every own segment, from all other teams; then two for sums
};

}  // namespace xc
