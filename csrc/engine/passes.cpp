#include "engine/passes.hpp"

#include <algorithm>
#include <chrono>

#include "core/streaming.hpp"
#include "engine/filters.hpp"

namespace xc {
namespace {

template <class T>
void reduce_stage(const Workers& workers, const Tile<T>& tile) {
  tile.run->reduce(workers.sources.data(), static_cast<int>(workers.sources.size()), tile.first_byte,
                   tile.count, tile.run->scale, tile.mean, tile.scratch);
}

template <class T>
void partial_stage(const Workers& workers, const Tile<T>& tile) {
  tile.run->reduce(workers.sources.data(), static_cast<int>(workers.sources.size()), tile.first_byte,
                   tile.count, T(1), tile.mean, tile.scratch);
}

template <class T>
void take_stage(const Workers&, const Tile<T>& tile) {
  for (std::int64_t i = 0; i < tile.count; ++i) tile.mean[i] = tile.received[i] * tile.run->scale;
}

template <class T>
void spread_stage(const Workers& workers, const Tile<T>& tile) {
  tile.run->spread(workers.sources.data(), static_cast<int>(workers.sources.size()), tile.first_byte,
                   tile.count, tile.run->own, tile.mean, tile.extra);
}

template <class T>
void clip_stage(const Workers&, const Tile<T>& tile) {
  for (std::int64_t i = 0; i < tile.count; ++i) tile.mean[i] *= tile.run->clip;
}

// What a pass that only sums will read of the next tile, seen from `offset` elements into this one:
// gradients, and so many of the master arrays, w first.
template <class T>
Upcoming upcoming(const Workers& workers, const Tile<T>& tile, int masters, std::int64_t offset) {
  Upcoming next;
  const auto add = [&](const void* at, std::int64_t size) {
    if (at == nullptr || next.count == Upcoming::kMost) return;
    next.at[next.count] = static_cast<const std::byte*>(at) + (tile.count + offset) * size;
    next.element_size[next.count++] = size;
  };
  for (const std::byte* source : workers.sources) add(source + tile.first_byte, tile.run->element_size);
  if (masters > 0) add(tile.w, sizeof(T));
  for (int s = 0; s < masters - 1; ++s) add(tile.slots[s], sizeof(T));
  return next;
}

// Rules that measure several terms look at w, and at their slots if they bring them up to date.
template <class T>
int masters_measured(const RuleKernel<T>& kernel, int measure) {
  if (kernel.sums[measure] < 2) return 0;
  return kernel.measures_touch_state ? 1 + kernel.slots : 1;
}

template <class T>
void mean_squares_stage(const Workers& workers, const Tile<T>& tile) {
  tile.kept->mean_squares->add(
      tile.first, tile.count,
      [&](std::int64_t offset, std::int64_t first, std::int64_t count, double* lanes) {
        add_squares(tile.mean + offset, first, count, lanes, upcoming(workers, tile, 0, offset));
      });
}

// Of every worker's gradient, into lanes of its own.
template <class T>
void add_own_squares(const Workers& workers, const Tile<T>& tile, std::int64_t elements, CellSums& sums,
                     T own, T decay) {
  sums.add(tile.first, elements,
           [&](std::int64_t offset, std::int64_t first, std::int64_t count, double* lanes) {
             const std::int64_t byte = tile.first_byte + offset * tile.run->element_size;
             double* to = lanes;
             for (const std::byte* source : workers.sources) {
               tile.run->own_squares(source + byte, own, decay, tile.w + offset, first, count, to);
               to += kLanes;
             }
           });
}

template <class T>
void worker_squares_stage(const Workers& workers, const Tile<T>& tile) {
  add_own_squares(workers, tile, tile.count, *tile.kept->worker_squares, tile.run->own, T(0));
}

// Of a run that is one layer: padding may hold anything that was published into it.
template <class T>
std::int64_t without_padding(const Tile<T>& tile) {
  return std::min(tile.count, tile.run->filters_end - tile.first);
}

template <class T>
void own_squares_stage(const Workers& workers, const Tile<T>& tile) {
  add_own_squares(workers, tile, without_padding(tile), *tile.kept->own_squares,
                  tile.run->own * tile.run->clip, tile.run->decay);
}

// Padding has no terms: with an epsilon of zero a rule may find 0 / 0 there.
template <class T, int kMeasure>
void measure_stage(const Workers& workers, const Tile<T>& tile) {
  const RuleKernel<T>& kernel = *tile.run->kernel;
  if (kernel.measures <= kMeasure) return;
  tile.kept->measured->add(
      tile.first, without_padding(tile),
      [&](std::int64_t offset, std::int64_t first, std::int64_t count, double* lanes) {
        T* slots[kMaxSlots];
        for (int s = 0; s < kMaxSlots; ++s) slots[s] = tile.slots[s] ? tile.slots[s] + offset : nullptr;
        const Elements<T> at{tile.mean + offset, tile.extra + offset, tile.w + offset, slots};
        kernel.measure[kMeasure](tile.run->scalars, at, first, count, lanes,
                                 upcoming(workers, tile, masters_measured(kernel, kMeasure), offset));
      });
}

// Gives every element the coefficient of its filter, and padding none.
template <class T>
void projection_stage(const Workers&, const Tile<T>& tile) {
  const Run<T>& run = *tile.run;
  const std::int64_t end = tile.first + tile.count;
  std::int64_t at = tile.first;
  while (run.coefficients && at < std::min(end, run.filters_end)) {
    const std::int64_t filter = (at - run.begin) / run.filter_length;
    const std::int64_t last = std::min(end, run.begin + (filter + 1) * run.filter_length);
    std::fill(tile.extra + (at - tile.first), tile.extra + (last - tile.first), T(run.coefficients[filter]));
    at = last;
  }
  std::fill(tile.extra + (at - tile.first), tile.extra + tile.count, T(0));
}

template <class T>
void apply_stage(const Workers&, const Tile<T>& tile) {
  tile.run->kernel->apply(tile.run->scalars, tile.elements(), tile.count);
}

template <class T>
void factor_stage(const Workers&, const Tile<T>& tile) {
  const RuleKernel<T>& kernel = *tile.run->kernel;
  if (kernel.factor) kernel.factor(tile.run->scalars, tile.elements(), tile.factor, tile.count);
}

// What a worker is displaced along beside its own gradient.
template <class T>
const T* shared_direction(const Workers& workers, const Tile<T>& tile, std::size_t worker) {
  const Extrapolation& extrapolation = *tile.run->extrapolation;
  if (!extrapolation.random) return tile.mean;
  NoiseKey key = tile.run->noise;
  key.worker = workers.numbers.empty() ? static_cast<std::uint32_t>(worker) : workers.numbers[worker];
  make_noise(*extrapolation.random, key, tile.first, tile.count, tile.noise);
  if (extrapolation.per_filter) tile.kept->filters->scale(*tile.run, key, tile.first, tile.count, tile.noise);
  return tile.noise;
}

template <class T>
Displacement<T> displacement_of(const Workers& workers, const Tile<T>& tile, std::size_t worker) {
  return {workers.own[worker] + tile.first_byte, shared_direction(workers, tile, worker), tile.factor,
          tile.run->own_rate, tile.run->shared_rate};
}

template <class T>
void publish_stage(const Workers& workers, const Tile<T>& tile) {
  for (std::size_t k = 0; k < workers.targets.size(); ++k)
    tile.run->publish(tile.w, displacement_of(workers, tile, k), workers.targets[k] + tile.first_byte,
                      tile.count);
}

// Of what the next tile reads (every gradient, then the master weights and the slots) number `read`, as
// `ahead`'s i-th.
template <class T>
void look_ahead(const Workers& workers, const Tile<T>& tile, std::int64_t read, int i, Ahead& ahead) {
  const auto gradients = static_cast<std::int64_t>(workers.sources.size());
  if (read < gradients) {
    const std::int64_t size = tile.run->element_size;
    ahead.at[i] = workers.sources[static_cast<std::size_t>(read)] + tile.first_byte + tile.count * size;
    ahead.block_bytes[i] = kStreamBlock * size;
  } else {
    const T* const master = read == gradients ? tile.w : tile.slots[read - gradients - 1];
    ahead.at[i] = reinterpret_cast<const std::byte*>(master + tile.count);
    ahead.block_bytes[i] = kStreamBlock * static_cast<std::int64_t>(sizeof(T));
  }
}

// While one worker's weights are stored, a share of what the next tile reads is fetched, in the order it is
// needed. With lanes for them, squares are added up meanwhile: the mean gradient's, and each worker's.
template <class T>
void stream_and_observe(const Workers& workers, const Tile<T>& tile, double* mean_lanes, double* own_lanes) {
  const std::int64_t masters =
      1 + std::count_if(tile.slots, tile.slots + kMaxSlots, [](const T* slot) { return slot != nullptr; });
  const std::int64_t reads = static_cast<std::int64_t>(workers.sources.size()) + masters;
  const auto targets = static_cast<std::int64_t>(workers.targets.size());
  for (std::int64_t k = 0; k < targets; ++k) {
    Ahead ahead;
    ahead.store = tile.store;
    std::int64_t read = k * reads / targets;
    for (int i = 0; i < 2 && read < (k + 1) * reads / targets; ++i, ++read)
      look_ahead(workers, tile, read, i, ahead);
    const auto worker = static_cast<std::size_t>(k);
    Observed<T> observed{.mean = tile.mean, .own = tile.run->own, .first = tile.first};
    if (own_lanes) observed.own_lanes = own_lanes + k * kLanes;
    if (k == 0) observed.mean_lanes = mean_lanes;
    tile.run->stream(tile.w, displacement_of(workers, tile, worker),
                     workers.targets[worker] + tile.first_byte, tile.count, ahead, observed);
  }
}

template <class T>
void stream_stage(const Workers& workers, const Tile<T>& tile) {
  stream_and_observe<T>(workers, tile, nullptr, nullptr);
}

// A tile that cells cut is observed piece by piece.
template <class T>
void observing_stream_stage(const Workers& workers, const Tile<T>& tile) {
  double* const mean = tile.kept->mean_squares->lanes_within(tile.first, tile.count);
  double* const own = tile.kept->worker_squares->lanes_within(tile.first, tile.count);
  if (!mean) mean_squares_stage<T>(workers, tile);
  if (!own) worker_squares_stage<T>(workers, tile);
  stream_and_observe<T>(workers, tile, mean, own);
}

template <class T>
void displace_stage(const Workers& workers, const Tile<T>& tile) {
  for (std::size_t k = 0; k < workers.targets.size(); ++k)
    tile.run->displace(displacement_of(workers, tile, k), workers.targets[k] + tile.first_byte, tile.count);
}

template <class T>
Tile<T> make_tile(const Run<T>& run, const Shard<T>& shard, std::int64_t first, std::int64_t count,
                  TileBuffers<T>& buffers, const Kept<T>& kept) {
  const std::int64_t place = first - shard.begin;
  Tile<T> tile;
  tile.run = &run;
  tile.first = first;
  tile.first_byte = run.byte_begin + (first - run.begin) * run.element_size;
  tile.count = count;
  tile.mean = kept.mean ? kept.mean + place : buffers.mean();
  tile.extra = buffers.extra();
  tile.factor = kept.factor ? kept.factor + place : buffers.factor();
  tile.received = kept.received ? kept.received + place : nullptr;
  tile.noise = buffers.noise();
  tile.store = buffers.store();
  tile.kept = &kept;
  tile.scratch = buffers.scratch();
  tile.w = shard.w ? shard.w + place : tile.mean;
  for (int s = 0; s < kMaxSlots; ++s) tile.slots[s] = shard.slots[s] ? shard.slots[s] + place : nullptr;
  return tile;
}

// A tile that is shorter than the grid of cells does not reach over its lines.
std::int64_t within_cell(std::int64_t first, std::int64_t tile) {
  return tile < kNormGrid ? std::min(tile, kNormGrid - first % kNormGrid) : tile;
}

template <class T>
using Stage = void (*)(const Workers& workers, const Tile<T>& tile);

template <class T>
void add_gradient(std::vector<Stage<T>>& stages, const Pass& pass, bool observing) {
  if (pass.source == Pass::Source::gradients) stages.push_back(&reduce_stage<T>);
  if (pass.source == Pass::Source::received) stages.push_back(&take_stage<T>);
  if (pass.source == Pass::Source::partial) stages.push_back(&partial_stage<T>);
  if (pass.spread) stages.push_back(&spread_stage<T>);
  if (pass.sums.mean && !observing) stages.push_back(&mean_squares_stage<T>);
  if (pass.sums.workers && !observing) stages.push_back(&worker_squares_stage<T>);
  if (pass.clip) stages.push_back(&clip_stage<T>);
}

template <class T>
void add_measures(std::vector<Stage<T>>& stages, Sums sums) {
  static_assert(kMaxMeasures == 2);
  if (sums.measure == 0) stages.push_back(&measure_stage<T, 0>);
  if (sums.measure == 1) stages.push_back(&measure_stage<T, 1>);
  if (sums.own_squares) stages.push_back(&own_squares_stage<T>);
}

template <class T>
Stage<T> publication_stage(Pass::Weights weights, bool observing) {
  if (weights == Pass::Weights::store) return &publish_stage<T>;
  return observing ? &observing_stream_stage<T> : &stream_stage<T>;
}

// Squares of gradients that nothing clips are added up while the weights stream.
template <class T>
std::vector<Stage<T>> stages_of(const Pass& pass) {
  const bool observing = pass.sums.workers && pass.weights == Pass::Weights::stream && !pass.clip;
  std::vector<Stage<T>> stages;
  add_gradient<T>(stages, pass, observing);
  add_measures<T>(stages, pass.sums);
  if (pass.projection) stages.push_back(&projection_stage<T>);
  if (pass.apply) stages.push_back(&apply_stage<T>);
  if (pass.factor) stages.push_back(&factor_stage<T>);
  if (pass.weights != Pass::Weights::keep) stages.push_back(publication_stage<T>(pass.weights, observing));
  if (pass.displace) stages.push_back(&displace_stage<T>);
  return stages;
}

Pass::Weights published(bool streaming) { return streaming ? Pass::Weights::stream : Pass::Weights::store; }

}  // namespace

Pass summing_pass(Gradient gradient, Sums sums) {
  Pass pass{.spread = gradient.spread,
            .clip = gradient.needed && gradient.clip,
            .sums = sums,
            .judged = gradient.judged};
  if (gradient.needed) pass.source = gradient.received ? Pass::Source::received : Pass::Source::gradients;
  return pass;
}

Pass apply_pass(Gradient gradient, Sums sums, bool factor) {
  Pass pass = summing_pass(gradient, sums);
  pass.projection = gradient.projection;
  pass.apply = true;
  pass.factor = factor;
  return pass;
}

Pass step_pass(Gradient gradient, Sums sums, Publication publication) {
  Pass pass = apply_pass(gradient, sums, publication.factor);
  pass.weights = published(publication.streaming);
  return pass;
}

Pass publication_pass(bool streaming) { return {.weights = published(streaming)}; }

Pass partial_pass() { return {.source = Pass::Source::partial}; }

std::vector<Pass> unfused_passes() {
  return {load_pass(), {.apply = true}, publish_pass(), {.displace = true}};
}

Pass load_pass() { return {.source = Pass::Source::gradients}; }

Pass sum_pass(bool streaming) { return {.source = Pass::Source::gradients, .weights = published(streaming)}; }

Pass publish_pass() { return {.weights = Pass::Weights::store}; }

namespace {

// Elements that are observed together, in the nearest cache, while those that follow are fetched.
constexpr std::int64_t kObserved = 512;

// True if the pass is asked for new weights and at most for squares of gradients that nothing clips, by
// workers whose gradients are all at hand.
template <class T>
bool is_plain_step(const Pass& pass, const Workers& workers, const Kept<T>& kept) {
  const bool alone = !pass.spread && !pass.projection && !pass.displace && pass.sums.measure < 0 &&
                     !pass.sums.own_squares && pass.sums.mean == pass.sums.workers &&
                     !(pass.sums.mean && pass.clip);
  const bool local = pass.source == Pass::Source::gradients || pass.source == Pass::Source::none;
  return alone && local && pass.apply && pass.weights != Pass::Weights::keep && !kept.mean && !kept.factor &&
         workers.sources == workers.own && workers.targets.size() == workers.sources.size();
}

template <class T>
bool has_own_loop(const Pass& pass, const Run<T>& run) {
  return run.fused && (run.observe || !pass.sums.any());
}

template <class T>
void step_fused(const Pass& pass, const Workers& workers, const Run<T>& run, const Shard<T>& shard,
                StoreWidth store, std::int64_t first, std::int64_t count) {
  const std::int64_t place = first - shard.begin;
  T* slots[kMaxSlots];
  for (int s = 0; s < kMaxSlots; ++s) slots[s] = shard.slots[s] ? shard.slots[s] + place : nullptr;
  run.fused({.sources = workers.sources.data(),
             .targets = workers.targets.data(),
             .first_byte = run.byte_begin + (first - run.begin) * run.element_size,
             .count = count,
             .w = shard.w + place,
             .slots = slots,
             .scalars = run.scalars,
             .scale = run.scale,
             .clip = pass.clip ? run.clip : T(1),
             .own_rate = run.own_rate,
             .store = pass.weights == Pass::Weights::stream ? store : StoreWidth::none});
}

template <class T>
void step_and_observe(const Pass& pass, const Workers& workers, const Run<T>& run, const Shard<T>& shard,
                      StoreWidth store, const Kept<T>& kept, std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t most = std::min(end - first, kObserved - first % kObserved);
    kept.mean_squares->add(
        first, most, [&](std::int64_t, std::int64_t at, std::int64_t count, double* mean_lanes) {
          step_fused(pass, workers, run, shard, store, at, count);
          run.observe(workers.sources.data(), run.byte_begin + (at - run.begin) * run.element_size, at, count,
                      run.scale, run.own, mean_lanes, kept.worker_squares->lanes_within(at, count));
        });
    first += most;
  }
}

template <class T>
void walk_fused(const Pass& pass, const Workers& workers, const Run<T>& run, const Shard<T>& shard,
                StoreWidth store, const Kept<T>& kept) {
  const std::int64_t first = std::max(run.begin, shard.begin), end = std::min(run.end, shard.end);
  if (first >= end) return;
  if (pass.sums.mean)
    step_and_observe(pass, workers, run, shard, store, kept, first, end);
  else
    step_fused(pass, workers, run, shard, store, first, end - first);
}

}  // namespace

