#include "device/collective_rails.hpp"

#include <algorithm>
#include <utility>

namespace xc {

CollectiveRails::CollectiveRails(const Site& site, std::unique_ptr<CollectiveWire> wire)
    : DeviceRails(site, std::move(wire)) {
  for (auto& sums : sums_) sums = allocate(room(1));
}

// ---- layout ----

std::int64_t CollectiveRails::longest(std::int64_t chunk) const {
  std::int64_t most = 0;
  for (const int k : carried()) most = std::max(most, slice_of(k, chunk).count());
  return most;
}

std::int64_t CollectiveRails::block(std::int64_t chunk, std::size_t arrays) const {
  return static_cast<std::int64_t>(arrays) * topology().workers() * longest(chunk);
}

std::int64_t CollectiveRails::offset(const Slice& slice, std::int64_t chunk, std::size_t arrays,
                                     std::size_t array) const {
  const int owner = topology().owner(slice.segment);
  const std::int64_t number =
      static_cast<std::int64_t>(array) * topology().workers() + slice.segment % topology().workers();
  return topology().team_of(owner) * block(chunk, arrays) + number * longest(chunk);
}

std::size_t CollectiveRails::room(std::size_t arrays) const {
  return arrays * carried().size() * static_cast<std::size_t>(chunk());
}

// ---- the reducing leg ----

void CollectiveRails::take_sums(std::int64_t chunk, const Work& work) {
  float* const sums = sums_[static_cast<std::size_t>(chunk) % kSets].get();
  for (const int k : carried())
    if (const Slice slice = slice_of(k, chunk); slice.count() > 0)
      work.partial(slice, sums + offset(slice, chunk, 1, 0));
}

void CollectiveRails::send_sums(std::int64_t chunk) {
  if (const std::int64_t elements = block(chunk, 1); elements > 0)
    collectives().reduce_scatter(sums_[static_cast<std::size_t>(chunk) % kSets].get(), elements);
}

void CollectiveRails::settle_sums(std::int64_t chunk, const Work& work) {
  const float* const sums = sums_[static_cast<std::size_t>(chunk) % kSets].get();
  for (const int k : carried())
    if (const Slice slice = slice_of(k, chunk); is_own(k) && slice.count() > 0)
      work.settle(slice, sums + offset(slice, chunk, 1, 0));
}

// ---- the gathering leg ----

StoredArray<float>& CollectiveRails::gathered(std::int64_t chunk) {
  return gathered_[static_cast<std::size_t>(chunk) % kSets];
}

void CollectiveRails::lay_down(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  if (from_team >= 0) return;
  gathered(chunk).resize(storage(), room(arrays.size()));
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (!is_own(k) || slice.count() == 0) continue;
    for (std::size_t i = 0; i < arrays.size(); ++i)
      storage().copy(gathered(chunk).data() + offset(slice, chunk, arrays.size(), i), at(arrays[i], slice),
                     static_cast<std::size_t>(bytes_of(slice.count())));
  }
}

void CollectiveRails::send_arrays(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  if (from_team >= 0) return DeviceRails::send_arrays(chunk, arrays, from_team);
  if (const std::int64_t elements = block(chunk, arrays.size()); elements > 0)
    collectives().all_gather(gathered(chunk).data(), elements);
}

void CollectiveRails::take_up(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  if (from_team >= 0) return;
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (is_own(k) || slice.count() == 0) continue;
    for (std::size_t i = 0; i < arrays.size(); ++i)
      storage().copy(at(arrays[i], slice), gathered(chunk).data() + offset(slice, chunk, arrays.size(), i),
                     static_cast<std::size_t>(bytes_of(slice.count())));
  }
}

}  // namespace xc
