#pragma once

#include <array>
#include <memory>
#include <vector>

#include "device/device.hpp"
#include "device/rails.hpp"
#include "device/walker.hpp"

namespace xc {

// Rails whose sums have the bits of the CPU's: all partial sums go to the owner, who adds them as the same
// tree, in the order of teams.
class TreeRails final : public DeviceRails {
 public:
  TreeRails(const Site& site, const std::shared_ptr<Device>& device, std::unique_ptr<DeviceWire> wire);

 private:
  struct Flight {
    std::shared_ptr<float> outgoing;  // a chunk of every segment that others own
    std::shared_ptr<float> incoming;  // of every own segment, from all other teams
    std::vector<Transfer> sends, receives;
  };

  void take_sums(std::int64_t chunk, const Work& work) override;
  void send_sums(std::int64_t chunk) override;
  void settle_sums(std::int64_t chunk, const Work& work) override;
  void add_teams(const Slice& slice, const float* incoming, float* mine, float* total);
  Flight& flight(std::int64_t chunk) { return flights_[static_cast<std::size_t>(chunk) % kSets]; }
  std::size_t teams() const { return static_cast<std::size_t>(topology().team_count()); }

  DeviceWalker adder_;
  Run<float> whole_;  // of all elements, for adding up
  std::array<Flight, kSets> flights_;
  std::shared_ptr<float> sums_;  // the own team's, and the total
};

}  // namespace xc
