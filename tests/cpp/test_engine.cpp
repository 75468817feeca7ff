#include <cmath>
#include <cstring>

#include "check.hpp"
#include "core/error.hpp"
#include "engine/engine.hpp"
#include "engine/shared_array.hpp"
#include "ranks.hpp"

using namespace xc;

namespace {

constexpr std::int64_t kLength = 5000;

EngineOptions sgd(double momentum = 0.9) {
  return {.rule = "sgd",
          .extrapolation = {"local"},
          .groups = {GroupSpec{0, {0.1, momentum, 0.0, 0.0}}},
          .tile = 256,
          .version = "test"};
}

std::vector<LayerSpec> two_layers() {
  return {{"a", DType::f32, {kLength}, {1}, 0}, {"b", DType::bf16, {7}, {1}, 0}};
}

// Three steps of K = ranks * workers; the bits of w and of worker 0's x afterwards.
std::vector<float> train(const Ranks& ranks, int rank, int workers, double max_norm) {
  auto team = std::make_shared<Team>(ranks.options(rank, workers));
  const auto engine = Engine::create(team, two_layers(), sgd());
  auto* x = reinterpret_cast<float*>(engine->weights(0).get());
  for (std::int64_t i = 0; i < kLength; ++i) x[i] = std::sin(static_cast<float>(i));
  engine->adopt(0);
  const std::vector<std::uint8_t> present(2 * static_cast<std::size_t>(workers), 1);
  const double hyper[] = {0.1, 0.9, 0.0, 0.0, 0.05};
  for (int step = 0; step < 3; ++step) {
    for (int v = 0; v < workers; ++v) {
      const auto k = static_cast<float>(team->first_worker() + v + 1);
      auto* weights = reinterpret_cast<float*>(engine->weights(v).get());
      auto* gradient = reinterpret_cast<float*>(engine->gradients(v).get());
      for (std::int64_t i = 0; i < kLength; ++i) gradient[i] = k * 0.1f * weights[i];
    }
    engine->step({.hyper = hyper, .present = present, .max_norm = max_norm});
  }
  std::vector<float> w(kLength);
  engine->read(0, 0, 0, kLength, w.data());
  return w;
}

void grouping_does_not_change_a_bit() {
  for (const double max_norm : {0.0, 1.0}) {
    const Ranks one(1);
    const auto alone = train(one, 0, 4, max_norm);
    for (const int size : {2, 4}) {
      const Ranks ranks(size);
      ranks.run_well([&](int rank) {
        const auto together = train(ranks, rank, 4 / size, max_norm);
        CHECK(std::memcmp(alone.data(), together.data(), kLength * sizeof(float)) == 0);
      });
    }
  }
}

void a_mismatch_is_the_same_error_on_all_ranks() {
  const Ranks ranks(3);
  ranks.run_well([&](int rank) {
    auto team = std::make_shared<Team>(ranks.options(rank));
    auto layers = two_layers();
    if (rank == 2) layers[1].shape = {8};
    const std::string text = thrown<MismatchError>([&] { Engine::create(team, layers, sgd()); });
    CHECK(text.find("(7)") != std::string::npos && text.find("rank 2") != std::string::npos);

    const auto engine = Engine::create(team, two_layers(), sgd());
    const std::uint8_t present[] = {1, 1};
    const double hyper[] = {rank == 1 ? 0.2 : 0.1, 0.9, 0.0, 0.0, 0.05};
    engine->adopt(0);
    const std::string lr = thrown<MismatchError>([&] { engine->step({hyper, present}); });
    CHECK(lr.find("lr of parameter group 0 is 0.1") == 0);
    const double equal[] = {0.1, 0.9, 0.0, 0.0, 0.05};
    engine->step({equal, present});  // nothing was spoilt
    const std::string calls =
        thrown<MismatchError>([&] { rank ? (void)engine->step({equal, present}) : engine->adopt(0); });
    CHECK(calls.find("rank 0 is in adopt") == 0);
    CHECK(thrown<UsageError>([&] {
            rank == 1 ? engine->complain("my lr is silly") : (void)engine->step({equal, present});
          }) == "rank 1: my lr is silly");
  });
}

void a_step_that_is_not_finite_is_skipped_by_all() {
  const Ranks ranks(3);
  ranks.run_well([&](int rank) {
    auto team = std::make_shared<Team>(ranks.options(rank));
    const auto engine = Engine::create(team, two_layers(), sgd());
    engine->adopt(0);
    auto* gradient = reinterpret_cast<float*>(engine->gradients(0).get());
    std::fill_n(gradient, kLength, 1.0f);
    if (rank == 1) gradient[3000] = INFINITY;
    const std::uint8_t present[] = {1, 1};
    const double hyper[] = {0.1, 0.9, 0.0, 0.0, 0.05};
    CHECK(engine->step({.hyper = hyper, .present = present, .skip_nonfinite = true}).skipped);
    std::vector<float> w(kLength);
    engine->read(0, 0, 0, kLength, w.data());
    for (const float value : w) CHECK(value == 0);
    CHECK(engine->updates(0) == 0);
    gradient[3000] = 1;
    const auto outcome = engine->step({.hyper = hyper, .present = present, .skip_nonfinite = true});
    CHECK(!outcome.skipped && std::abs(*outcome.norm - std::sqrt(double(kLength))) < 1e-9);
  });
}

void collectives_reduce_gather_and_copy() {
  const Ranks ranks(3);
  ranks.run_well([&](int rank) {
    auto team = std::make_shared<Team>(ranks.options(rank));
    SharedArray array(team, DType::f64, 9);
    auto* mine = reinterpret_cast<double*>(array.view(0).get());
    std::fill_n(mine, 9, rank + 1.0);
    array.reduce_scatter(Reduction::sum);
    CHECK(mine[array.block(rank).begin] == 6 && mine[array.block((rank + 1) % 3).begin] == rank + 1.0);
    array.all_gather();
    for (int i = 0; i < 9; ++i) CHECK(mine[i] == 6);
    mine[4] = rank;
    array.broadcast(2);
    CHECK(mine[4] == 2);
    array.all_reduce(Reduction::mean);
    CHECK(mine[4] == 2 && mine[0] == 6);
  });
}

}  // namespace

int main() {
  grouping_does_not_change_a_bit();
  a_mismatch_is_the_same_error_on_all_ranks();
  a_step_that_is_not_finite_is_skipped_by_all();
  collectives_reduce_gather_and_copy();
}
