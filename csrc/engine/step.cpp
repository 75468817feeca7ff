#include "engine/step.hpp"

#include <algorithm>
#include <cmath>

namespace xc {
namespace {

constexpr const char* kWholeStep[] = {
    "max_grad_norm (0: none)",
    "skip_nonfinite",
    "the divisor of the gradients (micro-batches x loss scale)",
    "statistics of the gradients (0: none, 1: of this step, 2: of the last)",
    "the number of micro-batches",
    "AdaScale's scale (0: all micro-batches)",
    "AdaScale's progress",
    "how inner_lr follows lr (0: a number, 1: lr, 2: lr/K, 3: noise, 4: a function)",
    "the number of local steps since the last averaging"};
constexpr std::size_t kWholeStepCount = std::size(kWholeStep);

}  // namespace

std::vector<std::string> names_of_step_numbers(const FamilyInfo& family, std::size_t groups) {
  std::vector<std::string> names;
  for (std::size_t g = 0; g < groups; ++g) {
    const std::string of_group = " of parameter group " + std::to_string(g);
    for (const Parameter& parameter : family.parameters)
      names.push_back(std::string(parameter.name) + of_group);
    names.push_back("inner_lr" + of_group);
  }
  names.insert(names.end(), std::begin(kWholeStep), std::end(kWholeStep));
  return names;
}

std::vector<double> numbers_of(const Engine::Step& step) {
  std::vector<double> numbers(step.hyper.begin(), step.hyper.end());
  numbers.insert(numbers.end(),
                 {step.max_norm, double(step.skip_nonfinite), step.divisor, double(step.observe)});
  numbers.insert(numbers.end(), step.gain.begin(), step.gain.end());
  numbers.push_back(double(step.local_steps));
  return numbers;
}

Engine::Step step_of(std::span<const double> numbers) {
  const auto whole = numbers.last(kWholeStepCount);
  Engine::Step step;
  step.hyper = numbers.first(numbers.size() - kWholeStepCount);
  step.max_norm = whole[0];
  step.skip_nonfinite = whole[1] != 0;
  step.divisor = whole[2];
  step.observe = static_cast<Observe>(whole[3]);
  return step;
}

template <class T>
Stepper<T>::Stepper(const Plan& plan, const Arenas<T>& arenas, Storage& storage, const RunMaker<T>& maker,
                    Walker<T>& walker, Walker<T>& mover, Judge<T>* judge, Rails<T>* rails,
                    Overlap<T>* overlap, std::int64_t tile, bool streaming)
    : plan_(plan),
      arenas_(arenas),
      storage_(storage),
      maker_(maker),
      walker_(walker),
      mover_(mover),
      judge_(judge),
      rails_(rails),
      overlap_(overlap),
      streaming_(streaming),
      filters_(arenas.shards(), tile),
      projections_(plan),
      places_(plan.segments.size()) {
  for (const int k : arenas.carried()) {
    places_[static_cast<std::size_t>(k)] = carried_elements_;
    carried_elements_ += static_cast<std::size_t>(plan.segments[static_cast<std::size_t>(k)].count());
  }
}

template <class T>
Engine::Outcome Stepper<T>::run(const Engine::Step& step, const LayerMarks& marks, const Meet& meet) {
  set_ = 0;
  Engine::Outcome outcome;
  runs_ = maker_.for_step(step, marks.present, marks.ages);
  const bool observes = step.observe == Observe::before;
  if (judges(step)) return run_judged(step, meet);
  if (rails_ && must_wait_for_scalars(step)) collect_total(marks);
  double norm = 0;
  if (step.wants_norm() || observes) {
    sum_all({}, {.mean = true, .workers = observes});
    meet(false);
    norm = this->norm();
    if (step.wants_norm()) outcome.norm = norm;
    outcome.skipped = step.skip_nonfinite && !std::isfinite(norm);
    if (outcome.skipped) return outcome;
  }
  Engine::Step settled = step;
  if (observes) {
    outcome.statistics = statistics();
    observed_ = step.revise(step.hyper, outcome.statistics);
    settled.hyper = observed_;
    runs_ = maker_.for_step(settled, marks.present, marks.ages);
  }
  if (step.max_norm > 0) clip(norm, step);
  for (int measure = 0; measure < maker_.measures(); ++measure)
    measure_layers(settled, marks, measure, norm, meet);
  last_pass(step, meet);
  return outcome;
}

// Whether nobody but the last pass needs to know what the norm leads to.
template <class T>
bool Stepper<T>::judges(const Engine::Step& step) const {
  return judge_ && !rails_ && step.wants_norm() && step.observe == Observe::nothing && maker_.measures() == 0;
}

template <class T>
Engine::Outcome Stepper<T>::run_judged(const Engine::Step& step, const Meet& meet) {
  judge_->begin(bounds_of(step), runs_);
  sum_all({.judged = true}, {.mean = true});
  meet(false);
  judge_->judge();
  last_pass(step, meet);
  return {};
}

// What follows from the norm of the whole gradient for every run.
template <class T>
void Stepper<T>::clip(double norm, const Engine::Step& step) {
  const double clip = clip_for(norm, step.max_norm);
  for (Run<T>& run : runs_) {
    run.clip = T(clip);
    clip_rates(run.clipped, clip, run.own_rate, run.shared_rate);
  }
}

template <class T>
bool Stepper<T>::any(bool (*is)(const Run<T>&)) const {
  return std::any_of(runs_.begin(), runs_.end(), is);
}

// How this step's passes come by the gradient.
template <class T>
Gradient Stepper<T>::gradient(const Engine::Step& step) const {
  return {.needed = true,
          .spread = any([](const Run<T>& run) { return run.kernel->extra == Extra::spread; }),
          .clip = step.max_norm > 0 || judges(step),  // whether a judge clips it says later
          .judged = judges(step)};
}

// Every layer's sums, and what follows from them for its run. A rule that lags takes a layer's last ones if
// there are any; nothing is measured if that is so everywhere.
template <class T>
void Stepper<T>::measure_layers(const Engine::Step& step, const LayerMarks& marks, int measure, double norm,
                                const Meet& meet) {
  const auto remembered = [this](const Run<T>& run) { return remembers(run); };
  if (measure == 0 && std::all_of(runs_.begin(), runs_.end(), remembered)) {
    settle(measure, measured_along_);
    return;
  }
  const bool workers =
      measure == 0 && any([](const Run<T>& run) { return run.kernel->own_decay != nullptr; });
  const Sums wanted{.measure = measure, .own_squares = workers};
  sum_all(gradient(step), wanted);
  meet(any([](const Run<T>& run) { return run.kernel->measures_touch_state; }));
  if (any([](const Run<T>& run) { return run.kernel->project != nullptr; })) return project();
  LayerSums sums = layer_sums();
  if (workers) add_mean_norms_of_workers(sums);
  if (measure == 0) recall(sums);
  if (any([](const Run<T>& run) { return run.kernel->revises; })) {
    revised_ = step.revise_rule(step.hyper, sums_of_groups(sums));
    Engine::Step settled = step;
    settled.hyper = revised_;
    runs_ = maker_.for_step(settled, marks.present, marks.ages);
    if (step.max_norm > 0) clip(norm, step);
  }
  settle(measure, sums);
}

template <class T>
void Stepper<T>::settle(int measure, const LayerSums& sums) {
  for (Run<T>& run : runs_)
    if (measure < run.kernel->measures)
      run.kernel->settle(run.scalars, measure, sums[run.layer].data(), plan_.layers[run.layer].count);
}

// Every filter's sums, and what follows from them for its layer.
template <class T>
void Stepper<T>::project() {
  projections_.clear();
  for (int q = 0; q < kMaxSums; ++q)
    for_each_cell(kStatistics + q, [&](std::size_t layer, std::int64_t begin, double number) {
      projections_.add(layer, begin, q, number);
    });
  for (Run<T>& run : runs_) projections_.settle(run);
}

template <class T>
void Stepper<T>::last_pass(const Engine::Step& step, const Meet& meet) {
  const bool along = step.observe == Observe::along;
  const bool lags = any([](const Run<T>& run) { return run.kernel->lags; });
  Gradient how = gradient(step);
  how.needed = along || lags || any([](const Run<T>& run) {
                 return run.kernel->needs_gradient || run.extrapolation->by_mean();
               });
  how.spread &= how.needed;
  how.projection = any([](const Run<T>& run) { return run.kernel->extra == Extra::projection; });
  const Sums sums{.mean = along, .workers = along, .measure = lags ? 0 : -1};
  if (sums.any()) set_ = (set_ + 1) % kSumSets;
  if (rails_) return last_pass_over_rails(step, how, sums, meet);
  if (!any([](const Run<T>& run) { return run.extrapolation->per_filter; })) {
    walk_own(step_pass(how, sums, {.streaming = streaming_, .factor = maker_.scaled()}), sums);
    return;
  }
  walk_own(apply_pass(how, sums), sums);
  meet(true);
  filters_.forget();
  walk_own(publication_pass(streaming_), {});
}

// After the last pass, so that its sums are all ranks' and no rank can be in the next step's passes.
template <class T>
void Stepper<T>::read_sums(const Engine::Step& step, const LayerMarks& marks, Engine::Outcome& outcome) {
  if (outcome.skipped) return;
  if (step.observe == Observe::along) outcome.statistics = statistics();
  if (!any([](const Run<T>& run) { return run.kernel->lags; })) return;
  const LayerSums sums = layer_sums();
  measured_along_.resize(sums.size());
  known_.resize(sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    known_[i] |= marks.present[i];
    if (marks.present[i]) measured_along_[i] = sums[i];
  }
}

// Whether a run's layer was measured along in an earlier step.
template <class T>
bool Stepper<T>::remembers(const Run<T>& run) const {
  return run.kernel->lags && !known_.empty() && known_[run.layer];
}

template <class T>
void Stepper<T>::recall(LayerSums& sums) const {
  for (const Run<T>& run : runs_)
    if (remembers(run)) sums[run.layer] = measured_along_[run.layer];
}

template <class T>
void Stepper<T>::run_unfused(const Engine::Step& step, const LayerMarks& marks) {
  runs_ = maker_.for_step(step, marks.present, marks.ages);
  const std::int64_t begin = arenas_.own_shards().front().begin, end = arenas_.own_shards().back().end;
  waiting_.resize(static_cast<std::size_t>(end - begin));
  for (const Pass& pass : unfused_passes())
    for (const Shard<T>& shard : arenas_.own_shards())
      walker_.walk(pass, arenas_.workers(), runs_, shard, {.mean = waiting_.data() + (shard.begin - begin)});
}

// The master weights are read as a sum over one source.
template <class T>
void Stepper<T>::load(const Workers& root, std::span<const Run<T>> runs) {
  for (const int k : arenas_.carried()) {
    const Shard<T>& shard = arenas_.shards()[static_cast<std::size_t>(k)];
    mover_.walk(load_pass(), root, runs, shard, {.mean = shard.w});
  }
}

template <class T>
void Stepper<T>::publish(std::span<const Run<T>> runs) {
  for (const int k : arenas_.carried())
    mover_.walk(publish_pass(), arenas_.workers(), runs, arenas_.shards()[static_cast<std::size_t>(k)]);
}

template <class T>
void Stepper<T>::publish_to(std::byte* x, std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.shards()) mover_.walk(publish_pass(), {{}, {x}, {x}}, runs, shard);
}

template class Stepper<float>;
template class Stepper<double>;

}  // namespace xc
