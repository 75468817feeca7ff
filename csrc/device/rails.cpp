#include "device/rails.hpp"

#include <algorithm>
#include <utility>

#include "stages/tables.hpp"

namespace xc {
namespace {

// Elements of a chunk: long enough for the wire's bandwidth, short enough for the second cache of a GPU.
constexpr std::int64_t kDeviceChunk = std::int64_t{1} << 20;

constexpr std::int64_t bytes_of(std::int64_t elements) { return elements * std::int64_t{sizeof(float)}; }

Run<float> all_of(const Plan& plan) {
  Run<float> run{};
  run.end = run.filters_end = plan.length;
  run.element_size = sizeof(float);
  run.dtype = DType::f32;
  run.scale = 1.0f;
  run.extrapolation = &kExtrapolations[0];
  return run;
}

std::byte* bytes_at(float* array, std::int64_t element) {
  return reinterpret_cast<std::byte*>(array + element);
}

}  // namespace

DeviceRails::DeviceRails(const Team& team, const Plan& plan, std::int64_t channel, Wait wait, Shared memory,
                         std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
                         std::unique_ptr<DeviceWire> wire)
    : Rails<float>(team, plan, channel, std::move(wait), std::move(memory)),
      device_(std::move(device)),
      wire_(std::move(wire)),
      adder_(device_, storage, plan),
      whole_(all_of(plan)) {
  never_halve();
  std::int64_t longest = 0;
  for (const Segment& segment : plan.segments) longest = std::max(longest, segment.count());
  cut(team.rails().chunk > 0 ? team.rails().chunk : kDeviceChunk, longest);
  const auto own = static_cast<std::size_t>(
      std::count_if(carried().begin(), carried().end(), [this](int k) { return is_own(k); }));
  const auto bytes = static_cast<std::size_t>(bytes_of(chunk()));
  outgoing_ = storage->allocate((carried().size() - own) * bytes);
  incoming_ = storage->allocate((own * (teams() - 1) + 2) * bytes);
}

void DeviceRails::run(const Work& work, const std::vector<Array>& arrays, int from_team) {
  for (std::int64_t chunk = 0; chunk < chunks(); ++chunk) {
    if (work.partial) reduce_chunk(chunk, work);
    if (!arrays.empty()) gather_chunk(chunk, arrays, from_team);
    for (const int k : carried())
      if (const Slice slice = slice_of(k, chunk); work.publish && slice.count() > 0) work.publish(slice);
  }
  wire_->check();
}

void DeviceRails::reduce_chunk(std::int64_t chunk, const Work& work) {
  std::vector<Transfer> sends, receives;
  auto* out = reinterpret_cast<float*>(outgoing_.get());
  auto* const in = reinterpret_cast<float*>(incoming_.get());
  float* next = in;
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (slice.count() == 0) continue;
    if (is_own(k)) {
      for (const int rank : carriers(k, topology().team())) {
        receives.push_back({rank, bytes_at(next, 0), bytes_of(slice.count())});
        next += this->chunk();
      }
      continue;
    }
    work.partial(slice, out);
    sends.push_back({topology().owner(k), bytes_at(out, 0), bytes_of(slice.count())});
    out += this->chunk();
  }
  wire_->exchange(sends, receives, device_->stream());
  float* const mine = next;
  next = in;
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (!is_own(k) || slice.count() == 0) continue;
    work.partial(slice, mine);
    add_teams(slice, next, mine, mine + this->chunk());
    work.settle(slice, mine + this->chunk());
    next += static_cast<std::int64_t>(teams() - 1) * this->chunk();
  }
}

// A sum over teams as if each were a worker. Kernels find an element by its flat number, so arrays that begin
// with the slice seem to begin earlier.
void DeviceRails::add_teams(const Slice& slice, const float* incoming, float* mine, float* total) {
  Workers parts;
  for (int team = 0; team < topology().team_count(); ++team) {
    const bool is_mine = team == topology().team();
    const auto at = reinterpret_cast<std::uintptr_t>(is_mine ? mine : incoming);
    parts.sources.push_back(
        reinterpret_cast<const std::byte*>(at - static_cast<std::uintptr_t>(bytes_of(slice.begin))));
    if (!is_mine) incoming += chunk();
  }
  adder_.walk(load_pass(), parts, {&whole_, 1}, {slice.begin, slice.end, nullptr, {}}, {.mean = total});
}

void DeviceRails::gather_chunk(std::int64_t chunk, const std::vector<Array>& arrays, int from_team) {
  std::vector<Transfer> sends, receives;
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    const std::int64_t place = slice.begin - plan().segments[static_cast<std::size_t>(k)].begin;
    if (slice.count() == 0) continue;
    const int from = source(k, from_team);
    for (const Array& array : arrays) {
      std::byte* const at = bytes_at(array(k), place);
      if (from != topology().rank()) {
        receives.push_back({from, at, bytes_of(slice.count())});
        continue;
      }
      for (const int rank : carriers(k, topology().team()))
        sends.push_back({rank, at, bytes_of(slice.count())});
    }
  }
  wire_->exchange(sends, receives, device_->stream());
}

}  // namespace xc
