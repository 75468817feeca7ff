#pragma once

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

// The arithmetic of a step: which passes, over which memory.
template <class T>
class Stepper {
 public:
  Stepper(const Plan& plan, const Arenas<T>& arenas, std::int64_t tile, bool streaming);

  // One pass; or, if the step needs the gradient's norm, two, and `meet` between them, after which every
  // rank's sums are visible to all.
  Engine::Outcome run(std::vector<Run<T>>& runs, const Engine::Step& step, const std::function<void()>& meet);
  // Each stage in a pass of its own.
  void run_unfused(std::span<const Run<T>> runs);

  // Collectives without a rule.
  void load(const Workers& root, std::span<const Run<T>> runs);
  void publish(std::span<const Run<T>> runs);
  void publish_to(std::byte* x, std::span<const Run<T>> runs);

 private:
  void measure(std::span<const Run<T>> runs);
  double norm() const;

  const Plan& plan_;
  const Arenas<T>& arenas_;
  Pass<T> whole_;
  Pass<T> clipped_;
  TileBuffers<T> buffers_;
  std::vector<T> waiting_;  // the reduced gradient of this rank's shards, between unfused passes
};

}  // namespace xc
