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
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/runs.hpp"

namespace xc {

// What all ranks must agree on before a step, as the doubles of a post: every group's numbers, then those
// that concern the whole step.
std::vector<std::string> names_of_step_numbers(const FamilyInfo& family, std::size_t groups);
std::vector<double> numbers_of(const Engine::Step& step);
Engine::Step step_of(std::span<const double> numbers);

// A meeting of all ranks between two passes; whether the first of them changed weights or state.
using Meet = std::function<void(bool touched)>;

// The arithmetic of a step: which passes, over which memory.
template <class T>
class Stepper {
 public:
  Stepper(const Plan& plan, const Arenas<T>& arenas, std::int64_t tile, bool streaming);

  // One pass; before it another if the step needs the gradient's norm, and one for each measure of the rule.
  // `meet` stands between passes: after it every rank's sums are visible to all.
  Engine::Outcome run(std::vector<Run<T>>& runs, const Engine::Step& step, int measures, const Meet& meet);
  // Each stage in a pass of its own.
  void run_unfused(std::span<const Run<T>> runs);

  // Collectives without a rule.
  void load(const Workers& root, std::span<const Run<T>> runs);
  void publish(std::span<const Run<T>> runs);
  void publish_to(std::byte* x, std::span<const Run<T>> runs);

 private:
  Engine::Outcome clip(std::vector<Run<T>>& runs, const Engine::Step& step, const Meet& meet);
  void measure_layers(std::vector<Run<T>>& runs, int measure, const Meet& meet);
  void measure(const Pass<T>& pass, std::span<const Run<T>> runs, int quantities);
  void walk_all(const Pass<T>& pass, std::span<const Run<T>> runs);
  double norm() const;
  std::vector<std::array<double, kMaxSums>> layer_sums() const;

  const Plan& plan_;
  const Arenas<T>& arenas_;
  bool streaming_;
  int set_ = 0;  // of sums, that the last measuring pass wrote
  TileBuffers<T> buffers_;
  std::vector<T> waiting_;  // the reduced gradient of this rank's shards, between unfused passes
};

}  // namespace xc
