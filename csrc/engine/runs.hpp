#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"

namespace xc {

// Turns a plan into runs. Neighbouring layers that are treated alike (type, group, presence, count of
// updates) make one run, so most models are one run per group.
template <class T>
class RunMaker {
 public:
  RunMaker(const Plan& plan, const EngineOptions& options, int worker_count);

  // State arrays that the hungriest group needs.
  int slots() const { return slots_; }

  // One run for every layer, without a rule: for loading and publishing.
  std::vector<Run<T>> plain() const;

  // `hyper` holds each group's hyper-parameters and then its inner rate; `updates` how often each layer has
  // been updated. Unfused steps displace in a stage of its own, so their publish does not.
  std::vector<Run<T>> for_step(std::span<const double> hyper, std::span<const std::uint8_t> present,
                               std::span<const std::int64_t> updates, bool fused) const;

 private:
  void set_rule(Run<T>& run, const LayerSpec& spec, std::span<const double> hyper, std::int64_t updates,
                bool fused) const;

  const Plan& plan_;
  int family_;
  int extrapolation_;
  int worker_count_;
  int slots_ = 0;
  std::vector<unsigned> flags_;  // of each group
};

}  // namespace xc
