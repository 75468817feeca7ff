#include "engine/overlap.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/partials.hpp"

namespace xc {
namespace {

constexpr std::int64_t kPiece = std::int64_t{1} << 14;  // elements that are added up at once
constexpr std::chrono::microseconds kVisit{200};        // that one call may give to the wire

template <class T>
constexpr std::int64_t kMessage = kShortMessage / std::int64_t{sizeof(T)};

std::int64_t overlap_of(std::int64_t begin, std::int64_t end, std::int64_t from, std::int64_t to) {
  return std::max<std::int64_t>(0, std::min(end, to) - std::max(begin, from));
}

}  // namespace

std::vector<Bucket> make_buckets(const Plan& plan, std::int64_t elements) {
  std::vector<Bucket> buckets;
  if (elements <= 0) return buckets;
  for (std::size_t i = plan.layers.size(); i-- > 0;) {
    const Layer& layer = plan.layers[i];
    if (buckets.empty() || buckets.back().end - buckets.back().begin >= elements)
      buckets.push_back({i, i + 1, layer.begin, layer.end});
    buckets.back().first = i;
    buckets.back().begin = layer.begin;
  }
  return buckets;
}

template <class T>
Overlap<T>::Overlap(const Team& team, const Plan& plan, const Arenas<T>& arenas, std::vector<Bucket> buckets,
                    std::vector<Run<T>> runs, std::int64_t tile, int tag, std::size_t words_offset,
                    typename Rails<T>::Wait wait)
    : topology_(team.topology()),
      wire_(*team.wire()),
      plan_(plan),
      arenas_(arenas),
      buckets_(std::move(buckets)),
      runs_(std::move(runs)),
      narrow_(team.rails().narrow),
      tag_(tag),
      wait_(std::move(wait)),
      own_begin_(arenas.own_shards().front().begin),
      bucket_of_(plan.layers.size()),
      buffers_(tile, static_cast<int>(arenas.shards().size())),
      finished_(plan.layers.size() * static_cast<std::size_t>(team.workers_per_rank())),
      expected_(plan.layers.size(), 1),
      missing_(buckets_.size()),
      stale_(buckets_.size()),
      traffic_(buckets_.size()),
      mine_(static_cast<std::size_t>(kPiece)),
      scratch_(static_cast<std::size_t>(reduce_scratch_tiles(topology_.team_count()) * kPiece)) {
  for (const auto& memory : arenas.control())
    words_.push_back(reinterpret_cast<BucketWord*>(memory->data() + words_offset));
  for (std::size_t b = 0; b < buckets_.size(); ++b)
    for (std::size_t i = buckets_[b].first; i < buckets_[b].last; ++i) bucket_of_[i] = b;
  std::int64_t outgoing = 0;
  for (const int k : topology_.carried(topology_.rank())) {
    const bool own = topology_.owner(k) == topology_.rank();
    (own ? own_ : for_others_).push_back(k);
    if (own) continue;
    outgoing_place_.push_back(outgoing);
    outgoing += plan.segments[static_cast<std::size_t>(k)].count();
  }
  const auto owned = static_cast<std::size_t>(arenas.own_shards().back().end - own_begin_);
  outgoing_.resize(static_cast<std::size_t>(outgoing));
  incoming_.resize(owned * static_cast<std::size_t>(topology_.team_count() - 1));
  total_.resize(owned);
  begin_round();
}

// What a transfer that never ended may still touch stays where it is.
template <class T>
Overlap<T>::~Overlap() {
  const auto under_way = [](const Traffic& one) { return !one.received.empty() || !one.sent.empty(); };
  if (std::none_of(traffic_.begin(), traffic_.end(), under_way)) return;
  new std::vector<T>(std::move(incoming_));
  new std::vector<T>(std::move(outgoing_));
}

// ---- whose gradients lie where ----

template <class T>
void Overlap<T>::begin_round() {
  const std::size_t layers = plan_.layers.size(),
                    workers = finished_.size() / std::max<std::size_t>(1, layers);
  std::fill(finished_.begin(), finished_.end(), std::uint8_t{0});
  std::fill(stale_.begin(), stale_.end(), std::uint8_t{0});
  std::fill(missing_.begin(), missing_.end(), std::size_t{0});
  for (std::size_t i = 0; i < layers; ++i) missing_[bucket_of_[i]] += expected_[i] * workers;
  arrived_ = 0;
  last_early_ = std::exchange(early_, 0.0);
  begun_ = in_step_ = false;
}

template <class T>
void Overlap<T>::finished(int v, std::size_t layer) {
  if (bucket_of_[layer] < arrived_) {
    changed(layer);
  } else if (std::uint8_t& mark = finished_[static_cast<std::size_t>(v) * plan_.layers.size() + layer];
             !mark) {
    mark = 1;
    missing_[bucket_of_[layer]] -= expected_[layer];
    arrive();
  }
  advance();
}

template <class T>
void Overlap<T>::changed(std::size_t layer) {
  if (bucket_of_[layer] < arrived_) stale_[bucket_of_[layer]] = 1;
}

template <class T>
void Overlap<T>::arrive() {
  while (arrived_ < buckets_.size() && missing_[arrived_] == 0) ++arrived_;
  const auto place = static_cast<std::size_t>(topology_.place());
  words_[place]->arrived.store(round_ * buckets_.size() + arrived_);
}

// A rank in its next round has been at all buckets of this one.
template <class T>
bool Overlap<T>::all_have(std::size_t bucket) const {
  if (in_step_) return true;
  const std::uint64_t wanted = round_ * buckets_.size() + bucket + 1;
  return std::all_of(words_.begin(), words_.end(),
                     [&](const BucketWord* word) { return word->arrived.load() >= wanted; });
}

// ---- moving ----

// What the wire refuses is told in the step, where it can be told to all.
template <class T>
void Overlap<T>::advance() {
  if (refused_) return;
  try {
    if (!begun_) begin({});
    move();
    const auto until = std::chrono::steady_clock::now() + kVisit;
    while (sent_ > 0 && !route_ended() && std::chrono::steady_clock::now() < until) wire_.progress();
  } catch (...) {
    refused_ = std::current_exception();
  }
}

// Gets ready to receive all buckets of a route; an empty one stands for all buckets in their order.
template <class T>
void Overlap<T>::begin(std::vector<std::size_t> route) {
  begun_ = true;
  route_ = std::move(route);
  if (route_.empty())
    for (std::size_t b = 0; b < buckets_.size(); ++b) route_.push_back(b);
  sent_ = settled_ = 0;
  for (const std::size_t b : route_) receive(b);
}

// At most one bucket is sent, and one added up.
template <class T>
void Overlap<T>::move() {
  if (sent_ < route_.size() && all_have(route_[sent_])) send(route_[sent_++]);
  if (settled_ < sent_ && ended(traffic_[route_[settled_]].received)) settle(route_[settled_++]);
  for (std::size_t i = 0; i < sent_; ++i)
    if (!ended(traffic_[route_[i]].sent)) break;
}

template <class T>
bool Overlap<T>::ended(std::vector<Pending>& pending) {
  std::erase_if(pending, [this](const Pending& one) { return wire_.done(one.transfer); });
  return pending.empty();
}

template <class T>
Slice Overlap<T>::part_of(int segment, std::size_t bucket) const {
  const Segment& whole = plan_.segments[static_cast<std::size_t>(segment)];
  const std::int64_t begin = std::max(whole.begin, buckets_[bucket].begin);
  return {segment, begin,
          begin + overlap_of(whole.begin, whole.end, buckets_[bucket].begin, buckets_[bucket].end)};
}

// Calls visit(piece) for what a slice is cut into.
template <class Visit>
void for_pieces(const Slice& slice, std::int64_t longest, Visit visit) {
  for (std::int64_t at = slice.begin; at < slice.end; at += longest)
    visit(Slice{slice.segment, at, std::min(at + longest, slice.end)});
}

template <class T>
T* Overlap<T>::incoming(const Slice& slice, std::size_t other) {
  return incoming_.data() + other * total_.size() + (slice.begin - own_begin_);
}

template <class T>
void Overlap<T>::receive(std::size_t bucket) {
  for (const int k : own_) {
    std::size_t other = 0;
    for (int team = 0; team < topology_.team_count(); ++team) {
      if (team == topology_.team()) continue;
      const int rank = topology_.carrier(k, team);
      for_pieces(part_of(k, bucket), kMessage<T>, [&](const Slice& piece) {
        const auto bytes = static_cast<std::size_t>(piece.count() * size_of(wire_type(T(), narrow_)));
        traffic_[bucket].received.push_back({wire_.receive(incoming(piece, other), bytes, rank, tag_), rank});
      });
      ++other;
    }
  }
}

template <class T>
void Overlap<T>::send(std::size_t bucket) {
  for (std::size_t i = 0; i < for_others_.size(); ++i) {
    const int k = for_others_[i], rank = topology_.owner(k);
    const std::int64_t first = plan_.segments[static_cast<std::size_t>(k)].begin;
    for_pieces(part_of(k, bucket), kMessage<T>, [&](const Slice& piece) {
      T* const sum = outgoing_.data() + outgoing_place_[i] + (piece.begin - first);
      add_team(piece, sum);
      if (narrow_) shorten(sum, piece.count());
      const auto bytes = static_cast<std::size_t>(piece.count() * size_of(wire_type(T(), narrow_)));
      traffic_[bucket].sent.push_back({wire_.send(sum, bytes, rank, tag_), rank});
    });
  }
}

template <class T>
void Overlap<T>::add_team(const Slice& slice, T* to) {
  const Shard<T> alone{slice.begin, slice.end, nullptr, {}};
  walk<T>(partial_pass(), arenas_.workers(), runs_, alone, buffers_, {.mean = to});
}

template <class T>
void Overlap<T>::settle(std::size_t bucket) {
  const auto others = static_cast<std::size_t>(topology_.team_count() - 1);
  for (const int k : own_) {
    const Slice slice = part_of(k, bucket);
    if (narrow_)
      for_pieces(slice, kMessage<T>, [&](const Slice& piece) {
        for (std::size_t other = 0; other < others; ++other) lengthen(incoming(piece, other), piece.count());
      });
    for_pieces(slice, kPiece, [&](const Slice& piece) { settle(piece); });
    if (!in_step_) early_ += static_cast<double>(slice.count());
  }
}

template <class T>
void Overlap<T>::settle(const Slice& slice) {
  add_team(slice, mine_.data());
  std::vector<const std::byte*> parts;
  std::size_t other = 0;
  for (int team = 0; team < topology_.team_count(); ++team)
    parts.push_back(reinterpret_cast<const std::byte*>(team == topology_.team() ? mine_.data()
                                                                                : incoming(slice, other++)));
  add_tree(parts, slice.count(), total_.data() + (slice.begin - own_begin_), scratch_.data());
}

// ---- within a step ----

template <class T>
void Overlap<T>::complete(std::span<const std::uint8_t> stale, std::span<const std::uint8_t> present) {
  const std::vector<std::uint8_t> agreed(stale.begin(), stale.end());
  in_step_ = true;
  if (!begun_ && !refused_) begin({});
  follow_route();
  std::vector<std::size_t> again;
  for (std::size_t b = 0; b < agreed.size(); ++b)
    if (agreed[b]) again.push_back(b);
  if (!again.empty()) {
    begin(std::move(again));
    follow_route();
  }
  ++round_;
  expected_.assign(present.begin(), present.end());
  begin_round();
}

template <class T>
bool Overlap<T>::route_ended() {
  move();
  const auto under_way = [](const Traffic& one) { return !one.sent.empty(); };
  return settled_ == route_.size() && std::none_of(traffic_.begin(), traffic_.end(), under_way);
}

// The deadline is that of one bucket.
template <class T>
void Overlap<T>::follow_route() {
  for (bool over = false; !over;) {
    const auto one_more = [this, &over, before = settled_] {
      if (refused_) std::rethrow_exception(refused_);
      over = route_ended();
      return over || settled_ > before;
    };
    wait_(one_more, [this] { return awaited(); });
  }
}

template <class T>
std::vector<int> Overlap<T>::awaited() const {
  std::vector<int> ranks;
  for (const Traffic& traffic : traffic_)
    for (const Pending& one : traffic.received) ranks.push_back(one.rank);
  for (const Traffic& traffic : traffic_)
    for (const Pending& one : traffic.sent) ranks.push_back(one.rank);
  if (ranks.empty()) return topology_.others();
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

template class Overlap<float>;
template class Overlap<double>;

}  // namespace xc
