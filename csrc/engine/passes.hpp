#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "comm/control.hpp"
#include "engine/norms.hpp"
#include "engine/plan.hpp"
#include "stages/tables.hpp"

namespace xc {

// A step is a list of STAGES grouped into PASSES. A pass walks the shard once, tile by tile, and every stage
// of the pass touches the tile while it is in cache. Only a scalar that must be known between two stages
// splits a pass: then a first pass measures, and the second reduces again. With K workers that is 3K + 4
// accesses per parameter instead of 2K + 4; to keep the reduced gradient in between would cost 2K + 7, or
// 3K + 7 with extrapolation by each worker's own gradient, which must be read again in any case.

// The workers' memory as a pass sees it: the arrays that are summed, the gradient that displaces each target,
// and the targets that are published to.
struct Workers {
  std::vector<const std::byte*> sources;
  std::vector<const std::byte*> own;
  std::vector<std::byte*> targets;
};

// Elements that are treated alike: one type, one group, one count of updates. Settled before the pass begins.
template <class T>
struct Run {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t byte_begin;  // of `begin` in a worker's memory
  std::int64_t element_size;
  T scale;
  T inner;
  T clip;
  bool by_own;                  // displaced by each worker's own gradient
  bool by_mean;                 // displaced by the mean gradient
  std::size_t layer;            // its first
  const RuleKernel<T>* kernel;  // null without a rule
  ReduceFn<T> reduce;
  ApplyFn<T> apply;
  PublishFn<T> publish;
  StreamFn<T> stream;
  DisplaceFn<T> displace;
  alignas(kMaxScalarBytes) std::byte scalars[kMaxScalarBytes];
};

// One worker's part of the master weights and the rule's state; the pointers are to its first element.
template <class T>
struct Shard {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  T* w = nullptr;
  T* slots[kMaxSlots] = {};
};

// What passes may leave behind.
template <class T>
struct Kept {
  T* mean = nullptr;              // the shard's reduced gradient, instead of in a buffer of the tile's size
  SquareSums* squares = nullptr;  // as many as the pass sums quantities
};

template <class T>
struct Tile {
  const Run<T>* run;
  std::int64_t first;
  std::int64_t first_byte;
  std::int64_t count;
  T* w;
  T* slots[kMaxSlots];
  T* mean;
  SquareSums* squares;
  T* quantities[kMaxSums];
  T* scratch;
};

template <class T>
using Stage = void (*)(const Workers& workers, const Tile<T>& tile);
template <class T>
using Pass = std::vector<Stage<T>>;

// A whole step. With `streaming` the weights are published past the cache.
template <class T>
Pass<T> step_pass(bool streaming);
// The two passes of a step in which the gradient's norm must be known first: reduce and sum the squares; then
// reduce, clip, apply, publish.
template <class T>
Pass<T> measure_pass();
template <class T>
Pass<T> clipped_pass(bool streaming);
// The passes of rules that measure layers: number `measure`, and the last, which leaves the gradient alone if
// neither the rule nor a displacement looks at it.
template <class T>
Pass<T> layer_measure_pass(int measure);
template <class T>
Pass<T> without_gradient_pass(bool streaming);
// Each stage in a pass of its own: what a program without the engine does and what benchmarks compare with.
template <class T>
std::vector<Pass<T>> unfused_passes();
template <class T>
Pass<T> load_pass();  // reduce
template <class T>
Pass<T> sum_pass(bool streaming);  // reduce, publish: collectives without a rule; w is the sum itself
template <class T>
Pass<T> publish_pass();  // publish what w holds

// Private memory of the walk over tiles.
template <class T>
class TileBuffers {
 public:
  TileBuffers(std::int64_t tile, int source_count)
      : tile_(tile), memory_(allocate(tile * (1 + kMaxSums + reduce_scratch_tiles(source_count)))) {}
  std::int64_t tile() const { return tile_; }
  T* mean() { return memory_.get(); }
  T* quantity(int q) { return memory_.get() + (1 + q) * tile_; }
  T* scratch() { return memory_.get() + (1 + kMaxSums) * tile_; }

 private:
  struct Free {
    void operator()(T* at) const { ::operator delete[](at, std::align_val_t(kLine)); }
  };
  static T* allocate(std::int64_t count) {
    return new (std::align_val_t(kLine)) T[static_cast<std::size_t>(count)]();
  }
  std::int64_t tile_;
  std::unique_ptr<T[], Free> memory_;
};

// Walks `shard` through one pass. A shard without w (collectives) uses the tile's own sum as w.
template <class T>
void walk(const Pass<T>& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
          TileBuffers<T>& buffers, const Kept<T>& kept = {});

}  // namespace xc
