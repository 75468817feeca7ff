#include "engine/passes.hpp"

#include <algorithm>

namespace xc {
namespace {

template <class T>
void reduce_stage(const Workers& workers, const Tile<T>& tile) {
  tile.run->reduce(workers.sources.data(), static_cast<int>(workers.sources.size()), tile.first_byte, tile.count,
                   tile.run->scale, tile.mean, tile.scratch);
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

template <class T>
void displace_stage(const Workers& workers, const Tile<T>& tile) {
  for (std::size_t k = 0; k < workers.targets.size(); ++k)
    tile.run->displace(tile.run->inner, workers.own[k] + tile.first_byte, tile.mean,
                       workers.targets[k] + tile.first_byte, tile.count);
}

template <class T>
Tile<T> make_tile(const Run<T>& run, const Shard<T>& shard, std::int64_t first, std::int64_t count,
                  TileBuffers<T>& buffers, T* waiting) {
  const std::int64_t place = first - shard.begin;
  Tile<T> tile;
  tile.run = &run;
  tile.first_byte = run.byte_begin + (first - run.begin) * run.element_size;
  tile.count = count;
  tile.mean = waiting ? waiting + place : buffers.mean();
  tile.scratch = buffers.scratch();
  tile.w = shard.w ? shard.w + place : tile.mean;
  for (int s = 0; s < kMaxSlots; ++s) tile.slots[s] = shard.slots[s] ? shard.slots[s] + place : nullptr;
  return tile;
}

}  // namespace

template <class T>
std::vector<Pass<T>> step_passes(bool fused) {
  if (fused) return {{&reduce_stage<T>, &apply_stage<T>, &publish_stage<T>}};
  return {{&reduce_stage<T>}, {&apply_stage<T>}, {&publish_stage<T>}, {&displace_stage<T>}};
}

template <class T>
Pass<T> sum_pass() {
  return {&reduce_stage<T>, &publish_stage<T>};
}

template <class T>
Pass<T> publish_pass() {
  return {&publish_stage<T>};
}

template <class T>
void walk(const Pass<T>& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
          TileBuffers<T>& buffers, T* waiting) {
  for (const Run<T>& run : runs) {
    const std::int64_t end = std::min(run.end, shard.end);
    for (std::int64_t first = std::max(run.begin, shard.begin); first < end; first += buffers.tile()) {
      const std::int64_t count = std::min(buffers.tile(), end - first);
      const Tile<T> tile = make_tile(run, shard, first, count, buffers, waiting);
      for (const Stage<T> stage : pass) stage(workers, tile);
    }
  }
}

#define XC_INSTANTIATE(T)                                                                                 \
  template std::vector<Pass<T>> step_passes<T>(bool);                                                     \
  template Pass<T> sum_pass<T>();                                                                         \
  template Pass<T> publish_pass<T>();                                                                     \
  template void walk<T>(const Pass<T>&, const Workers&, std::span<const Run<T>>, const Shard<T>&,         \
                        TileBuffers<T>&, T*);
XC_INSTANTIATE(float)
XC_INSTANTIATE(double)
#undef XC_INSTANTIATE

}  // namespace xc
