#include "engine/passes.hpp"

#include <algorithm>

#include "core/streaming.hpp"

namespace xc {
namespace {

template <class T>
void reduce_stage(const Workers& workers, const Tile<T>& tile) {
  tile.run->reduce(workers.sources.data(), static_cast<int>(workers.sources.size()), tile.first_byte,
                   tile.count, tile.run->scale, tile.mean, tile.scratch);
}

template <class T>
void measure_stage(const Workers&, const Tile<T>& tile) {
  tile.squares->add(tile.mean, tile.first, tile.count);
}

template <class T>
void clip_stage(const Workers&, const Tile<T>& tile) {
  for (std::int64_t i = 0; i < tile.count; ++i) tile.mean[i] *= tile.run->clip;
}

template <class T, int kMeasure>
void layer_measure_stage(const Workers&, const Tile<T>& tile) {
  const RuleKernel<T>& kernel = *tile.run->kernel;
  kernel.measure[kMeasure](tile.run->scalars, tile.mean, tile.w, tile.slots, tile.quantities, tile.count);
  for (int q = 0; q < kernel.sums[kMeasure]; ++q)
    tile.squares[q].add(tile.quantities[q], tile.first, tile.count);
}

template <class T>
void apply_stage(const Workers&, const Tile<T>& tile) {
  tile.run->apply(tile.run->scalars, tile.mean, tile.w, tile.slots, tile.count);
}

template <class T>
void publish_stage(const Workers& workers, const Tile<T>& tile) {
  for (std::size_t k = 0; k < workers.targets.size(); ++k)
    tile.run->publish(tile.w, tile.run->inner, workers.own[k] + tile.first_byte, tile.mean,
                      workers.targets[k] + tile.first_byte, tile.count);
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
// needed.
template <class T>
void stream_stage(const Workers& workers, const Tile<T>& tile) {
  const std::int64_t masters = 1 + (tile.slots[0] != nullptr) + (tile.slots[1] != nullptr);
  const std::int64_t reads = static_cast<std::int64_t>(workers.sources.size()) + masters;
  const auto targets = static_cast<std::int64_t>(workers.targets.size());
  for (std::int64_t k = 0; k < targets; ++k) {
    Ahead ahead;
    std::int64_t read = k * reads / targets;
    for (int i = 0; i < 2 && read < (k + 1) * reads / targets; ++i, ++read)
      look_ahead(workers, tile, read, i, ahead);
    const auto worker = static_cast<std::size_t>(k);
    tile.run->stream(tile.w, tile.run->inner, workers.own[worker] + tile.first_byte, tile.mean,
                     workers.targets[worker] + tile.first_byte, tile.count, ahead);
  }
  finish_streaming();
}

template <class T>
void displace_stage(const Workers& workers, const Tile<T>& tile) {
  for (std::size_t k = 0; k < workers.targets.size(); ++k)
    tile.run->displace(tile.run->inner, workers.own[k] + tile.first_byte, tile.mean,
                       workers.targets[k] + tile.first_byte, tile.count);
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
  tile.squares = kept.squares;
  for (int q = 0; q < kMaxSums; ++q) tile.quantities[q] = buffers.quantity(q);
  tile.scratch = buffers.scratch();
  tile.w = shard.w ? shard.w + place : tile.mean;
  for (int s = 0; s < kMaxSlots; ++s) tile.slots[s] = shard.slots[s] ? shard.slots[s] + place : nullptr;
  return tile;
}

}  // namespace

template <class T>
Pass<T> step_pass(bool streaming) {
  return {&reduce_stage<T>, &apply_stage<T>, streaming ? &stream_stage<T> : &publish_stage<T>};
}

template <class T>
Pass<T> measure_pass() {
  return {&reduce_stage<T>, &measure_stage<T>};
}

template <class T>
Pass<T> clipped_pass(bool streaming) {
  return {&reduce_stage<T>, &clip_stage<T>, &apply_stage<T>,
          streaming ? &stream_stage<T> : &publish_stage<T>};
}

template <class T>
Pass<T> layer_measure_pass(int measure) {
  static_assert(kMaxMeasures == 2);
  return {&reduce_stage<T>, &clip_stage<T>,
          measure == 0 ? &layer_measure_stage<T, 0> : &layer_measure_stage<T, 1>};
}

template <class T>
Pass<T> without_gradient_pass(bool streaming) {
  return {&apply_stage<T>, streaming ? &stream_stage<T> : &publish_stage<T>};
}

template <class T>
std::vector<Pass<T>> unfused_passes() {
  return {{&reduce_stage<T>}, {&apply_stage<T>}, {&publish_stage<T>}, {&displace_stage<T>}};
}

template <class T>
Pass<T> load_pass() {
  return {&reduce_stage<T>};
}

template <class T>
Pass<T> sum_pass(bool streaming) {
  return {&reduce_stage<T>, streaming ? &stream_stage<T> : &publish_stage<T>};
}

template <class T>
Pass<T> publish_pass() {
  return {&publish_stage<T>};
}

template <class T>
void walk(const Pass<T>& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
          TileBuffers<T>& buffers, const Kept<T>& kept) {
  for (const Run<T>& run : runs) {
    const std::int64_t end = std::min(run.end, shard.end);
    for (std::int64_t first = std::max(run.begin, shard.begin); first < end; first += buffers.tile()) {
      const std::int64_t count = std::min(buffers.tile(), end - first);
      const Tile<T> tile = make_tile(run, shard, first, count, buffers, kept);
      for (const Stage<T> stage : pass) stage(workers, tile);
    }
  }
}

#define XC_INSTANTIATE(T)                                                                         \
  template Pass<T> step_pass<T>(bool);                                                            \
  template Pass<T> measure_pass<T>();                                                             \
  template Pass<T> clipped_pass<T>(bool);                                                         \
  template Pass<T> layer_measure_pass<T>(int);                                                    \
  template Pass<T> without_gradient_pass<T>(bool);                                                \
  template std::vector<Pass<T>> unfused_passes<T>();                                              \
  template Pass<T> load_pass<T>();                                                                \
  template Pass<T> sum_pass<T>(bool);                                                             \
  template Pass<T> publish_pass<T>();                                                             \
  template void walk<T>(const Pass<T>&, const Workers&, std::span<const Run<T>>, const Shard<T>&, \
                        TileBuffers<T>&, const Kept<T>&);
XC_INSTANTIATE(float)
XC_INSTANTIATE(double)
#undef XC_INSTANTIATE

}  // namespace xc
