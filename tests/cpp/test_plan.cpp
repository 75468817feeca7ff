#include <algorithm>

#include "check.hpp"
#include "core/error.hpp"
#include "engine/plan.hpp"

using namespace xc;

namespace {

LayerSpec layer(const char* name, std::int64_t count, DType dtype = DType::f32) {
  return {name, dtype, {count}, {1}, 0};
}

void segments_cover_everything_once() {
  for (const std::int64_t length : {0L, 1L, 1023L, 1024L, 1025L, 100000L})
    for (int workers = 1; workers <= 9; ++workers) {
      std::int64_t at = 0;
      for (const Segment& s : make_segments(length, workers, kNormGrid)) {
        CHECK(s.begin == at && s.end >= s.begin);
        CHECK(s.begin % kNormGrid == 0 || s.begin == length);
        at = s.end;
      }
      CHECK(at == length);
    }
}

void blocks_are_equal_when_they_can_be() {
  for (const Segment& s : make_segments(12, 4, 1)) CHECK(s.count() == 3);
}

void layers_are_aligned_in_every_type() {
  const LayerSpec specs[] = {layer("a", 3), layer("b", 0), layer("c", 33, DType::bf16), layer("d", 1)};
  const Plan plan = make_plan(specs, 2);
  CHECK(plan.layers[1].begin == 32 && plan.layers[2].begin == 32 && plan.layers[3].begin == 96);
  for (const Layer& l : plan.layers) CHECK(l.byte_begin % 64 == 0);
  CHECK(plan.length == 128 && plan.bytes == 128 + 128 + 128);
}

void every_cell_has_one_layer_and_one_owner() {
  const LayerSpec specs[] = {layer("a", 1000), layer("b", 0), layer("c", 3000), layer("d", 1)};
  for (int workers = 1; workers <= 6; ++workers) {
    const Plan plan = make_plan(specs, workers);
    std::size_t cells = 0;
    for (const Segment& segment : plan.segments) {
      const auto own = cells_of(plan, segment);
      if (segment.count() > 0) CHECK(own.front() == segment.begin && own.back() == segment.end);
      cells += own.size() - 1;
    }
    CHECK(cells == plan.cells.size() - 1 && plan.cells.back() == plan.length);
    for (std::size_t c = 0; c + 1 < plan.cells.size(); ++c)
      CHECK(plan.cells[c] / kNormGrid == (plan.cells[c + 1] - 1) / kNormGrid);
    for (const Layer& l : plan.layers)
      if (l.count > 0) CHECK(std::find(plan.cells.begin(), plan.cells.end(), l.begin) != plan.cells.end());
  }
}

void no_cell_spans_two_filters_where_cells_are_cut() {
  const LayerSpec specs[] = {{"a", DType::f32, {3, 700}, {700, 1}, 0},
                             {"b", DType::f32, {40, 1}, {1, 1}, 0},
                             layer("c", 1500),
                             {"d", DType::f32, {0, 5}, {5, 1}, 0}};
  const Plan plan = make_plan(specs, 2, CellCuts::filters);
  const std::vector<std::int64_t> first(plan.cells.begin(), plan.cells.begin() + 6);
  CHECK((first == std::vector<std::int64_t>{0, 700, 1024, 1400, 2048, 2112}));
  CHECK(std::count_if(plan.cells.begin(), plan.cells.end(),
                      [](std::int64_t c) { return c >= 2112 && c < 2176; }) == 40);
  CHECK(plan.cells.size() == 5 + 40 + 3 && plan.cells.back() == plan.length);
  CHECK(filter_count(specs[0]) == 3 && filter_count(specs[2]) == 0 && filter_count(specs[3]) == 0);
}

void an_empty_plan_works() {
  const Plan plan = make_plan({}, 3);
  CHECK(plan.length == 0 && plan.segments.size() == 3);
  for (const Segment& segment : plan.segments) CHECK(cells_of(plan, segment).size() == 1);
}

void doubles_do_not_mix() {
  const LayerSpec specs[] = {layer("a", 3, DType::f64), layer("b", 3)};
  CHECK(thrown<UsageError>([&] { make_plan(specs, 1); }).find("'b' of float32") != std::string::npos);
}

void signatures_differ_where_layers_do() {
  const LayerSpec first[] = {layer("a", 3)}, second[] = {layer("a", 4)};
  CHECK(signature_of(make_plan(first, 1))[1] != signature_of(make_plan(second, 1))[1]);
}

}  // namespace

int main() {
  segments_cover_everything_once();
  blocks_are_equal_when_they_can_be();
  layers_are_aligned_in_every_type();
  every_cell_has_one_layer_and_one_owner();
  no_cell_spans_two_filters_where_cells_are_cut();
  an_empty_plan_works();
  doubles_do_not_mix();
  signatures_differ_where_layers_do();
}
