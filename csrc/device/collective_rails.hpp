#pragma once

#include <array>
#include <memory>
#include <vector>

#include "device/rails.hpp"

namespace xc {

// Rails whose sums the wire takes, in whatever order it adds. Teams are equal, so a rail is one rank of each
// team, and its ranks own all the segments that they carry. A chunk is laid out as the wire's collectives
// want it: a BLOCK for every rank of the rail, and in it, for every segment of that rank, room for the rail's
// longest slice of the chunk. What shorter slices leave of it holds anything.
class CollectiveRails final : public DeviceRails {
 public:
  CollectiveRails(const Site& site, std::unique_ptr<CollectiveWire> wire);
  const char* way() const override { return "nccl"; }

 private:
  void take_sums(std::int64_t chunk, const Work& work) override;
  void send_sums(std::int64_t chunk) override;
  void settle_sums(std::int64_t chunk, const Work& work) override;
  // From the owners; what one team sends is no collective.
  void lay_down(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) override;
  void send_arrays(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) override;
  void take_up(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) override;

  CollectiveWire& collectives() const { return static_cast<CollectiveWire&>(wire()); }
  std::int64_t longest(std::int64_t chunk) const;
  // Elements of a block, for so many arrays.
  std::int64_t block(std::int64_t chunk, std::size_t arrays) const;
  std::int64_t offset(const Slice& slice, std::int64_t chunk, std::size_t arrays, std::size_t array) const;
  // All blocks of the longest chunk.
  std::size_t room(std::size_t arrays) const;
  StoredArray<float>& gathered(std::int64_t chunk);

  std::array<std::shared_ptr<float>, kSets> sums_;
  std::array<StoredArray<float>, kSets> gathered_;
};

}  // namespace xc
