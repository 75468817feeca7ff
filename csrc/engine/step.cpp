#include "engine/step.hpp"

#include <algorithm>
#include <cmath>

namespace xc {
namespace {

constexpr const char* kWholeStep[] = {"max_grad_norm (0: none)", "skip_nonfinite",
                                      "the divisor of the gradients (micro-batches x loss scale)"};
constexpr std::size_t kWholeStepCount = std::size(kWholeStep);

// As torch.nn.utils.clip_grad_norm_, the tiny number included; a norm that is NaN stays so. An infinite bound
// only measures.
double clip_for(double norm, double max_norm) {
  if (std::isinf(max_norm)) return 1.0;
  const double clip = max_norm > 0 ? max_norm / (norm + 1e-6) : 1.0;
  return clip > 1.0 ? 1.0 : clip;
}

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
  numbers.insert(numbers.end(), {step.max_norm, double(step.skip_nonfinite), step.divisor});
  return numbers;
}

Engine::Step step_of(std::span<const double> numbers) {
  const auto whole = numbers.last(kWholeStepCount);
  Engine::Step step;
  step.hyper = numbers.first(numbers.size() - kWholeStepCount);
  step.max_norm = whole[0];
  step.skip_nonfinite = whole[1] != 0;
  step.divisor = whole[2];
  return step;
}

template <class T>
Stepper<T>::Stepper(const Plan& plan, const Arenas<T>& arenas, std::int64_t tile, bool streaming)
    : plan_(plan),
      arenas_(arenas),
      streaming_(streaming),
      buffers_(tile, static_cast<int>(arenas.shards().size())) {}

template <class T>
Engine::Outcome Stepper<T>::run(std::vector<Run<T>>& runs, const Engine::Step& step, int measures,
                                const Meet& meet) {
  set_ = 0;
  Engine::Outcome outcome;
  if (step.measures()) outcome = clip(runs, step, meet);
  if (outcome.skipped) return outcome;
  for (int measure = 0; measure < measures; ++measure) measure_layers(runs, measure, meet);
  const bool gradient = std::any_of(
      runs.begin(), runs.end(), [](const Run<T>& run) { return run.kernel->needs_gradient || run.by_mean; });
  if (!gradient)
    walk_all(without_gradient_pass<T>(streaming_), runs);
  else
    walk_all(step.measures() ? clipped_pass<T>(streaming_) : step_pass<T>(streaming_), runs);
  return outcome;
}

// The norm of the whole gradient, and what follows from it for every run.
template <class T>
Engine::Outcome Stepper<T>::clip(std::vector<Run<T>>& runs, const Engine::Step& step, const Meet& meet) {
  measure(measure_pass<T>(), runs, 1);
  meet(false);
  Engine::Outcome outcome{norm(), false};
  outcome.skipped = step.skip_nonfinite && !std::isfinite(outcome.norm);
  const double clip = clip_for(outcome.norm, step.max_norm);
  for (Run<T>& run : runs) {
    run.clip = T(clip);
    if (run.by_own) run.inner = T(static_cast<double>(run.inner) * clip);
  }
  return outcome;
}

// Every layer's norms, and what follows from them for its run.
template <class T>
void Stepper<T>::measure_layers(std::vector<Run<T>>& runs, int measure, const Meet& meet) {
  this->measure(layer_measure_pass<T>(measure), runs, kMaxSums);
  meet(std::any_of(runs.begin(), runs.end(),
                   [](const Run<T>& run) { return run.kernel->measures_touch_state; }));
  const auto sums = layer_sums();
  for (Run<T>& run : runs) run.kernel->settle(run.scalars, measure, sums[run.layer].data());
}

// Walks a pass that sums squares of so many quantities.
template <class T>
void Stepper<T>::measure(const Pass<T>& pass, std::span<const Run<T>> runs, int quantities) {
  set_ = (set_ + 1) % kSumSets;
  std::size_t k = arenas_.first_worker();
  for (const Shard<T>& shard : arenas_.own_shards()) {
    std::vector<SquareSums> squares;
    for (int q = 0; q < quantities; ++q)
      squares.emplace_back(plan_, plan_.segments[k], arenas_.squares(k, q, set_).data());
    walk<T>(pass, arenas_.workers(), runs, shard, buffers_, {.squares = squares.data()});
    for (SquareSums& sums : squares) sums.finish();
    ++k;
  }
}

template <class T>
void Stepper<T>::walk_all(const Pass<T>& pass, std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.own_shards()) walk<T>(pass, arenas_.workers(), runs, shard, buffers_);
}

template <class T>
double Stepper<T>::norm() const {
  double total = 0;
  for (std::size_t k = 0; k < arenas_.shards().size(); ++k)
    for (const double square : arenas_.squares(k, 0, set_)) total += square;
  return std::sqrt(total);
}

// The sums of squares of every layer, its cells added in flat order.
template <class T>
std::vector<std::array<double, kMaxSums>> Stepper<T>::layer_sums() const {
  std::vector<std::array<double, kMaxSums>> sums(plan_.layers.size());
  std::size_t layer = 0;
  for (std::size_t k = 0; k < arenas_.shards().size(); ++k) {
    const auto cells = cells_of(plan_, plan_.segments[k]);
    for (std::size_t c = 0; c + 1 < cells.size(); ++c) {
      while (cells[c] >= plan_.layers[layer].end) ++layer;
      for (int q = 0; q < kMaxSums; ++q)
        sums[layer][static_cast<std::size_t>(q)] += arenas_.squares(k, q, set_)[c];
    }
  }
  return sums;
}

template <class T>
void Stepper<T>::run_unfused(std::span<const Run<T>> runs) {
  const std::int64_t begin = arenas_.own_shards().front().begin, end = arenas_.own_shards().back().end;
  waiting_.resize(static_cast<std::size_t>(end - begin));
  for (const Pass<T>& pass : unfused_passes<T>())
    for (const Shard<T>& shard : arenas_.own_shards())
      walk<T>(pass, arenas_.workers(), runs, shard, buffers_,
              {.mean = waiting_.data() + (shard.begin - begin)});
}

// The master weights are read as a sum over one source.
template <class T>
void Stepper<T>::load(const Workers& root, std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.own_shards())
    walk<T>(load_pass<T>(), root, runs, shard, buffers_, {.mean = shard.w});
}

template <class T>
void Stepper<T>::publish(std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.own_shards())
    walk<T>(publish_pass<T>(), arenas_.workers(), runs, shard, buffers_);
}

template <class T>
void Stepper<T>::publish_to(std::byte* x, std::span<const Run<T>> runs) {
  for (const Shard<T>& shard : arenas_.shards())
    walk<T>(publish_pass<T>(), {{}, {x}, {x}}, runs, shard, buffers_);
}

template class Stepper<float>;
template class Stepper<double>;

}  // namespace xc
