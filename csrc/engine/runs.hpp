#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"

namespace xc {

// Where runs begin and end, and which kernels they take.
using Outline = std::vector<std::int64_t>;
template <class T>
Outline outline_of(std::span<const Run<T>> runs);

// The history of a layer. Its state has BEGUN once a step has put something into it: SGD leaves it
// alone while the momentum is 0.
struct Age {
  std::int64_t updates = 0;
  bool begun = false;

  bool operator==(const Age&) const = default;
};

// Turns a plan into runs. Neighbouring layers that are treated alike (type, group, presence, age)
// make one run, so most models are one run per group; under a rule that measures, a layer is a run.
template <class T>
class RunMaker {
 public:
  RunMaker(const Plan& plan, const EngineOptions& options, int worker_count);

  // How many passes measure layers before the last one.
  int measures() const { return measures_; }
  // Sums for each cell that a set needs.
  int sums() const;
  bool measures_workers() const { return measures_workers_; }
  // Whether displacements by gradients are in units of the rule's steps.
  bool scaled() const;
  std::size_t groups() const { return flags_.size(); }
  // State arrays that the hungriest group needs.
  int slots() const { return slots_; }

  // One run for every layer, without a rule: for loading and publishing.
  std::vector<Run<T>> plain() const;

  // For the numbers that all ranks agreed on and the layers that any of them has a gradient for. Unfused
  // steps displace in a stage of its own, so their publish does not.
  std::vector<Run<T>> for_step(const Engine::Step& step, std::span<const std::uint8_t> present,
                               std::span<const Age> ages) const;

  // For each group: whether a step with these numbers begins the state of layers that have a gradient.
  std::vector<std::uint8_t> begins(const Engine::Step& step) const;

  // Counts so many steps of the layers that are present; `begins` as above.
  void add_updates(std::span<Age> ages, std::span<const std::uint8_t> present,
                   std::span<const std::uint8_t> begins, std::int64_t steps = 1) const;

 private:
  // A group's numbers: the rule's, and then its inner learning rate.
  Hyper numbers_of_rule(const Engine::Step& step, std::size_t group) const;
  double inner_of(const Engine::Step& step, std::size_t group) const;
  void set_rule(Run<T>& run, const LayerSpec& spec, const Engine::Step& step, const Age& age) const;
  void set_displacement(Run<T>& run, const LayerSpec& spec, double inner, const Engine::Step& step) const;

  const Plan& plan_;
  int family_;
  ExtrapolationOptions options_;
  int worker_count_;
  int slots_ = 0;
  int measures_ = 0;
  bool measures_workers_ = false;
  std::vector<unsigned> flags_;  // of each group
  std::vector<double> signs_;    // that each group's gradients are multiplied with
};

}  // namespace xc
