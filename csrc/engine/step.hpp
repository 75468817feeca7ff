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
#include "engine/judge.hpp"
#include "engine/overlap.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/projections.hpp"
#include "engine/rails.hpp"
#include "engine/runs.hpp"
#include "engine/storage.hpp"

namespace xc {

// What all ranks must agree on before a step, as the doubles of a post: every group's numbers, then those
// that concern the whole step.
std::vector<std::string> names_of_step_numbers(const FamilyInfo& family, std::size_t groups);
std::vector<double> numbers_of(const Engine::Step& step);
Engine::Step step_of(std::span<const double> numbers);
inline Bounds bounds_of(const Engine::Step& step) { return {step.max_norm, step.skip_nonfinite}; }

// A meeting of all ranks between two passes; whether the first of them changed weights or state.
using Meet = std::function<void(bool touched)>;

// Which layers have a gradient on any rank, and the history of each.
struct LayerMarks {
  std::span<const std::uint8_t> present;
  std::span<const Age> ages;
  std::span<const std::uint8_t> stale = {};  // buckets, if sums travel during backward
};

// Where the passes over one segment leave their sums.
struct Sinks {
  CellSums mean;
  CellSums together;
  CellSums measured;
  CellSums own;
  void finish();
};

// The arithmetic of a step: which passes, over which memory. With several teams (step_rails.cpp) passes over
// own segments take the sum of the gradients from the rails, and what they give goes out by them.
template <class T>
class Stepper {
 public:
  // Without a `judge` the host decides; without `rails` there is one team; without `overlap` nothing is sent
  // before the step.
  Stepper(const Plan& plan, const Arenas<T>& arenas, Storage& storage, const RunMaker<T>& maker,
          Walker<T>& walker, Walker<T>& mover, Judge<T>* judge, Rails<T>* rails, Overlap<T>* overlap,
          std::int64_t tile, bool streaming);

  // Arrays that the wire may still write to stay where they are.
  ~Stepper();

  // One pass; before it another if the step needs the gradient's norm or statistics, and one for each measure
  // of the rule. `meet` stands between passes: after it every rank's sums are visible to all.
  Engine::Outcome run(const Engine::Step& step, const LayerMarks& marks, const Meet& meet);
  // Whether the judge has the outcome of such a step: then run() does not.
  bool judges(const Engine::Step& step) const;
  // After the meeting that ends the step: what its last pass has summed.
  void read_sums(const Engine::Step& step, const LayerMarks& marks, Engine::Outcome& outcome);
  // Those of the last step.
  const std::vector<Run<T>>& runs() const { return runs_; }
  // Each stage in a pass of its own.
  void run_unfused(const Engine::Step& step, const LayerMarks& marks);
  // Forgets what was measured along: weights or state have changed.
  void forget() { known_.clear(); }

  // Collectives without a rule.
  void load(const Workers& root, std::span<const Run<T>> runs);
  // Every team gets the master weights that one of them has loaded, or that each owner has.
  void spread_from(int team);
  void spread_from_owners() { spread_from(-1); }
  void publish(std::span<const Run<T>> runs);
  void publish_to(std::byte* x, std::span<const Run<T>> runs);

 private:
  using LayerSums = std::vector<TermSums>;

  Engine::Outcome run_judged(const Engine::Step& step, const Meet& meet);
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
  void sum_all(Gradient gradient, Sums sums);
  void walk_own(const Pass& pass, Sums sums);
  void walk_segment(const Pass& pass, Sums sums, std::size_t k, const Shard<T>& shard);
  Sinks sinks(std::size_t k, Sums sums) const;
  Kept<T> kept(Sinks& sinks);
  std::vector<double*> arrays(std::size_t k, int first, int count) const;
  std::vector<double*> arrays_of_workers(std::size_t k) const;

  bool must_wait_for_scalars(const Engine::Step& step) const;
  void collect_total(const LayerMarks& marks);
  void add_team(const Slice& slice, T* to);
  void sum_over_rails(Gradient gradient, Sums sums);
  void share_sums(Sums sums);
  void last_pass_over_rails(const Engine::Step& step, Gradient how, Sums sums, const Meet& meet);
  void sum_workers(Sums sums);
  bool has_factor() const;
  std::vector<typename Rails<T>::Array> make_ready_to_gather();
  void keep_displacement(const Slice& slice, Kept<T>& kept);
  void apply_slice(const Pass& pass, const Slice& slice, const T* total, Sinks& sinks);
  void publish_slice(const Slice& slice);
  void publish_with_filters(const Meet& meet);
  Shard<T> part(const Slice& slice) const;
  T* total_of(std::size_t k);
  T* carried_of(const StoredArray<T>& array, std::size_t k) const;

  double norm() const;
  std::vector<double> statistics() const;
  LayerSums layer_sums() const;
  std::vector<double> sums_of_groups(const LayerSums& sums) const;
  void add_mean_norms_of_workers(LayerSums& sums) const;
  // Calls visit(layer, begin, number) for every cell of one of the last pass's sums, in flat order.
  template <class Visit>
  void for_each_cell(int sum, Visit visit) const {
    std::size_t layer = 0;
    for (std::size_t k = 0; k < arenas_.shards().size(); ++k) {
      const auto cells = cells_of(plan_, plan_.segments[k]);
      const auto numbers = arenas_.sums(k, sum, set_);
      for (std::size_t c = 0; c + 1 < cells.size(); ++c) {
        while (cells[c] >= plan_.layers[layer].end) ++layer;
        visit(layer, cells[c], numbers[c]);
      }
    }
  }

  const Plan& plan_;
  const Arenas<T>& arenas_;
  Storage& storage_;
  const RunMaker<T>& maker_;
  Walker<T>& walker_;
  Walker<T>& mover_;  // of weights as they are, apart from steps
  Judge<T>* judge_;
  Rails<T>* rails_;
  Overlap<T>* overlap_;
  bool streaming_;
  int set_ = 0;  // of sums, that the last summing pass wrote
  Filters<T> filters_;
  Projections<T> projections_;
  std::vector<Run<T>> runs_;         // of the step under way
  std::vector<double> observed_;     // hyper-parameters that follow from statistics,
  std::vector<double> revised_;      // and from what the rule measured
  LayerSums measured_along_;         // by the step before, if its rule lags
  std::vector<std::uint8_t> known_;  // of which layers; empty after forgetting
  std::vector<T> waiting_;           // the reduced gradient of this rank's shards, between unfused passes
  // With several teams: the sum of all workers' gradients for own segments, and for all that are carried the
  // mean gradient, if it displaces, and what gradients are multiplied with to displace.
  StoredArray<T> total_;
  StoredArray<T> mean_;
  StoredArray<T> factor_;
  std::vector<std::size_t> places_;  // of each carried segment in those two
  std::size_t carried_elements_ = 0;
};

}  // namespace xc
