#include "engine/runs.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "engine/arena.hpp"

namespace xc {
namespace {

template <class T>
Run<T> plain_run(const Layer& layer) {
  Run<T> run{};
  run.begin = layer.begin;
  run.end = layer.end;
  run.byte_begin = layer.byte_begin;
  run.element_size = size_of(layer.spec.dtype);
  run.dtype = layer.spec.dtype;
  run.filter_length = filter_length(layer.spec);
  run.filters_end = layer.begin + layer.count;
  run.scale = T(1);
  run.extrapolation = &kExtrapolations[0];
  run.reduce = reduce_kernel<T>(layer.spec.dtype);
  run.publish = publish_kernel<T>(layer.spec.dtype, Direction::none, false);
  run.stream = stream_kernel<T>(layer.spec.dtype, Direction::none, false);
  return run;
}

bool alike(const LayerSpec& a, const LayerSpec& b) { return a.group == b.group && a.dtype == b.dtype; }

}  // namespace

template <class T>
Outline outline_of(std::span<const Run<T>> runs) {
  Outline outline;
  for (const Run<T>& run : runs)
    outline.insert(outline.end(),
                   {run.begin, run.end, run.filters_end, std::int64_t(run.dtype),
                    run.kernel ? run.family : -1, std::int64_t(run.member),
                    run.extrapolation->random ? std::int64_t(*run.extrapolation->random) : -1});
  return outline;
}

template Outline outline_of<float>(std::span<const Run<float>>);
template Outline outline_of<double>(std::span<const Run<double>>);

template <class T>
RunMaker<T>::RunMaker(const Plan& plan, const EngineOptions& options, int worker_count)
    : plan_(plan),
      family_(family_index(options.rule)),
      options_(options.extrapolation),
      worker_count_(worker_count) {
  const FamilyInfo& family = families()[static_cast<std::size_t>(family_)];
  for (const GroupSpec& group : options.groups) {
    flags_.push_back(group.flags);
    signs_.push_back(group.maximize ? -1.0 : 1.0);
    const RuleKernel<T>& kernel = rule_kernel<T>(family_, family.member(group.flags, group.hyper));
    slots_ = std::max(slots_, kernel.slots);
    measures_ = std::max(measures_, kernel.measures);
    measures_workers_ |= kernel.own_decay != nullptr;
  }
}

template <class T>
bool RunMaker<T>::scaled() const {
  const int index = extrapolation_index(options_.name);
  return options_.scaled && kExtrapolations[static_cast<std::size_t>(index)].by_gradient();
}

template <class T>
int RunMaker<T>::sums() const {
  return kStatistics + (measures_ > 0 ? kMaxSums : 0) + (measures_workers_ ? worker_count_ : 0);
}

template <class T>
std::vector<Run<T>> RunMaker<T>::plain() const {
  std::vector<Run<T>> runs;
  for (const Layer& layer : plan_.layers) runs.push_back(plain_run<T>(layer));
  return runs;
}

template <class T>
Hyper RunMaker<T>::numbers_of_rule(const Engine::Step& step, std::size_t group) const {
  const std::size_t width = step.hyper.size() / flags_.size();
  return step.hyper.subspan(group * width, width - 1);
}

template <class T>
double RunMaker<T>::inner_of(const Engine::Step& step, std::size_t group) const {
  return step.hyper[(group + 1) * (step.hyper.size() / flags_.size()) - 1];
}

template <class T>
std::vector<std::uint8_t> RunMaker<T>::begins(const Engine::Step& step) const {
  const FamilyInfo& family = families()[static_cast<std::size_t>(family_)];
  std::vector<std::uint8_t> groups;
  for (std::size_t group = 0; group < flags_.size(); ++group) {
    const unsigned member = family.member(flags_[group], numbers_of_rule(step, group));
    groups.push_back(rule_kernel<T>(family_, member).slots > 0 || slots_ == 0);
  }
  return groups;
}

template <class T>
void RunMaker<T>::add_updates(std::span<Age> ages, std::span<const std::uint8_t> present,
                              std::span<const std::uint8_t> begins, std::int64_t steps) const {
  for (std::size_t i = 0; i < ages.size(); ++i) {
    if (!present[i] || steps == 0) continue;
    ages[i].updates += steps;
    ages[i].begun = ages[i].begun || begins[static_cast<std::size_t>(plan_.layers[i].spec.group)];
  }
}

template <class T>
void RunMaker<T>::set_rule(Run<T>& run, const LayerSpec& spec, const Engine::Step& step,
                           const Age& age) const {
  const auto group = static_cast<std::size_t>(spec.group);
  const Hyper numbers = numbers_of_rule(step, group);
  const FamilyInfo& family = families()[static_cast<std::size_t>(family_)];
  run.family = family_;
  run.member = family.member(flags_[group], numbers);
  const RuleKernel<T>& kernel = rule_kernel<T>(run.family, run.member);
  if (kernel.slots > slots_)
    throw UsageError("the engine was built without the state arrays that this step needs");
  kernel.prepare(numbers, age.begun ? age.updates : 0, run.scalars);
  run.kernel = &kernel;
  run.clip = T(1);
  run.scale = T(signs_[group] / (worker_count_ * step.divisor));
  run.own = T(signs_[group] / step.divisor);
  run.decay = kernel.own_decay ? kernel.own_decay(run.scalars) : T(0);
  run.observe = observe_kernel<T>(spec.dtype, worker_count_);
  run.spread = spread_kernel<T>(spec.dtype);
  run.own_squares = own_squares_kernel<T>(spec.dtype, run.decay != T(0));
  run.noise = {options_.seed, static_cast<std::uint32_t>(age.updates + 1), 0};
  set_displacement(run, spec, inner_of(step, group), step);
}

template <class T>
void RunMaker<T>::set_displacement(Run<T>& run, const LayerSpec& spec, double inner,
                                   const Engine::Step& step) const {
  const int wanted = T(inner) != T(0) ? extrapolation_index(options_.name) : 0;
  run.extrapolation = &kExtrapolations[static_cast<std::size_t>(wanted)];
  run.own_rate = T(signs_[static_cast<std::size_t>(spec.group)] * inner / step.divisor);
  run.shared_rate = T(inner);
  if (options_.clipped)
    run.clipped = Clipped::own_rate;
  else if (run.extrapolation->by_mean())
    run.clipped = Clipped::shared_rate;
  const Direction direction = run.extrapolation->direction;
  run.scaled = options_.scaled && run.extrapolation->by_gradient() && run.kernel->factor;
  run.publish = publish_kernel<T>(spec.dtype, step.fused ? direction : Direction::none, run.scaled);
  run.stream = stream_kernel<T>(spec.dtype, direction, run.scaled);
  run.displace = displace_kernel<T>(spec.dtype, direction);
  if (!run.extrapolation->random)
    run.fused = fused_kernel<T>(spec.dtype, run.family, run.member, worker_count_, direction, run.scaled);
}

template <class T>
std::vector<Run<T>> RunMaker<T>::for_step(const Engine::Step& step, std::span<const std::uint8_t> present,
                                          std::span<const Age> ages) const {
  std::vector<Run<T>> runs;
  std::size_t last = 0;
  for (std::size_t i = 0; i < plan_.layers.size(); ++i) {
    const Layer& layer = plan_.layers[i];
    if (!present[i]) continue;
    const bool joins = !runs.empty() && runs.back().kernel->measures == 0 &&
                       !runs.back().extrapolation->per_filter && runs.back().end == layer.begin;
    if (joins && ages[last] == ages[i] && alike(plan_.layers[last].spec, layer.spec)) {
      runs.back().end = layer.end;
    } else {
      runs.push_back(plain_run<T>(layer));
      runs.back().layer = i;
      set_rule(runs.back(), layer.spec, step, ages[i]);
    }
    last = i;
  }
  return runs;
}

template class RunMaker<float>;
template class RunMaker<double>;

}  // namespace xc
