#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "comm/control.hpp"
#include "engine/cell_sums.hpp"
#include "engine/plan.hpp"
#include "engine/ways.hpp"
#include "rules/clipping.hpp"
#include "stages/tables.hpp"

namespace xc {

// A step is a list of STAGES grouped into PASSES. A pass walks the shard once, tile by tile, and every stage
// of the pass touches the tile while it is in cache. Only a scalar that must be known between two stages
// splits a pass: then a first pass measures, and the second reduces again. With K workers that is 3K + 4
// accesses per parameter instead of 2K + 4; to keep the reduced gradient in between would cost 2K + 7, or
// 3K + 7 with extrapolation by each worker's own gradient, which must be read again in any case.
//
// With several teams the sum of all gradients comes over the wire; passes take it from there instead of
// reducing, and publish when the new weights have gone over the wire.

// The workers' memory as a pass sees it: the arrays that are summed, the gradient that displaces each target,
// and the targets that are published to.
struct Workers {
  std::vector<const std::byte*> sources;
  std::vector<const std::byte*> own;
  std::vector<std::byte*> targets;
  std::vector<std::uint32_t> numbers = {};  // of the targets among all teams' workers; none: 0, 1, 2, ...
};

// Elements that are treated alike: one type, one group, one count of updates. Settled before the pass begins.
template <class T>
struct Run {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t byte_begin;  // of `begin` in a worker's memory
  std::int64_t element_size;
  DType dtype;
  std::size_t layer;  // its first
  int family;         // of its rule, and which member
  unsigned member;
  bool scaled;  // displaced in units of the rule's steps
  T scale;      // makes the mean of the workers' sum
  T own;        // makes a worker's term of the mean
  T clip;
  T decay;  // that a worker's own norms count in
  // What displaces the weights, and at which rates.
  const Extrapolation* extrapolation;
  T own_rate;
  T shared_rate;
  Clipped clipped;              // which of the two the clip concerns
  NoiseKey noise;               // of worker 0
  std::int64_t filter_length;   // of its layer
  std::int64_t filters_end;     // where its layer's elements end, before its padding
  const double* coefficients;   // of the projections of its layer's filters; null without filters
  const RuleKernel<T>* kernel;  // null without a rule
  ReduceFn<T> reduce;
  SpreadFn<T> spread;
  OwnSquaresFn<T> own_squares;
  PublishFn<T> publish;
  StreamFn<T> stream;
  DisplaceFn<T> displace;
  ObserveFn<T> observe;
  FusedFn<T> fused;  // the whole step; null where it has no loop of its own
  alignas(kLine) std::byte scalars[kMaxScalarBytes];
};

// One worker's part of the master weights and the rule's state; the pointers are to its first element.
template <class T>
struct Shard {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  T* w = nullptr;
  T* slots[kMaxSlots] = {};
};

template <class T>
class Filters;

// What passes may leave behind, and read beside the workers' arrays.
template <class T>
struct Kept {
  T* mean = nullptr;            // the shard's reduced gradient, instead of in a buffer of the tile's size
  T* factor = nullptr;          // the same of factors
  const T* received = nullptr;  // the sum of all workers' gradients, of the shard
  CellSums* mean_squares = nullptr;    // of the mean gradient
  CellSums* worker_squares = nullptr;  // of each worker's
  CellSums* measured = nullptr;        // what the rule measures
  CellSums* own_squares = nullptr;     // of each worker's gradient, when the rule wants them one by one
  Filters<T>* filters = nullptr;       // which random displacements may be measured by
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
  T* extra;
  T* factor;
  T* noise;
  T* scratch;
  const T* received;
  StoreWidth store;  // if the weights are stored past the cache
  const Kept<T>* kept;
  Elements<T> elements() const { return {mean, extra, w, slots}; }
};

// How a pass comes by the mean gradient: not at all, with the spread of the workers' gradients beside it,
// clipped; and whether the coefficients of projections come with it.
struct Gradient {
  bool needed = true;
  bool spread = false;
  bool clip = false;
  bool projection = false;
  bool received = false;  // its sum came over the wire
  bool judged = false;    // a device decides what its norm leads to
};

// What a pass sums beside the rest of its work.
struct Sums {
  bool mean = false;         // squares of the mean gradient
  bool workers = false;      // squares of all workers' gradients
  int measure = -1;          // a measure of the rule
  bool own_squares = false;  // squares of each worker's gradient
  bool any() const { return mean || workers || measure >= 0 || own_squares; }
};

// What the last pass of a step does with the weights.
struct Publication {
  bool streaming = false;  // past the cache
  bool factor = false;     // displaced in units of the rule's steps
};

// What a step holds the norm of its mean gradient to: scaled down to max_norm, if that is positive, and no
// step at all if it is not finite.
struct Bounds {
  double max_norm = 0;
  bool skips = false;
};

// What one walk over a shard does, in the order of its stages; an executor (the CPU's tile loops, a device)
// decides how.
struct Pass {
  enum class Source : std::uint8_t { none, gradients, received, partial };
  enum class Weights : std::uint8_t { keep, store, stream };
  Source source = Source::none;  // of the mean, or `partial`: of the sum of the team's gradients
  bool spread = false;
  bool clip = false;
  Sums sums = {};
  bool projection = false;
  bool apply = false;
  bool factor = false;
  Weights weights = Weights::keep;  // how they are published
  bool displace = false;            // in place, by itself
  bool judged = false;              // its runs are the judge's; if it applies, so is whether it does
};

// Passes that only sum, before the one that applies the rule.
Pass summing_pass(Gradient gradient, Sums sums);
// A whole step, or its last pass.
Pass step_pass(Gradient gradient, Sums sums, Publication publication);
// The two halves of a last pass whose publication must know all new weights, or waits for them.
Pass apply_pass(Gradient gradient, Sums sums, bool factor = false);
Pass publication_pass(bool streaming);
// The sum of the team's gradients, not yet a mean.
Pass partial_pass();
// Each stage in a pass of its own: what a program without the engine does and what benchmarks compare with.
std::vector<Pass> unfused_passes();
Pass load_pass();               // reduce
Pass sum_pass(bool streaming);  // reduce, publish: collectives without a rule; w is the sum itself
Pass publish_pass();            // publish what w holds

// Private memory of the walk over tiles of at most `longest` elements.
template <class T>
class TileBuffers {
 public:
  TileBuffers(std::int64_t longest, int source_count, StoreWidth store = usual_store())
      : tile_(longest),
        longest_(longest),
        store_(store),
        memory_(allocate(longest * (4 + reduce_scratch_tiles(source_count)))) {}
  std::int64_t tile() const { return tile_; }
  void use(std::int64_t tile) { tile_ = std::min(tile, longest_); }
  StoreWidth store() const { return store_; }
  T* mean() { return memory_.get(); }
  T* extra() { return memory_.get() + longest_; }
  T* factor() { return memory_.get() + 2 * longest_; }
  T* noise() { return memory_.get() + 3 * longest_; }
  T* scratch() { return memory_.get() + 4 * longest_; }

