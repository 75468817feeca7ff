#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "comm/team.hpp"
#include "engine/arenas.hpp"
#include "engine/engine.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/rails.hpp"
#include "engine/runs.hpp"

namespace xc {

// The local phase of post-local SGD (Lin et al. 2018, arXiv:1808.07217). A LOCAL STEP applies the rule to
// each worker's own gradient, weights and slots, without a word to other ranks: a worker's X is its weights,
// and its slots are a full COPY in shared memory, made here. AVERAGING puts the mean over the workers of
// weights and slots into the master weights and the state, and the weights back into every X; the copies of
// the slots stay what they are. A ROUND is what lies between two averagings.
template <class T>
class LocalPhase {
 public:
  // Collective. `runs` makes those of one worker alone; averages are published past the cache if `streaming`,
  // and go over the rails if there are several teams.
  // Throws UsageError for parameters that are shorter than their master weights and for rules that measure.
  LocalPhase(Team& team, const Plan& plan, const Arenas<T>& arenas, const RunMaker<T>& runs, Rails<T>* rails,
             std::int64_t tile, bool streaming);

  // Collective. Gives every copy the values of the state; `ages` are those of its layers so far.
  void begin(std::span<const Age> ages);
  // Of this rank's workers.
  void step(const Engine::Step& step);
  // This rank's shards, of the layers that any rank has touched in this round.
  void average(std::span<const std::uint8_t> touched);
  // Every worker has the master weights.
  void begin_round();

  std::int64_t steps() const { return steps_; }                          // in this round
  const std::vector<std::uint8_t>& touched() const { return touched_; }  // layers, by a worker of this rank
  const std::vector<std::uint8_t>& begins() const { return begins_; }  // groups whose state this round begins

 private:
  std::vector<Run<T>> mean_runs(std::span<const std::uint8_t> touched) const;
  void average_in_team(const Workers& weights, std::span<const Run<T>> runs);
  void average_over_rails(const Workers& weights, std::span<const Run<T>> runs);
  std::function<void(const Slice&, T*)> sum_of(const Workers& arrays, std::span<const Run<T>> runs);

  const Plan& plan_;
  const Arenas<T>& arenas_;
  const RunMaker<T>& runs_;
  Rails<T>* rails_;
  std::size_t worker_count_;  // of all teams
  bool streaming_;
  Shared memory_;
  std::vector<Workers> copies_;         // for each slot, as sources
  std::vector<Shard<T>> own_;           // every own worker's weights and slots: a shard as long as the plan
  std::vector<std::vector<Age>> ages_;  // for each own worker, per layer
  std::vector<std::uint8_t> touched_;
  std::vector<std::uint8_t> begins_;
  std::int64_t steps_ = 0;
  TileBuffers<T> buffers_;
};

}  // namespace xc
