#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.hpp"

namespace xc {

// The PLAN says where everything lies and who owns what. All parameters stand one after the other in a flat
// run of elements; each LAYER (one parameter tensor) starts at a multiple of kLayerGrid elements, so at least
// 64-byte aligned in every type. In a worker's memory the elements have the parameter's own type, so a layer
// also has a byte offset; in the master weights and the rule's state every element has the master type.

inline constexpr std::int64_t kLayerGrid = 32;
inline constexpr std::int64_t kNormGrid = 1024;  // segments start here, so that no norm cell has two owners

struct LayerSpec {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements, dense
  int group;
};

struct Layer {
  LayerSpec spec;
  std::int64_t count;  // elements of the tensor, without padding
  std::int64_t begin;  // flat elements
  std::int64_t end;    // with padding: the next layer's begin
  std::int64_t byte_begin;
};

// A run of flat elements that one worker updates.
struct Segment {
  int bucket;
  std::int64_t begin;
  std::int64_t end;
  int owner;
  std::int64_t count() const { return end - begin; }
};

// Elements of one FILTER, the weights of one output: what lies under one index of the first dimension. 0
// where there is but one dimension.
std::int64_t filter_length(const LayerSpec& spec);

std::int64_t element_count(std::span<const std::int64_t> shape);

// Cuts `length` elements into one segment per worker, in the order of workers, at multiples of `grid`.
std::vector<Segment> make_segments(std::int64_t length, int workers, std::int64_t grid);

// The number of filters of a layer, 0 where they are of no length.
std::int64_t filter_count(const LayerSpec& spec);

// Where cells begin, in which norms are summed: on the grid and at every layer, or at every filter as well.
enum class CellCuts { layers, filters };

struct Plan {
  std::vector<Layer> layers;
  std::vector<Segment> segments;
  std::vector<std::int64_t> cells;  // where each begins, then the plan's length
  std::int64_t length = 0;          // flat elements
  std::int64_t bytes = 0;           // of one worker's weights, or gradients
  DType master = DType::f32;
};

// Throws UsageError for types that cannot share one engine.
Plan make_plan(std::span<const LayerSpec> specs, int workers, CellCuts cuts = CellCuts::layers);

// Where the cells of one segment begin, and where the last of them ends.
std::span<const std::int64_t> cells_of(const Plan& plan, const Segment& segment);

// One line per fact that must be alike on all ranks; the first line that differs names the mistake.
std::vector<std::string> signature_of(const Plan& plan);

}  // namespace xc