template <class T>
void walk(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
          TileBuffers<T>& buffers, const Kept<T>& kept) {
  const std::vector<Stage<T>> stages = stages_of<T>(pass);
  const bool plain = is_plain_step(pass, workers, kept);
  for (const Run<T>& run : runs) {
    if (plain && has_own_loop(pass, run)) {
      walk_fused(pass, workers, run, shard, buffers.store(), kept);
      continue;
    }
    const std::int64_t end = std::min(run.end, shard.end);
    for (std::int64_t first = std::max(run.begin, shard.begin); first < end;) {
      const std::int64_t count = std::min(within_cell(first, buffers.tile()), end - first);
      const Tile<T> tile = make_tile(run, shard, first, count, buffers, kept);
      for (const Stage<T> stage : stages) stage(workers, tile);
      first += count;
    }
  }
  if (pass.weights == Pass::Weights::stream) finish_streaming();
}

namespace {

template <class T>
std::int64_t elements_of(std::span<const Run<T>> runs, const Shard<T>& shard) {
  std::int64_t count = 0;
  for (const Run<T>& run : runs)
    count += std::max(std::int64_t{0}, std::min(run.end, shard.end) - std::max(run.begin, shard.begin));
  return count;
}

template <class T>
bool has_tiles(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs, const Kept<T>& kept) {
  const auto has = [&](const Run<T>& run) { return has_own_loop(pass, run); };
  return !is_plain_step(pass, workers, kept) || !std::all_of(runs.begin(), runs.end(), has);
}

// The trial that a walk is timed for; null: none.
template <class T>
Trial* trial_of(Ways& ways, const Pass& pass, const Workers& workers, std::span<const Run<T>> runs,
                const Kept<T>& kept) {
  if (ways.stores.goes_on()) return &ways.stores;
  return ways.lengths.goes_on() && has_tiles(pass, workers, runs, kept) ? &ways.lengths : nullptr;
}

}  // namespace

template <class T>
void TileWalker<T>::walk(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs,
                         const Shard<T>& shard, const Kept<T>& kept) {
  if (ways_) buffers_.use(ways_->tile());
  if (!ways_ || !pass.apply || pass.weights == Pass::Weights::keep)
    return xc::walk<T>(pass, workers, runs, shard, buffers_, kept);
  Pass chosen = pass;
  chosen.weights = published(ways_->streaming());
  Trial* const trial = trial_of(*ways_, chosen, workers, runs, kept);
  if (!trial) return xc::walk<T>(chosen, workers, runs, shard, buffers_, kept);
  const auto begin = std::chrono::steady_clock::now();
  xc::walk<T>(chosen, workers, runs, shard, buffers_, kept);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  trial->took(taken.count(), elements_of(runs, shard));
}

#define XC_INSTANTIATE(T)                                                                      \
  template void walk<T>(const Pass&, const Workers&, std::span<const Run<T>>, const Shard<T>&, \
                        TileBuffers<T>&, const Kept<T>&);                                      \
  template class TileWalker<T>;
XC_INSTANTIATE(float)
XC_INSTANTIATE(double)
#undef XC_INSTANTIATE

}  // namespace xc
