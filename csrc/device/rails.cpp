#include "device/rails.hpp"

#include <algorithm>
#include <utility>

namespace xc {
namespace {

// Elements of a chunk: long enough for the wire's bandwidth, short enough for the second cache of a GPU. Of a
// chunk of all segments that a rank carries, a buffer holds no more than so many.
constexpr std::int64_t kDeviceChunk = std::int64_t{1} << 19;
constexpr std::int64_t kDeviceBuffer = std::int64_t{1} << 23;

std::int64_t suitable_chunk(const Topology& topology) {
  return std::min(kDeviceChunk, kDeviceBuffer / (topology.team_count() * topology.workers()));
}

}  // namespace

DeviceRails::DeviceRails(const Site& site, std::unique_ptr<DeviceWire> wire)
    : Rails<float>(site.team, site.plan, site.channel, site.wait, site.memory),
      storage_(site.storage),
      wire_(std::move(wire)) {
  never_halve();
  std::int64_t longest = 0;
  for (const Segment& segment : plan().segments) longest = std::max(longest, segment.count());
  cut(site.team.rails().chunk > 0 ? site.team.rails().chunk : suitable_chunk(topology()), longest);
}

std::shared_ptr<float> DeviceRails::allocate(std::size_t count) const {
  const std::shared_ptr<std::byte> memory = storage_->allocate(count * sizeof(float));
  return {memory, reinterpret_cast<float*>(memory.get())};
}

float* DeviceRails::at(const Array& array, const Slice& slice) const {
  return array(slice.segment) +
         (slice.begin - plan().segments[static_cast<std::size_t>(slice.segment)].begin);
}

// A round for every chunk, and two more. What a round joins was given to the wire in the round before, so the
// sums of its own chunk, queued first, run beside that; the rest runs beside what it gives to the wire
// itself.
void DeviceRails::run(const Work& work, const std::vector<Array>& arrays, int from_team) {
  for (std::int64_t round = 0; round < chunks() + 2; ++round) {
    const bool reduces = work.partial && round < chunks();
    if (reduces) take_sums(round, work);
    wire_->fork();
    wire_->join();
    if (reduces) send_sums(round);
    if (const std::int64_t last = round - 1; last >= 0 && last < chunks()) {
      if (work.partial) settle_sums(last, work);
      if (!arrays.empty()) hand_out(last, arrays, from_team);
    }
    if (round < 2) continue;
    if (!arrays.empty()) take_up(round - 2, arrays, from_team);
    publish(round - 2, work);
  }
  wire_->check();
}

void DeviceRails::hand_out(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  lay_down(chunk, arrays, from_team);
  wire_->fork();
  send_arrays(chunk, arrays, from_team);
}

void DeviceRails::publish(std::int64_t chunk, const Work& work) const {
  if (!work.publish) return;
  for (const int k : carried())
    if (const Slice slice = slice_of(k, chunk); slice.count() > 0) work.publish(slice);
}

void DeviceRails::send_arrays(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  std::vector<Transfer> sends, receives;
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (slice.count() == 0) continue;
    const int from = source(k, from_team);
    for (const Array& array : arrays) {
      float* const place = at(array, slice);
      if (from != topology().rank()) {
        receives.push_back(transfer(from, place, slice.count()));
        continue;
      }
      for (const int rank : carriers(k, topology().team()))
        sends.push_back(transfer(rank, place, slice.count()));
    }
  }
  wire_->exchange(sends, receives);
}

}  // namespace xc