 private:
  struct Free {
    void operator()(T* at) const { ::operator delete[](at, std::align_val_t(kLine)); }
  };
  static T* allocate(std::int64_t count) {
    return new (std::align_val_t(kLine)) T[static_cast<std::size_t>(count)]();
  }
  std::int64_t tile_;
  std::int64_t longest_;
  StoreWidth store_;
  std::unique_ptr<T[], Free> memory_;
};

// Walks `shard` through one pass. A shard without w (collectives) uses the tile's own sum as w.
template <class T>
void walk(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
          TileBuffers<T>& buffers, const Kept<T>& kept = {});

// Who carries out the passes of a step: the tile loops, or a device.
template <class T>
class Walker {
 public:
  virtual ~Walker() = default;
  virtual void walk(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs,
                    const Shard<T>& shard, const Kept<T>& kept = {}) = 0;
  // Of one that can be captured and replayed: the runs of the next replay.
  virtual void prepare_replay(std::span<const Run<T>>, const Bounds&) {}
};

template <class T>
class TileWalker final : public Walker<T> {
 public:
  // `ways` decides, in place of the pass, how steps store the weights, and how long tiles are; null: the
  // pass, and all tiles are the longest.
  TileWalker(std::int64_t longest, int source_count, Ways* ways)
      : buffers_(longest, source_count), ways_(ways) {}
  void walk(const Pass& pass, const Workers& workers, std::span<const Run<T>> runs, const Shard<T>& shard,
            const Kept<T>& kept) override;

 private:
  TileBuffers<T> buffers_;
  Ways* ways_;
};

}  // namespace xc
