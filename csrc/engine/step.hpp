#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "engine/arenas.hpp"
#include "engine/engine.hpp"
#include "engine/filters.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/projections.hpp"
#include "engine/runs.hpp"

namespace xc {

// What all ranks must agree on before a step, as the doubles of a post: every group's numbers, then those
// that concern the whole step.
std::vector<std::string> names_of_step_numbers(const FamilyInfo& family, std::size_t groups);
std::vector<double> numbers_of(const Engine::Step& step);
Engine::Step step_of(std::span<const double> numbers);

// A meeting of all ranks between two passes; whether the first of them changed weights or state.
using Meet = std::function<void(bool touched)>;

// Which layers have a gradient on any rank, and how often each has been updated.
struct LayerMarks {
  std::span<const std::uint8_t> present;
  std::span<const std::int64_t> updates;
};

// The arithmetic of a step: which passes, over which memory.
template <class T>
class Stepper {
 public:
  Stepper(const Plan& plan, const Arenas<T>& arenas, const RunMaker<T>& maker, std::int64_t tile,
          bool streaming);

  // One pass; before it another if the step needs the gradient's norm or statistics, and one for each measure
  // of the rule. `meet` stands between passes: after it every rank's sums are visible to all.
  Engine::Outcome run(const Engine::Step& step, const LayerMarks& marks, const Meet& meet);
  // After the meeting that ends the step: what its last pass has summed.
  void read_sums(const Engine::Step& step, const LayerMarks& marks, Engine::Outcome& outcome);
  // Each stage in a pass of its own.
  void run_unfused(const Engine::Step& step, const LayerMarks& marks);
  // Forgets what was measured along: weights or state have changed.
  void forget() { known_.clear(); }

  // Collectives without a rule.
  void load(const Workers& root, std::span<const Run<T>> runs);
  void publish(std::span<const Run<T>> runs);
  void publish_to(std::byte* x, std::span<const Run<T>> runs);

 private:
  using LayerSums = std::vector<TermSums>;

  void clip(double norm, const Engine::Step& step);
  void measure_layers(const Engine::Step& step, const LayerMarks& marks, int measure, double norm,
                      const Meet& meet);
  void settle(int measure, const LayerSums& sums);
  void project();
  void last_pass(const Engine::Step& step, const Meet& meet);
  bool any(bool (*is)(const Run<T>&)) const;
  Gradient gradient(const Engine::Step& step) const;
  bool remembers(const Run<T>& run) const;
  void recall(LayerSums& sums) const;
  void walk_all(const Pass<T>& pass, Sums sums);
  std::vector<double*> arrays(std::size_t k, int first, int count) const;
  std::array<std::vector<double*>, 4> destinations(std::size_t k, Sums sums) const;
  double norm() const;
  std::vector<double> statistics() const;
  LayerSums layer_sums() const;
  std::vector<double> sums_of_groups(const LayerSums& sums) const;
  void add_mean_norms_of_workers(LayerSums& sums) const;
  // Calls visit(layer, begin, number) for every cell of one of the last pass's sums, in flat order.
  template <class Visit>
  void for_each_cell(int sum, Visit visit) const;

  const Plan& plan_;
  const Arenas<T>& arenas_;
  const RunMaker<T>& maker_;
  bool streaming_;
  int set_ = 0;  // of sums, that the last summing pass wrote
  TileBuffers<T> buffers_;
  Filters<T> filters_;
  Projections<T> projections_;
  std::vector<Run<T>> runs_;         // of the step under way
  std::vector<double> observed_;     // hyper-parameters that follow from statistics,
  std::vector<double> revised_;      // and from what the rule measured
  LayerSums measured_along_;         // by the step before, if its rule lags
  std::vector<std::uint8_t> known_;  // of which layers; empty after forgetting
  std::vector<T> waiting_;           // the reduced gradient of this rank's shards, between unfused passes
};

}  // namespace xc
