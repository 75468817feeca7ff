#include "engine/arenas.hpp"

#include <algorithm>

namespace xc {
namespace {

ArenaLayout layout_of(const Topology& topology, const Plan& plan, int rank, int slots, int sums,
                      std::int64_t tile, std::size_t control_bytes) {
  return {
      plan,         rank * topology.workers(), topology.workers(), topology.carried(rank), slots, sums, tile,
      control_bytes};
}

}  // namespace

template <class T>
Arenas<T>::Arenas(Team& team, const std::function<Shared(std::size_t)>& share, const Plan& plan, int slots,
                  int sums, std::int64_t tile, std::size_t control_bytes)
    : place_(static_cast<std::size_t>(team.place())),
      first_worker_(static_cast<std::size_t>(team.first_worker())),
      own_workers_(static_cast<std::size_t>(team.workers_per_rank())),
      carried_(team.topology().carried(team.rank())),
      sums_(sums),
      layout_(layout_of(team.topology(), plan, team.rank(), slots, sums, tile, control_bytes)),
      views_(share(layout_.views_bytes())),
      state_(share(layout_.state_bytes())),
      control_(team.share(layout_.control_bytes())),
      shards_(plan.segments.size()),
      all_sums_(plan.segments.size()) {
  const Topology& topology = team.topology();
  for (int p = 0; p < team.size(); ++p)
    locate(layout_of(topology, plan, team.member(p), slots, sums, tile, control_bytes), plan, topology,
           static_cast<std::size_t>(p), slots);
  workers_.own = workers_.sources;
  for (const int k : topology.workers_of(topology.team())) workers_.numbers.push_back(std::uint32_t(k));
}

// Finds one rank's part.
template <class T>
void Arenas<T>::locate(const ArenaLayout& layout, const Plan& plan, const Topology& topology,
                       std::size_t place, int slots) {
  const int rank = topology.members()[place];
  std::byte* const state = state_[place]->data();
  std::byte* const control = control_[place]->data();
  const std::vector<int> carried = topology.carried(rank);
  for (std::size_t i = 0; i < carried.size(); ++i) {
    const auto k = static_cast<std::size_t>(carried[i]);
    const Segment& segment = plan.segments[k];
    Shard<T>& shard = shards_[k];
    shard = {segment.begin, segment.end, reinterpret_cast<T*>(state + layout.master(i, 0)), {}};
    if (topology.owner(carried[i]) == rank)
      for (int s = 0; s < slots; ++s)
        shard.slots[s] = reinterpret_cast<T*>(state + layout.master(i, static_cast<std::size_t>(s) + 1));
    all_sums_[k] = {reinterpret_cast<double*>(control + layout.sums(i)),
                    static_cast<std::size_t>(kSumSets * sums_) * (cells_of(plan, segment).size() - 1)};
  }
  std::byte* const views = views_[place]->data();
  for (std::size_t v = 0; v < own_workers_; ++v) {
    workers_.sources.push_back(views + layout.gradients(v));
    workers_.targets.push_back(views + layout.weights(v));
  }
}

template <class T>
std::byte* Arenas<T>::target_of(int worker) const {
  const auto& numbers = workers_.numbers;
  const auto found = std::lower_bound(numbers.begin(), numbers.end(), static_cast<std::uint32_t>(worker));
  return workers_.targets[static_cast<std::size_t>(found - numbers.begin())];
}

template class Arenas<float>;
template class Arenas<double>;

}  // namespace xc
