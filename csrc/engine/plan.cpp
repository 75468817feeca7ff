#include "engine/plan.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace xc {
namespace {

std::int64_t round_up(std::int64_t value, std::int64_t grid) { return (value + grid - 1) / grid * grid; }

std::string list(std::span<const std::int64_t> numbers) {
  std::string text = "(";
  for (const std::int64_t number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + ")";
}

DType master_of(std::span<const LayerSpec> specs) {
  const auto is_double = [](const LayerSpec& spec) { return spec.dtype == DType::f64; };
  if (std::none_of(specs.begin(), specs.end(), is_double)) return DType::f32;
  if (std::all_of(specs.begin(), specs.end(), is_double)) return DType::f64;
  const auto odd = std::find_if_not(specs.begin(), specs.end(), is_double);
  throw UsageError("float64 parameters have float64 master weights and cannot share an engine with '" +
                   odd->name + "' of " + std::string(name_of(odd->dtype)) + "; use one engine for each");
}

// Where the next filter begins after the element `at`; padding belongs to the last one.
std::int64_t next_filter(const Layer& layer, std::int64_t at) {
  const std::int64_t length = filter_length(layer.spec);
  if (length == 0) return layer.end;
  const std::int64_t next = at + length - (at - layer.begin) % length;
  return next < layer.begin + layer.count ? next : layer.end;
}

std::vector<std::int64_t> make_cells(const Plan& plan, CellCuts cuts) {
  std::vector<std::int64_t> cells;
  for (const Layer& layer : plan.layers)
    for (std::int64_t at = layer.begin; at < layer.end;) {
      cells.push_back(at);
      const std::int64_t on_grid = at / kNormGrid * kNormGrid + kNormGrid;
      at = cuts == CellCuts::filters ? std::min(on_grid, next_filter(layer, at)) : on_grid;
    }
  cells.push_back(plan.length);
  return cells;
}

}  // namespace

std::int64_t element_count(std::span<const std::int64_t> shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

std::int64_t filter_length(const LayerSpec& spec) {
  if (spec.shape.size() < 2 || spec.shape[0] == 0) return 0;
  return element_count(spec.shape) / spec.shape[0];
}

std::int64_t filter_count(const LayerSpec& spec) { return filter_length(spec) > 0 ? spec.shape[0] : 0; }

std::vector<Segment> make_segments(std::int64_t length, int workers, std::int64_t grid) {
  const std::int64_t cells = (length + grid - 1) / grid;
  std::vector<Segment> segments;
  for (std::int64_t k = 0; k < workers; ++k)
    segments.push_back({0, std::min(length, cells * k / workers * grid),
                        std::min(length, cells * (k + 1) / workers * grid), static_cast<int>(k)});
  return segments;
}

Plan make_plan(std::span<const LayerSpec> specs, int workers, CellCuts cuts) {
  Plan plan;
  plan.master = master_of(specs);
  for (const LayerSpec& spec : specs) {
    const std::int64_t count = element_count(spec.shape);
    const std::int64_t padded = round_up(count, kLayerGrid);
    plan.layers.push_back({spec, count, plan.length, plan.length + padded, plan.bytes});
    plan.length += padded;
    plan.bytes += padded * size_of(spec.dtype);
  }
  plan.segments = make_segments(plan.length, workers, kNormGrid);
  plan.cells = make_cells(plan, cuts);
  return plan;
}

std::span<const std::int64_t> cells_of(const Plan& plan, const Segment& segment) {
  const auto place = [&](std::int64_t at) {
    return std::lower_bound(plan.cells.begin(), plan.cells.end(), at);
  };
  return {place(segment.begin), place(segment.end) + 1};
}

std::vector<std::string> signature_of(const Plan& plan) {
  std::vector<std::string> lines = {std::to_string(plan.layers.size()) + " parameters"};
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const LayerSpec& spec = plan.layers[i].spec;
    lines.push_back("parameter " + std::to_string(i) + " '" + spec.name + "' " +
                    std::string(name_of(spec.dtype)) + " of shape " + list(spec.shape) + ", strides " +
                    list(spec.strides) + ", group " + std::to_string(spec.group));
  }
  return lines;
}

}  // namespace xc
