#include <algorithm>
#include <bit>

#include "engine/rails.hpp"

// Both legs by halving: recursive halving of the sums, recursive doubling of what follows (Thakur,
// Rabenseifner and Gropp 2005, section 4.3). In round s a carrier talks to that of its place in the team
// whose number differs in bit s: it sends the sums of the segments whose owners lie on the other side, and
// adds what it gets to its own. Neighbours are paired first, so the sums are those of the tree. It takes 2
// log2 M messages where all to all takes 2 (M - 1); a chunk goes all the way before the next begins.

namespace xc {
namespace {

// The bits of a team's number, the lowest first: teams that part in an early round lie far apart.
unsigned reversed(unsigned team, int bits) {
  unsigned result = 0;
  for (int bit = 0; bit < bits; ++bit) result |= ((team >> bit) & 1u) << (bits - 1 - bit);
  return result;
}

}  // namespace

template <class T>
bool Rails<T>::can_halve(const Topology& topology) {
  return std::has_single_bit(topology.teams().size()) && topology.has_equal_teams();
}

// The carried segments in the order in which halves are cut: half of them stay in every round.
template <class T>
std::vector<int> Rails<T>::order_of_halves() const {
  const int bits = std::countr_zero(static_cast<unsigned>(topology_.team_count()));
  const auto key = [&](int k) {
    return std::pair(reversed(static_cast<unsigned>(topology_.team_of(topology_.owner(k))), bits), k);
  };
  std::vector<int> order = carried_;
  std::sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  return order;
}

template <class T>
int Rails<T>::partner(int round) const {
  const int team = topology_.team() ^ (1 << round);
  return topology_.teams()[static_cast<std::size_t>(team)][static_cast<std::size_t>(topology_.place())];
}

// Sends one run of a buffer to the partner of a round and receives another.
template <class T>
void Rails<T>::swap(int round, const T* from, T* to, std::int64_t count, bool narrow) {
  std::vector<Pending> under_way;
  const std::int64_t bytes = count * (narrow ? std::int64_t{2} : std::int64_t{sizeof(T)});
  receive(to, bytes, partner(round), Tag::partial, under_way);
  send(from, bytes, partner(round), Tag::partial, under_way);
  finish(under_way);
}

template <class T>
void Rails<T>::run_by_halves(const Work& work, const std::vector<Array>& arrays) {
  const std::vector<int> order = order_of_halves();
  halves_.resize(order.size() * static_cast<std::size_t>(chunk_));
  others_.resize(halves_.size() / 2);
  for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
    if (work.partial) reduce_by_halves(chunk, order, work);
    for (const Array& array : arrays) gather_by_doubles(chunk, order, array);
    for (const int k : order)
      if (const Slice slice = slice_of(k, chunk); work.publish && slice.count() > 0) work.publish(slice);
  }
}

template <class T>
void Rails<T>::reduce_by_halves(std::int64_t chunk, const std::vector<int>& order, const Work& work) {
  for (std::size_t i = 0; i < order.size(); ++i)
    work.partial(slice_of(order[i], chunk), halves_.data() + static_cast<std::int64_t>(i) * chunk_);
  T* mine = halves_.data();
  auto count = static_cast<std::int64_t>(halves_.size());
  for (int round = 0; 1 << round < topology_.team_count(); ++round) {
    count /= 2;
    const bool upper = topology_.team() >> round & 1;
    T* const theirs = upper ? mine : mine + count;
    if (upper) mine += count;
    if (narrow_) shorten(theirs, count);
    swap(round, theirs, others_.data(), count, narrow_ && sizeof(T) == 4);
    if (narrow_) lengthen(others_.data(), count);
    for (std::int64_t i = 0; i < count; ++i) mine[i] += others_[static_cast<std::size_t>(i)];
  }
  for (std::size_t i = 0; i < own_.size(); ++i)
    if (const Slice slice = slice_of(own_[i], chunk); slice.count() > 0)
      work.settle(slice, mine + static_cast<std::int64_t>(i) * chunk_);
}

template <class T>
void Rails<T>::gather_by_doubles(std::int64_t chunk, const std::vector<int>& order, const Array& array) {
  const auto at = [&](const Slice& slice) {
    return array(slice.segment) +
           (slice.begin - plan_.segments[static_cast<std::size_t>(slice.segment)].begin);
  };
  auto count = static_cast<std::int64_t>(own_.size()) * chunk_;
  const auto first = std::find(order.begin(), order.end(), own_.front()) - order.begin();
  T* mine = halves_.data() + first * chunk_;
  for (std::size_t i = 0; i < own_.size(); ++i) {
    const Slice slice = slice_of(own_[i], chunk);
    std::copy_n(at(slice), slice.count(), mine + static_cast<std::int64_t>(i) * chunk_);
  }
  for (int round = std::countr_zero(static_cast<unsigned>(topology_.team_count())) - 1; round >= 0; --round) {
    const bool upper = topology_.team() >> round & 1;
    swap(round, mine, upper ? mine - count : mine + count, count, false);
    if (upper) mine -= count;
    count *= 2;
  }
  for (std::size_t i = 0; i < order.size(); ++i) {
    const Slice slice = slice_of(order[i], chunk);
    if (topology_.owner(order[i]) != topology_.rank())
      std::copy_n(halves_.data() + static_cast<std::int64_t>(i) * chunk_, slice.count(), at(slice));
  }
}

template bool Rails<float>::can_halve(const Topology&);
template bool Rails<double>::can_halve(const Topology&);
template void Rails<float>::run_by_halves(const Work&, const std::vector<Array>&);
template void Rails<double>::run_by_halves(const Work&, const std::vector<Array>&);

}  // namespace xc
