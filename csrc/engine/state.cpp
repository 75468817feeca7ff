#include "engine/state.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace xc {

template <class T>
void State<T>::write(std::size_t layer, int slot, const void* from) const {
  const Layer& whole = plan_.layers[layer];
  for (const Shard<T>& shard : arenas_.own_shards()) {
    const std::int64_t first = std::max(whole.begin, shard.begin);
    const std::int64_t last = std::min(whole.begin + whole.count, shard.end);
    if (first >= last) continue;
    T* const to = (slot == 0 ? shard.w : shard.slots[slot - 1]) + (first - shard.begin);
    const std::size_t bytes = static_cast<std::size_t>(last - first) * sizeof(T);
    if (from)
      storage_.copy(to, static_cast<const T*>(from) + (first - whole.begin), bytes);
    else
      storage_.clear(to, bytes);
  }
}

// This rank's part of a slot, in the host's memory.
template <class T>
std::vector<T> State<T>::own_slot(std::size_t slot) const {
  const auto shards = arenas_.own_shards();
  const std::int64_t begin = shards.front().begin;
  std::vector<T> own(static_cast<std::size_t>(shards.back().end - begin));
  for (const Shard<T>& shard : shards)
    storage_.copy(own.data() + (shard.begin - begin), shard.slots[slot],
                  static_cast<std::size_t>(shard.end - shard.begin) * sizeof(T));
  storage_.finish();
  return own;
}

template <class T>
void State<T>::collect(std::optional<int> only_rank) {
  const bool here = !only_rank || *only_rank == team_.rank();
  collected_.assign(slots_, std::vector<T>(here ? std::size_t(plan_.length) : 0));
  for (std::size_t s = 0; s < collected_.size(); ++s) {
    const std::vector<T> own = own_slot(s);
    const std::int64_t begin = arenas_.own_shards().front().begin;
    rails_->collect(
        [&](int k) { return const_cast<T*>(own.data()) + (plan_.segments[std::size_t(k)].begin - begin); },
        collected_[s], only_rank);
  }
}

template <class T>
void State<T>::read(std::size_t layer, int slot, std::int64_t from, std::int64_t to, void* out) const {
  const std::int64_t begin = plan_.layers[layer].begin + from, end = plan_.layers[layer].begin + to;
  for (const Shard<T>& shard : arenas_.shards()) {
    const std::int64_t first = std::max(begin, shard.begin), last = std::min(end, shard.end);
    if (first >= last) continue;
    const T* at = slot == 0 ? shard.w : shard.slots[slot - 1];
    if (!at && (collected_.empty() || collected_.front().empty()))
      throw UsageError("another host has this part of the state, and it was not collected");
    if (!at) {
      const T* const collected = collected_[static_cast<std::size_t>(slot - 1)].data();
      std::copy_n(collected + first, last - first, static_cast<T*>(out) + (first - begin));
      continue;
    }
    storage_.copy(static_cast<T*>(out) + (first - begin), at + (first - shard.begin),
                  static_cast<std::size_t>(last - first) * sizeof(T));
  }
  storage_.finish();
}

template <class T>
std::pair<std::int64_t, std::int64_t> State<T>::owned(std::size_t layer) const {
  const Layer& whole = plan_.layers[layer];
  const auto within = [&](std::int64_t at) {
    return std::clamp<std::int64_t>(at - whole.begin, 0, whole.count);
  };
  return {within(arenas_.own_shards().front().begin), within(arenas_.own_shards().back().end)};
}

template class State<float>;
template class State<double>;

}  // namespace xc
