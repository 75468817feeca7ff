#include "device/tree_rails.hpp"

#include <algorithm>
#include <utility>

#include "stages/tables.hpp"

namespace xc {
namespace {

Run<float> all_of(const Plan& plan) {
  Run<float> run{};
  run.end = run.filters_end = plan.length;
  run.element_size = sizeof(float);
  run.dtype = DType::f32;
  run.scale = 1.0f;
  run.extrapolation = &kExtrapolations[0];
  return run;
}

}  // namespace

TreeRails::TreeRails(const Site& site, const std::shared_ptr<Device>& device,
                     std::unique_ptr<DeviceWire> wire)
    : DeviceRails(site, std::move(wire)), adder_(device, site.storage, site.plan), whole_(all_of(site.plan)) {
  const auto own = static_cast<std::size_t>(
      std::count_if(carried().begin(), carried().end(), [this](int k) { return is_own(k); }));
  const auto elements = static_cast<std::size_t>(chunk());
  for (Flight& flight : flights_) {
    flight.outgoing = allocate((carried().size() - own) * elements);
    flight.incoming = allocate(own * (teams() - 1) * elements);
  }
  sums_ = allocate(2 * elements);
}

// What others own; the own part is taken when it is added.
void TreeRails::take_sums(std::int64_t chunk, const Work& work) {
  Flight& flight = this->flight(chunk);
  flight.sends.clear();
  flight.receives.clear();
  float* out = flight.outgoing.get();
  float* in = flight.incoming.get();
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (slice.count() == 0) continue;
    if (is_own(k)) {
      for (const int rank : carriers(k, topology().team())) {
        flight.receives.push_back(transfer(rank, in, slice.count()));
        in += this->chunk();
      }
      continue;
    }
    work.partial(slice, out);
    flight.sends.push_back(transfer(topology().owner(k), out, slice.count()));
    out += this->chunk();
  }
}

void TreeRails::send_sums(std::int64_t chunk) {
  wire().exchange(flight(chunk).sends, flight(chunk).receives);
}

void TreeRails::settle_sums(std::int64_t chunk, const Work& work) {
  const float* in = flight(chunk).incoming.get();
  float* const mine = sums_.get();
  float* const total = mine + this->chunk();
  for (const int k : carried()) {
    const Slice slice = slice_of(k, chunk);
    if (!is_own(k) || slice.count() == 0) continue;
    work.partial(slice, mine);
    add_teams(slice, in, mine, total);
    work.settle(slice, total);
    in += static_cast<std::int64_t>(teams() - 1) * this->chunk();
  }
}

// A sum over teams as if each were a worker. Kernels find an element by its flat number, so arrays that begin
// with the slice seem to begin earlier.
void TreeRails::add_teams(const Slice& slice, const float* incoming, float* mine, float* total) {
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

}  // namespace xc
