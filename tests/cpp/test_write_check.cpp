#include <vector>

#include "check.hpp"
#include "engine/write_check.hpp"

using namespace xc;

namespace {

// Two workers' weights of three layers: 40 float32, none, 1,000 bfloat16.
struct Fixture {
  Plan plan = make_plan(std::vector<LayerSpec>{{"a", DType::f32, {40}, {1}, 0},
                                               {"b", DType::f32, {0}, {1}, 0},
                                               {"c", DType::bf16, {1000}, {1}, 0}},
                        1);
  std::vector<std::byte> weights[2] = {std::vector<std::byte>(std::size_t(plan.bytes)),
                                       std::vector<std::byte>(std::size_t(plan.bytes))};
  WriteCheck check{plan, {weights[0].data(), weights[1].data()}};

  void flip(std::size_t worker, std::size_t layer, std::int64_t element) {
    const Layer& l = plan.layers[layer];
    weights[worker][std::size_t(l.byte_begin + element * size_of(l.spec.dtype))] ^= std::byte{1};
  }
};

void nothing_is_written_before_the_first_record_and_after_each() {
  Fixture f;
  f.flip(0, 0, 0);
  CHECK(!f.check.written(0) && !f.check.written(1));
  for (int i = 0; i < 100; ++i) {
    f.check.record();
    CHECK(!f.check.written(0) && !f.check.written(1));
    f.flip(0, 0, 0);
    f.flip(1, 2, i);
  }
}

void first_and_last_elements_are_always_compared() {
  Fixture f;
  for (int i = 0; i < 100; ++i)
    for (const std::size_t layer : {0u, 2u})
      for (const std::int64_t at : {std::int64_t{0}, f.plan.layers[layer].count - 1}) {
        f.check.record();
        f.flip(1, layer, at);
        CHECK(!f.check.written(0) && f.check.written(1) == layer);
      }
}

void elements_between_are_compared_in_their_turn() {
  Fixture f;
  int noticed = 0;
  for (int i = 0; i < 10000; ++i) {
    f.check.record();
    f.flip(0, 0, 17);
    noticed += f.check.written(0).has_value();
  }
  CHECK(noticed > 400 && noticed < 600);  // two of 40: 494 on average
}

void what_is_forgotten_is_not_compared() {
  Fixture f;
  f.check.record();
  f.flip(0, 0, 0);
  f.flip(1, 0, 0);
  f.check.forget(0);
  CHECK(!f.check.written(0) && f.check.written(1) == 0u);
}

void padding_is_not_compared() {
  Fixture f;
  for (int i = 0; i < 1000; ++i) {
    f.check.record();
    f.flip(0, 0, 40);
    CHECK(!f.check.written(0));
  }
}

}  // namespace

int main() {
  nothing_is_written_before_the_first_record_and_after_each();
  first_and_last_elements_are_always_compared();
  elements_between_are_compared_in_their_turn();
  what_is_forgotten_is_not_compared();
  padding_is_not_compared();
}
