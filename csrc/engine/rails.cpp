#include "engine/rails.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <utility>

#include "comm/largest.hpp"
#include "core/dtype.hpp"
#include "engine/partials.hpp"
#include "stages/tables.hpp"

namespace xc {
namespace {

constexpr std::int64_t kBufferBytes = std::int64_t{16} << 20;  // of all chunks under way, about

// Elements of a chunk: what all buffers of the chunks under way together may take, in cells.
template <class T>
std::int64_t suitable_chunk(const Topology& topology, int flights) {
  const std::int64_t slices = 2 * topology.workers() * (topology.team_count() - 1) * flights;
  const std::int64_t most = kBufferBytes / (slices * std::int64_t{sizeof(T)});
  return std::clamp(most / kNormGrid * kNormGrid, kNormGrid, kShortMessage / std::int64_t{sizeof(T)});
}

}  // namespace

void shorten(float* numbers, std::int64_t count) {
  auto* to = reinterpret_cast<std::byte*>(numbers);
  for (std::int64_t i = 0; i < count; ++i) {
    const Bf16 shorter = narrow<Bf16>(numbers[i]);
    std::memcpy(to + i * 2, &shorter, sizeof shorter);
  }
}

// From the last to the first, so that nothing is overwritten that is still to be read.
void lengthen(float* numbers, std::int64_t count) {
  const auto* from = reinterpret_cast<const std::byte*>(numbers);
  for (std::int64_t i = count - 1; i >= 0; --i) {
    Bf16 shorter;
    std::memcpy(&shorter, from + i * 2, sizeof shorter);
    numbers[i] = widen(shorter);
  }
}

template <class T>
Rails<T>::Rails(const Team& team, const Plan& plan, std::int64_t channel, Wait wait, Shared memory)
    : topology_(team.topology()),
      wire_(*team.wire()),
      plan_(plan),
      narrow_(team.rails().narrow),
      window_(team.rails().window),
      channel_(channel),
      wait_(std::move(wait)),
      memory_(std::move(memory)),
      carried_(topology_.carried(topology_.rank())),
      flights_(static_cast<std::size_t>(2 * window_ + 1)) {
  for (const int k : carried_)
    if (topology_.owner(k) == topology_.rank()) own_.push_back(k);
  std::int64_t longest = 0;
  for (const Segment& segment : plan.segments) longest = std::max(longest, segment.count());
  const std::int64_t wanted = team.rails().chunk > 0
                                  ? team.rails().chunk
                                  : suitable_chunk<T>(topology_, static_cast<int>(flights_.size()));
  cut(wanted, longest);
  halving_ = should_halve(team.rails());
  if (halving_ && team.rails().chunk == 0)
    cut(kBufferBytes / (2 * static_cast<std::int64_t>(carried_.size()) * std::int64_t{sizeof(T)}), longest);
  flights_.resize(std::min(flights_.size(), static_cast<std::size_t>(std::max<std::int64_t>(1, chunks_))));
  if (halving_) return;  // in buffers of its own
  const auto others = static_cast<std::size_t>(topology_.team_count() - 1);
  const auto elements = static_cast<std::size_t>(chunk_);
  for (Flight& flight : flights_) {
    flight.incoming.resize(own_.size() * others * elements);
    flight.outgoing.resize((carried_.size() - own_.size()) * elements);
  }
  sums_.resize(2 * elements);
  scratch_.resize(static_cast<std::size_t>(reduce_scratch_tiles(topology_.team_count())) * elements);
}

template <class T>
void Rails<T>::cut(std::int64_t wanted, std::int64_t longest) {
  chunk_ = std::max<std::int64_t>(1, std::min((wanted + kNormGrid - 1) / kNormGrid * kNormGrid, longest));
  chunks_ = (longest + chunk_ - 1) / chunk_;
}

// What a transfer that never ended may still write to stays where it is.
template <class T>
Rails<T>::~Rails() {
  if (!broken_) return;
  new std::vector<Flight>(std::move(flights_));
  new std::vector<T>(std::move(halves_));
  new std::vector<T>(std::move(others_));
  new Shared(std::move(memory_));
}

template <class T>
Slice Rails<T>::slice_of(int segment, std::int64_t chunk) const {
  const Segment& whole = plan_.segments[static_cast<std::size_t>(segment)];
  return {segment, std::min(whole.end, whole.begin + chunk * chunk_),
          std::min(whole.end, whole.begin + (chunk + 1) * chunk_)};
}

// Who sends a segment in the gathering leg.
template <class T>
int Rails<T>::source(int segment, int from_team) const {
  return from_team < 0 ? topology_.owner(segment) : topology_.carrier(segment, from_team);
}

// Those of all teams but one.
template <class T>
std::vector<int> Rails<T>::carriers(int segment, int except_team) const {
  std::vector<int> ranks;
  for (int team = 0; team < topology_.team_count(); ++team)
    if (team != except_team) ranks.push_back(topology_.carrier(segment, team));
  return ranks;
}

template <class T>
std::int64_t Rails<T>::wire_bytes(std::int64_t count) const {
  return count * size_of(wire_type(T(), narrow_));
}

// ---- one leg after the other, chunk by chunk ----

// Which way takes less time, by what a message costs to begin and to travel, and a byte. From all to all, the
// messages of a rank are under way at once; by halves it waits for each.
template <class T>
bool Rails<T>::should_halve(const RailOptions& options) const {
  if (!can_halve(topology_) || options.way == RailOptions::Way::direct) return false;
  if (options.way == RailOptions::Way::halving) return true;
  const double others = topology_.team_count() - 1;
  const double rounds = std::countr_zero(static_cast<unsigned>(topology_.team_count()));
  const auto chunks = static_cast<double>(chunks_);
  const double bytes =
      others * static_cast<double>(own_.size()) * chunks * static_cast<double>(chunk_) * sizeof(T);
  const double travel = 2 * bytes / options.bandwidth;
  const double direct = 2 * options.latency + std::max(travel, 2 * others * static_cast<double>(own_.size()) *
                                                                   chunks * options.overhead);
  return 2 * rounds * (options.latency + options.overhead) + travel < direct;
}

template <class T>
void Rails<T>::run(const Work& work, const std::vector<Array>& arrays, int from_team) {
  const bool was_broken = std::exchange(broken_, true);
  if (halving_ && from_team < 0)
    run_by_halves(work, arrays);
  else
    run_in_chunks(work, arrays, from_team);
  broken_ = was_broken;
}

template <class T>
void Rails<T>::run_in_chunks(const Work& work, const std::vector<Array>& arrays, int from_team) {
  for (std::int64_t i = 0; i < chunks_ + 2 * window_; ++i) {
    if (i < chunks_) begin_chunk(i, work, arrays, from_team);
    if (i >= window_ && i < chunks_ + window_) settle_chunk(i - window_, work, arrays, from_team);
    if (i >= 2 * window_) publish_chunk(i - 2 * window_, work, from_team);
  }
  for (Flight& flight : flights_) finish(flight.sent);
}

// Sends the team's sums of what others own, and gets ready to receive.
template <class T>
void Rails<T>::begin_chunk(std::int64_t chunk, const Work& work, const std::vector<Array>& arrays,
                           int from_team) {
  Flight& flight = this->flight(chunk);
  finish(flight.sent);
  for (std::size_t i = 0; work.partial && i < own_.size(); ++i)
    receive_partials(slice_of(own_[i], chunk), flight, i);
  for (const int k : carried_) {
    const Slice slice = slice_of(k, chunk);
    if (source(k, from_team) == topology_.rank()) continue;
    for (const Array& array : arrays)
      receive(array(k) + (slice.begin - plan_.segments[static_cast<std::size_t>(k)].begin),
              slice.count() * std::int64_t{sizeof(T)}, source(k, from_team), Tag::gathered, flight.gathered);
  }
  std::size_t number = 0;
  for (const int k : carried_)
    if (work.partial && topology_.owner(k) != topology_.rank())
      send_partial(slice_of(k, chunk), flight, number++, work);
}

template <class T>
void Rails<T>::receive_partials(const Slice& slice, Flight& flight, std::size_t number) {
  const auto others = static_cast<std::size_t>(topology_.team_count() - 1);
  T* to = flight.incoming.data() + number * others * static_cast<std::size_t>(chunk_);
  for (const int rank : carriers(slice.segment, topology_.team())) {
    receive(to, wire_bytes(slice.count()), rank, Tag::partial, flight.partials);
    to += chunk_;
  }
}

template <class T>
void Rails<T>::send_partial(const Slice& slice, Flight& flight, std::size_t number, const Work& work) {
  T* const sum = flight.outgoing.data() + number * static_cast<std::size_t>(chunk_);
  work.partial(slice, sum);
  if (narrow_) shorten(sum, slice.count());
  send(sum, wire_bytes(slice.count()), topology_.owner(slice.segment), Tag::partial, flight.sent);
}

// Own segments: adds up, settles, and sends what follows. It is published while that travels.
template <class T>
void Rails<T>::settle_chunk(std::int64_t chunk, const Work& work, const std::vector<Array>& arrays,
                            int from_team) {
  Flight& flight = this->flight(chunk);
  finish(flight.partials);
  for (std::size_t i = 0; work.partial && i < own_.size(); ++i)
    settle(slice_of(own_[i], chunk), flight, i, work);
  for (const int k : carried_) {
    if (source(k, from_team) != topology_.rank()) continue;
    const Slice slice = slice_of(k, chunk);
    for (const Array& array : arrays)
      for (const int rank : carriers(k, topology_.team()))
        send(array(k) + (slice.begin - plan_.segments[static_cast<std::size_t>(k)].begin),
             slice.count() * std::int64_t{sizeof(T)}, rank, Tag::gathered, flight.sent);
    if (work.publish && slice.count() > 0) work.publish(slice);
    wire_.progress();
  }
}

template <class T>
void Rails<T>::settle(const Slice& slice, Flight& flight, std::size_t number, const Work& work) {
  if (slice.count() == 0) return;
  const auto others = static_cast<std::size_t>(topology_.team_count() - 1);
  T* incoming = flight.incoming.data() + number * others * static_cast<std::size_t>(chunk_);
  T* const mine = sums_.data();
  T* const total = mine + chunk_;
  work.partial(slice, mine);
  std::vector<const std::byte*> parts;
  for (int team = 0; team < topology_.team_count(); ++team) {
    if (team == topology_.team()) {
      parts.push_back(reinterpret_cast<const std::byte*>(mine));
      continue;
    }
    if (narrow_) lengthen(incoming, slice.count());
    parts.push_back(reinterpret_cast<const std::byte*>(incoming));
    incoming += chunk_;
  }
  add_tree(parts, slice.count(), total, scratch_.data());
  work.settle(slice, total);
}

template <class T>
void Rails<T>::publish_chunk(std::int64_t chunk, const Work& work, int from_team) {
  finish(flight(chunk).gathered);
  for (const int k : carried_) {
    const Slice slice = slice_of(k, chunk);
    if (!work.publish || slice.count() == 0 || source(k, from_team) == topology_.rank()) continue;
    work.publish(slice);
    wire_.progress();
  }
}

// ---- numbers that belong to segments ----

template <class T>
void Rails<T>::share(const std::function<std::span<double>(int)>& numbers) {
  std::vector<Pending> under_way;
  for (const int k : carried_) {
    const std::span<double> at = numbers(k);
    const auto bytes = static_cast<std::int64_t>(at.size_bytes());
    if (topology_.owner(k) != topology_.rank()) {
      receive(at.data(), bytes, topology_.owner(k), Tag::numbers, under_way);
      continue;
    }
    for (const int rank : carriers(k, topology_.team()))
      send(at.data(), bytes, rank, Tag::numbers, under_way);
  }
  finish(under_way);
}

template <class T>
void Rails<T>::add_up(const std::function<std::span<double>(int)>& numbers) {
  std::vector<Pending> under_way;
  const std::unique_ptr<std::vector<std::vector<double>>, KeepAfterFailure> holder(
      new std::vector<std::vector<double>>);
  std::vector<std::vector<double>>& received = *holder;
  for (const int k : carried_) {
    const std::span<double> at = numbers(k);
    const auto bytes = static_cast<std::int64_t>(at.size_bytes());
    if (topology_.owner(k) != topology_.rank()) {
      send(at.data(), bytes, topology_.owner(k), Tag::partial_numbers, under_way);
      continue;
    }
    for (const int rank : carriers(k, topology_.team()))
      receive(received.emplace_back(at.size()).data(), bytes, rank, Tag::partial_numbers, under_way);
  }
  finish(under_way);
  auto next = received.begin();
  for (const int k : own_) {
    const std::span<double> at = numbers(k);
    const std::vector<double> mine(at.begin(), at.end());
    std::vector<const std::byte*> parts;
    for (int team = 0; team < topology_.team_count(); ++team)
      parts.push_back(
          reinterpret_cast<const std::byte*>(team == topology_.team() ? mine.data() : (next++)->data()));
    std::vector<double> scratch(static_cast<std::size_t>(reduce_scratch_tiles(topology_.team_count())) *
                                at.size());
    add_tree(parts, static_cast<std::int64_t>(at.size()), at.data(), scratch.data());
  }
  share(numbers);
}

template <class T>
void Rails<T>::largest_of_all(std::vector<double>& numbers) {
  LargestOfAll largest(wire_, topology_, tag_of(channel_, Tag::numbers), std::move(numbers));
  wait([&] { return largest.done(); }, [&] { return largest.awaited(); });
  numbers = largest.numbers();
}

// The array is private, so members of one team send to one another, too.
template <class T>
void Rails<T>::collect(const Array& own, std::vector<T>& to, std::optional<int> only_rank) {
  std::vector<Pending> under_way;
  const auto wants = [&](int rank) { return !only_rank || rank == *only_rank; };
  for (const Segment& segment : plan_.segments) {
    const int owner = topology_.owner(segment.owner);
    const std::int64_t bytes = segment.count() * std::int64_t{sizeof(T)};
    if (owner != topology_.rank()) {
      if (wants(topology_.rank())) receive(to.data() + segment.begin, bytes, owner, Tag::gathered, under_way);
      continue;
    }
    for (int rank = 0; rank < topology_.size(); ++rank)
      if (rank != owner && wants(rank)) send(own(segment.owner), bytes, rank, Tag::gathered, under_way);
    if (wants(owner)) std::copy_n(own(segment.owner), segment.count(), to.data() + segment.begin);
  }
  try {
    finish(under_way);
  } catch (...) {
    new std::vector<T>(std::move(to));  // as in KeepAfterFailure
    throw;
  }
}

// ---- transfers ----

template <class T>
void Rails<T>::send(const void* from, std::int64_t bytes, int rank, Tag tag, std::vector<Pending>& sent) {
  if (bytes > 0)
    sent.push_back({wire_.send(from, static_cast<std::size_t>(bytes), rank, tag_of(channel_, tag)), rank});
}

template <class T>
void Rails<T>::receive(void* to, std::int64_t bytes, int rank, Tag tag, std::vector<Pending>& received) {
  if (bytes > 0)
    received.push_back(
        {wire_.receive(to, static_cast<std::size_t>(bytes), rank, tag_of(channel_, tag)), rank});
}

template <class T>
void Rails<T>::finish(std::vector<Pending>& pending) {
  const auto is_done = [this](const Pending& one) { return wire_.done(one.transfer); };
  const auto done = [&] {
    std::erase_if(pending, is_done);
    return pending.empty();
  };
  const auto awaited = [&] {
    std::vector<int> ranks;
    for (const Pending& one : pending) ranks.push_back(one.rank);
    return ranks;
  };
  if (!pending.empty()) wait(done, awaited);
}

template <class T>
void Rails<T>::wait(const std::function<bool()>& done, const std::function<std::vector<int>()>& awaited) {
  const bool was_broken = std::exchange(broken_, true);
  wait_(done, awaited);
  broken_ = was_broken;
}

template class Rails<float>;
template class Rails<double>;

}  // namespace xc
