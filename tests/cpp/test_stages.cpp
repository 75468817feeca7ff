#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/streaming.hpp"
#include "rules/all.hpp"
#include "rules/extrapolation.hpp"
#include "stages/tables.hpp"

using namespace xc;

namespace {

constexpr std::int64_t kCount = 77;

std::vector<std::vector<float>> random_sources(int count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> sources(static_cast<std::size_t>(count), std::vector<float>(kCount));
  for (auto& source : sources)
    for (float& value : source) value = normal(random);
  return sources;
}

// The tree as its definition says: pair neighbours, carry the odd one, repeat.
float tree_sum(std::vector<float> terms) {
  while (terms.size() > 1) {
    std::vector<float> next;
    for (std::size_t i = 0; i + 1 < terms.size(); i += 2) next.push_back(terms[i] + terms[i + 1]);
    if (terms.size() % 2) next.push_back(terms.back());
    terms = next;
  }
  return terms[0];
}

void reduce_is_the_bottom_up_tree() {
  for (int sources = 1; sources <= 40; ++sources) {
    const auto values = random_sources(sources);
    std::vector<const std::byte*> pointers;
    for (const auto& source : values) pointers.push_back(reinterpret_cast<const std::byte*>(source.data()));
    std::vector<float> mean(kCount),
        scratch(static_cast<std::size_t>(kCount * reduce_scratch_tiles(sources)));
    reduce_kernel<float>(DType::f32)(pointers.data(), sources, 0, kCount, 0.5f, mean.data(), scratch.data());
    for (std::size_t i = 0; i < kCount; ++i) {
      std::vector<float> terms;
      for (const auto& source : values) terms.push_back(source[i]);
      CHECK(mean[i] == tree_sum(terms) * 0.5f);
    }
  }
}

void nesterov_momentum_follows_the_worked_example() {
  // f(w) = w^2 with K = 1, w = 2, lr 0.1, momentum 0.9: three steps by hand in double.
  const double hyper[] = {0.1, 0.9, 0.0, 0.0};
  double w = 2, buffer = 0, expected = 2, memory = 0;
  double* slots[] = {&buffer, nullptr, nullptr};
  const unsigned member = SgdFamily::member(1, Hyper(hyper));
  const RuleKernel<double>& kernel = rule_kernel<double>(family_index("sgd"), member);
  alignas(64) std::byte scalars[kMaxScalarBytes];
  for (int t = 0; t < 3; ++t) {
    const double gradient = 2 * w;
    memory = 0.9 * memory + 2 * expected;
    expected -= 0.1 * (2 * expected + 0.9 * memory);
    kernel.prepare(Hyper(hyper), t, scalars);
    kernel.apply(scalars, {&gradient, nullptr, &w, slots}, 1);
    CHECK(std::abs(w - expected) < 1e-15);
  }
}

void publishing_without_displacement_keeps_signs_and_nans_apart() {
  const float w[] = {-0.0f, 1.0f}, own[] = {INFINITY, NAN}, mean[] = {NAN, INFINITY};
  float x[2];
  const Displacement<float> by{reinterpret_cast<const std::byte*>(own), mean, mean, 0, 0};
  publish_kernel<float>(DType::f32, Direction::none, false)(w, by, reinterpret_cast<std::byte*>(x), 2);
  CHECK(std::signbit(x[0]) && x[1] == 1.0f);
}

void tables_hold_every_rule() {
  CHECK(families().size() >= 2);
  for (const FamilyInfo& family : families()) CHECK(family_index(family.name) >= 0);
  CHECK(family_index("nonsense") == -1 && extrapolation_index("nonsense") == -1);
}

// 200 elements are three blocks and a rest; the target begins at every alignment that floats may have.
void streamed_weights_are_the_stored_ones_for_every_width_and_alignment() {
  constexpr std::int64_t kLong = 200;
  std::vector<float> w(kLong), own(kLong), expected(kLong);
  for (std::size_t i = 0; i < w.size(); ++i) {
    w[i] = static_cast<float>(i) * 0.5f;
    own[i] = 1.0f / static_cast<float>(i + 1);
  }
  const Displacement<float> by{reinterpret_cast<const std::byte*>(own.data()), nullptr, nullptr, 0.25f, 0.0f};
  publish_kernel<float>(DType::f32, Direction::own, false)(
      w.data(), by, reinterpret_cast<std::byte*>(expected.data()), kLong);
  for (const StoreWidth width : {StoreWidth::bytes16, StoreWidth::bytes32, StoreWidth::bytes64}) {
    if (width > widest_store()) continue;
    for (std::size_t shift = 0; shift < 16; ++shift) {
      alignas(64) float x[kLong + 32];
      for (float& value : x) value = -1.0f;
      Ahead ahead;
      ahead.store = width;
      stream_kernel<float>(DType::f32, Direction::own, false)(
          w.data(), by, reinterpret_cast<std::byte*>(x + shift), kLong, ahead, {});
      finish_streaming();
      for (std::size_t i = 0; i < kLong; ++i) CHECK(x[shift + i] == expected[i]);
      for (std::size_t i = 0; i < shift; ++i) CHECK(x[i] == -1.0f);
      for (std::size_t i = shift + kLong; i < kLong + 32; ++i) CHECK(x[i] == -1.0f);
    }
  }
}

}  // namespace

int main() {
  streamed_weights_are_the_stored_ones_for_every_width_and_alignment();
  reduce_is_the_bottom_up_tree();
  nesterov_momentum_follows_the_worked_example();
  publishing_without_displacement_keeps_signs_and_nans_apart();
  tables_hold_every_rule();
}
