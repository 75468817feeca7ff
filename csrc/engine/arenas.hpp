#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "comm/team.hpp"
#include "engine/arena.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"

namespace xc {

// The memory of the team's ranks, as this rank sees it: every worker's arrays, found by the layout in each
// rank's two mappings. T is the master type.
template <class T>
class Arenas {
 public:
  // Collective. `share` gives the memory that weights, gradients and state lie in.
  Arenas(Team& team, const std::function<Shared(std::size_t bytes)>& share, const Plan& plan, int slots,
         int sums, std::int64_t tile, std::size_t control_bytes);

  const Shared& control() const { return control_; }
  // What holds this rank's own part.
  Shared memory() const { return {views_[place_], state_[place_]}; }

  // X and G of this rank's worker v, kept alive by whoever holds them.
  std::shared_ptr<std::byte> weights(int v) const { return view(layout_.weights(std::size_t(v))); }
  std::shared_ptr<std::byte> gradients(int v) const { return view(layout_.gradients(std::size_t(v))); }

  // The team's; this rank's begin with number first_source().
  const Workers& workers() const { return workers_; }
  std::size_t first_source() const { return place_ * own_workers_; }
  // X of a worker of this team.
  std::byte* target_of(int worker) const;
  // The segments of all workers of all teams, in the order of workers, which is that of offsets. State is
  // only that of the team's own.
  std::span<const Shard<T>> shards() const { return shards_; }
  std::span<const Shard<T>> own_shards() const { return shards().subspan(first_worker_, own_workers_); }
  // The numbers of those that this rank carries, its own among them.
  const std::vector<int>& carried() const { return carried_; }

  // Of worker k's shard, sum number `sum` of a set: a number per cell.
  std::span<double> sums(std::size_t k, int sum, int set) const {
    const std::size_t cells = all_sums_[k].size() / static_cast<std::size_t>(kSumSets * sums_);
    return all_sums_[k].subspan(static_cast<std::size_t>(set * sums_ + sum) * cells, cells);
  }
  std::size_t first_worker() const { return first_worker_; }

 private:
  std::shared_ptr<std::byte> view(std::size_t offset) const {
    const auto& mine = views_[place_];
    return {mine, mine->data() + offset};
  }
  void locate(const ArenaLayout& layout, const Plan& plan, const Topology& topology, std::size_t place,
              int slots);

  std::size_t place_;
  std::size_t first_worker_;
  std::size_t own_workers_;
  std::vector<int> carried_;
  int sums_;
  ArenaLayout layout_;
  Shared views_;
  Shared state_;
  Shared control_;
  Workers workers_;
  std::vector<Shard<T>> shards_;
  std::vector<std::span<double>> all_sums_;
};

}  // namespace xc
