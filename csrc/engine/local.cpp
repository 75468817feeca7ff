#include "engine/local.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace xc {
namespace {

constexpr std::size_t kPage = 4096;

// Bytes from one copy to the next; the odd lines keep their streams out of the same sets of the cache.
std::size_t stride_of(const Plan& plan) {
  return (static_cast<std::size_t>(plan.bytes) + kPage - 1) / kPage * kPage + 3 * kLine;
}

std::size_t copy_bytes(const Plan& plan, const Team& team, int slots) {
  return static_cast<std::size_t>(slots * team.workers_per_rank()) * stride_of(plan);
}

template <class T>
void require_local(const Plan& plan, const RunMaker<T>& runs) {
  if (runs.measures() > 0) throw UsageError("a rule with trust ratios takes no local steps");
  for (const Layer& layer : plan.layers)
    if (layer.spec.dtype != plan.master)
      throw UsageError("'" + layer.spec.name + "' is shorter than its master weights: no local steps");
}

template <class T>
Shared checked_copies(Team& team, const Plan& plan, const RunMaker<T>& runs) {
  require_local(plan, runs);
  return runs.slots() == 0 ? Shared{} : team.share(copy_bytes(plan, team, runs.slots()));
}

}  // namespace

template <class T>
LocalPhase<T>::LocalPhase(Team& team, const Plan& plan, const Arenas<T>& arenas, const RunMaker<T>& runs,
                          Rails<T>* rails, std::int64_t tile, bool streaming)
    : plan_(plan),
      arenas_(arenas),
      runs_(runs),
      rails_(rails),
      worker_count_(static_cast<std::size_t>(team.worker_count())),
      streaming_(streaming),
      memory_(checked_copies(team, plan, runs)),
      copies_(static_cast<std::size_t>(runs.slots())),
      buffers_(tile, team.worker_count()) {
  const auto own = static_cast<std::size_t>(team.workers_per_rank());
  const std::size_t workers = own * static_cast<std::size_t>(team.size());
  for (std::size_t s = 0; s < copies_.size(); ++s)
    for (std::size_t i = 0; i < workers; ++i)
      copies_[s].sources.push_back(memory_[i / own]->data() +
                                   (i % own * copies_.size() + s) * stride_of(plan));
  for (std::size_t i = arenas.first_source(); i < arenas.first_source() + own; ++i) {
    Shard<T> whole{0, plan.length, reinterpret_cast<T*>(arenas.workers().targets[i]), {}};
    for (std::size_t s = 0; s < copies_.size(); ++s)
      whole.slots[s] = const_cast<T*>(reinterpret_cast<const T*>(copies_[s].sources[i]));
    own_.push_back(whole);
  }
}

template <class T>
void LocalPhase<T>::begin(std::span<const Age> ages) {
  std::vector<T> whole(copies_.empty() ? 0 : static_cast<std::size_t>(plan_.length));
  for (std::size_t s = 0; s < copies_.size(); ++s) {
    const auto state = [&](int k) { return arenas_.shards()[static_cast<std::size_t>(k)].slots[s]; };
    if (rails_)
      rails_->collect(state, whole);
    else
      for (const Segment& segment : plan_.segments)
        std::copy_n(state(segment.owner), segment.count(), whole.data() + segment.begin);
    for (const Shard<T>& copy : own_) std::copy(whole.begin(), whole.end(), copy.slots[s]);
  }
  ages_.assign(own_.size(), {ages.begin(), ages.end()});
  begin_round();
}

template <class T>
void LocalPhase<T>::begin_round() {
  touched_.assign(plan_.layers.size(), 0);
  begins_.assign(runs_.groups(), 0);
  steps_ = 0;
}

// A step of one source, the worker's own gradient, on the weights that X is.
template <class T>
void LocalPhase<T>::step(const Engine::Step& step) {
  const std::size_t layers = plan_.layers.size();
  const auto begins = runs_.begins(step);
  for (std::size_t group = 0; group < begins.size(); ++group) begins_[group] |= begins[group];
  for (std::size_t v = 0; v < own_.size(); ++v) {
    const auto present = step.present.subspan(v * layers, layers);
    const auto runs = runs_.for_step(step, present, ages_[v]);
    const Workers alone{{arenas_.workers().sources[arenas_.first_source() + v]}, {}, {}};
    walk<T>(apply_pass({}, {}), alone, runs, own_[v], buffers_);
    runs_.add_updates(ages_[v], present, begins);
    for (std::size_t i = 0; i < layers; ++i) touched_[i] |= present[i];
  }
  ++steps_;
}

// A layer that nobody touched is the same everywhere, and a mean over it could only round.
template <class T>
std::vector<Run<T>> LocalPhase<T>::mean_runs(std::span<const std::uint8_t> touched) const {
  std::vector<Run<T>> runs, all = runs_.plain();
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].scale = T(1.0 / static_cast<double>(worker_count_));
    if (touched[i]) runs.push_back(all[i]);
  }
  return runs;
}

template <class T>
void LocalPhase<T>::average(std::span<const std::uint8_t> touched) {
  const auto runs = mean_runs(touched);
  const auto& targets = arenas_.workers().targets;
  const Workers weights{{targets.begin(), targets.end()}, {targets.begin(), targets.end()}, targets};
  if (rails_) return average_over_rails(weights, runs);
  average_in_team(weights, runs);
}

template <class T>
void LocalPhase<T>::average_in_team(const Workers& weights, std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.own_shards()) {
    const Shard<T> part{shard.begin, shard.end, nullptr, {}};
    walk<T>(sum_pass(streaming_), weights, runs, part, buffers_, {.mean = shard.w});
    for (std::size_t s = 0; s < copies_.size(); ++s)
      walk<T>(load_pass(), copies_[s], runs, part, buffers_, {.mean = shard.slots[s]});
  }
}

// The team's sum over its workers' arrays.
template <class T>
std::function<void(const Slice&, T*)> LocalPhase<T>::sum_of(const Workers& arrays,
                                                            std::span<const Run<T>> runs) {
  return [this, &arrays, runs](const Slice& slice, T* to) {
    const Shard<T> part{slice.begin, slice.end, nullptr, {}};
    walk<T>(partial_pass(), arrays, runs, part, buffers_, {.mean = to});
  };
}

template <class T>
void LocalPhase<T>::average_over_rails(const Workers& weights, std::span<const Run<T>> runs) {
  const auto master = [this](const Slice& slice, int slot) {
    const Shard<T>& shard = arenas_.shards()[static_cast<std::size_t>(slice.segment)];
    return (slot < 0 ? shard.w : shard.slots[slot]) + (slice.begin - shard.begin);
  };
  const auto mean_into = [&](int slot) {
    return [&, slot](const Slice& slice, const T* total) {
      const Shard<T> part{slice.begin, slice.end, nullptr, {}};
      walk<T>(summing_pass({.received = true}, {}), weights, runs, part, buffers_,
              {.mean = master(slice, slot), .received = total});
    };
  };
  const auto publish = [&](const Slice& slice) {
    const Shard<T> part{slice.begin, slice.end, master(slice, -1), {}};
    walk<T>(publication_pass(streaming_), weights, runs, part, buffers_);
  };
  rails_->reduce_and_gather({sum_of(weights, runs), mean_into(-1), publish},
                            {[this](int k) { return arenas_.shards()[static_cast<std::size_t>(k)].w; }});
  for (std::size_t s = 0; s < copies_.size(); ++s)
    rails_->reduce({sum_of(copies_[s], runs), mean_into(static_cast<int>(s)), {}});
}

template class LocalPhase<float>;
template class LocalPhase<double>;

}  // namespace xc
