#include "engine/arenas.hpp"

namespace xc {
namespace {

ArenaLayout layout_of(const Team& team, const Plan& plan, int rank, int slots, int sums, std::int64_t tile,
                      std::size_t control_bytes) {
  return {plan, rank * team.workers_per_rank(), team.workers_per_rank(), slots, sums, tile, control_bytes};
}

}  // namespace

template <class T>
Arenas<T>::Arenas(Team& team, const Plan& plan, int slots, int sums, std::int64_t tile,
                  std::size_t control_bytes)
    : rank_(static_cast<std::size_t>(team.rank())),
      first_worker_(static_cast<std::size_t>(team.first_worker())),
      own_workers_(static_cast<std::size_t>(team.workers_per_rank())),
      sums_(sums),
      layout_(layout_of(team, plan, team.rank(), slots, sums, tile, control_bytes)),
      views_(team.share(layout_.views_bytes())),
      state_(team.share(layout_.state_bytes())) {
  for (int r = 0; r < team.size(); ++r)
    locate(layout_of(team, plan, r, slots, sums, tile, control_bytes), plan, static_cast<std::size_t>(r),
           slots);
  workers_.own = workers_.sources;
}

// Finds one rank's part.
template <class T>
void Arenas<T>::locate(const ArenaLayout& layout, const Plan& plan, std::size_t rank, int slots) {
  std::byte* const views = views_[rank]->data();
  std::byte* const state = state_[rank]->data();
  for (std::size_t v = 0; v < own_workers_; ++v) {
    const Segment& segment = plan.segments[shards_.size()];
    Shard<T> shard{segment.begin, segment.end, reinterpret_cast<T*>(state + layout.master(v, 0)), {}};
    for (int s = 0; s < slots; ++s)
      shard.slots[s] = reinterpret_cast<T*>(state + layout.master(v, static_cast<std::size_t>(s) + 1));
    shards_.push_back(shard);
    all_sums_.emplace_back(reinterpret_cast<double*>(state + layout.sums(v)),
                           static_cast<std::size_t>(kSumSets * sums_) * (cells_of(plan, segment).size() - 1));
    workers_.sources.push_back(views + layout.gradients(v));
    workers_.targets.push_back(views + layout.weights(v));
  }
}

template class Arenas<float>;
template class Arenas<double>;

}  // namespace xc
