#include <cmath>
#include <csignal>
#include <cstring>

#include "check.hpp"
#include "core/error.hpp"
#include "engine/engine.hpp"
#include "engine/shared_array.hpp"
#include "ranks.hpp"

// Four workers in one, two and four teams, which share no memory, over a wire without MPI.

using namespace xc;

namespace {

constexpr int kWorkers = 4;
const Ranks::Teams kPairs = {{0, 1}, {2, 3}}, kSingles = {{0}, {1}, {2}, {3}}, kUnequal = {{0, 1, 2}, {3}};
const Ranks::Teams kCrossed = {{0, 2}, {1, 3}};

struct Case {
  std::vector<std::int64_t> lengths = {9000, 1, 7};
  RailOptions rails = {};
  double max_norm = 0;
  const char* rule = "sgd";
  const char* extrapolation = "local";
  bool norms_first = false;
  double tolerance = 0;  // 0: the same bits
  double divisor = 1;
  bool maximize = false;
};

// w of all layers, then X of every own worker.
using Result = std::vector<float>;

std::vector<double> hyper_of(const Case& each) {
  if (std::strcmp(each.rule, "sgd") == 0) return {0.1, 0.9, 0.0, 1e-3};
  if (std::strcmp(each.rule, "adam") == 0) return {0.01, 0.9, 0.999, 1e-8, 1e-2};
  if (std::strcmp(each.rule, "lamb") == 0) return {0.01, 0.9, 0.999, 1e-8, 1e-2, 1.0, 0.0};
  return {0.01, 0.9, 0.999, 1e-8, 1e-2, 0.1, 0.1};
}

// In three filters, if that is possible.
LayerSpec layer_of(std::int64_t length) {
  const std::int64_t filters = length % 3 == 0 ? 3 : 1;
  return {"w", DType::f32, {filters, length / filters}, {length / filters, 1}, 0};
}

std::unique_ptr<Engine> make_engine(const std::shared_ptr<Team>& team, const Case& each) {
  std::vector<LayerSpec> layers;
  for (const std::int64_t length : each.lengths) layers.push_back(layer_of(length));
  return Engine::create(team, layers,
                        {.rule = each.rule,
                         .extrapolation = {each.extrapolation},
                         .groups = {GroupSpec{0, hyper_of(each), each.maximize}},
                         .tile = 256,
                         .version = "teams"});
}

float* weights(const Engine& engine, int v, std::size_t layer) {
  return reinterpret_cast<float*>(engine.weights(v).get() + engine.plan().layers[layer].byte_begin);
}

float* gradient(const Engine& engine, int v, std::size_t layer) {
  return reinterpret_cast<float*>(engine.gradients(v).get() + engine.plan().layers[layer].byte_begin);
}

Engine::Outcome step(Engine& engine, const Case& each, double lr) {
  const int workers = engine.team().workers_per_rank();
  const std::vector<std::uint8_t> present(each.lengths.size() * static_cast<std::size_t>(workers), 1);
  auto hyper = hyper_of(each);
  hyper[0] = lr;
  hyper.push_back(0.05);
  return engine.step({.hyper = hyper,
                      .present = present,
                      .divisor = each.divisor,
                      .max_norm = each.max_norm,
                      .skip_nonfinite = each.norms_first});
}

void fill_gradients(Engine& engine, const Case& each, int step) {
  for (int v = 0; v < engine.team().workers_per_rank(); ++v) {
    const auto k = static_cast<float>(engine.team().first_worker() + v + 1);
    for (std::size_t layer = 0; layer < each.lengths.size(); ++layer)
      for (std::int64_t i = 0; i < each.lengths[layer]; ++i)
        gradient(engine, v, layer)[i] =
            std::sin(k * static_cast<float>(i + step)) + 0.1f * weights(engine, v, layer)[i];
  }
}

Result result_of(const Engine& engine, const Case& each) {
  Result all;
  for (std::size_t layer = 0; layer < each.lengths.size(); ++layer) {
    std::vector<float> w(static_cast<std::size_t>(each.lengths[layer]));
    engine.read(layer, 0, 0, each.lengths[layer], w.data());
    all.insert(all.end(), w.begin(), w.end());
  }
  for (int v = 0; v < engine.team().workers_per_rank(); ++v)
    for (std::size_t layer = 0; layer < each.lengths.size(); ++layer)
      all.insert(all.end(), weights(engine, v, layer), weights(engine, v, layer) + each.lengths[layer]);
  return all;
}

// Root worker 1 has the first weights.
Result train(const std::shared_ptr<Team>& team, const Case& each) {
  const auto engine = make_engine(team, each);
  for (int v = 0; v < team->workers_per_rank(); ++v)
    for (std::size_t layer = 0; layer < each.lengths.size(); ++layer)
      for (std::int64_t i = 0; i < each.lengths[layer]; ++i)
        weights(*engine, v, layer)[i] = std::cos(static_cast<float>(i * (team->first_worker() + v)));
  engine->adopt(1);
  for (int t = 0; t < 3; ++t) {
    fill_gradients(*engine, each, t);
    CHECK(!step(*engine, each, hyper_of(each)[0]).skipped);
  }
  return result_of(*engine, each);
}

std::int64_t length_of(const Case& each) {
  std::int64_t sum = 0;
  for (const std::int64_t length : each.lengths) sum += length;
  return sum;
}

// What of the result of one rank with all workers a rank with some of them must have, too.
Result part_for(const Result& alone, const Case& each, const Team& team) {
  const std::int64_t length = length_of(each);
  const auto from = alone.begin() + length * (1 + team.first_worker());
  Result part(alone.begin(), alone.begin() + length);
  part.insert(part.end(), from, from + length * team.workers_per_rank());
  return part;
}

void check_close(const Result& got, const Result& wanted, double tolerance) {
  CHECK(got.size() == wanted.size());
  if (tolerance == 0)
    CHECK(got.empty() || std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) == 0);
  for (std::size_t i = 0; i < got.size(); ++i) CHECK(std::abs(got[i] - wanted[i]) <= tolerance);
}

std::shared_ptr<Team> team_for(const Ranks& ranks, int rank, const Case& each, int workers = 1) {
  auto options = ranks.options(rank, workers);
  options.rails = each.rails;
  return std::make_shared<Team>(std::move(options));
}

Result train_alone(const Case& each) {
  const Ranks ranks(1);
  return train(std::make_shared<Team>(ranks.options(0, kWorkers)), each);
}

void compare(const Ranks::Teams& teams, const Case& each, const Result& alone) {
  int size = 0;
  for (const auto& team : teams) size += static_cast<int>(team.size());
  const Ranks ranks(size, teams);
  ranks.run_well([&](int rank) {
    auto team = team_for(ranks, rank, each, kWorkers / size);
    check_close(train(team, each), part_for(alone, each, *team), each.tolerance);
  });
}

void teams_do_not_change_a_bit() {
  for (const char* extrapolation : {"none", "local", "global", "anisotropic", "filter"})
    for (const double max_norm : {0.0, 1.0}) {
      const Case each{.max_norm = max_norm, .extrapolation = extrapolation};
      const Result alone = train_alone(each);
      for (const auto& teams : {Ranks::Teams{{0, 1, 2, 3}}, kPairs, kSingles, Ranks::Teams{{0}, {1}}})
        compare(teams, each, alone);
    }
}

void rules_that_measure_do_not_change_a_bit() {
  for (const char* rule : {"adam", "lamb", "adamp"}) {
    const Case each{.rule = rule, .extrapolation = "anisotropic"};
    const Result alone = train_alone(each);
    compare(kPairs, each, alone);
    compare(kSingles, each, alone);
  }
}

void maximizing_does_not_change_a_bit() {
  for (const char* extrapolation : {"local", "global"})
    for (const double max_norm : {0.0, 1.0}) {
      const Case each{.max_norm = max_norm, .extrapolation = extrapolation, .maximize = true};
      const Result alone = train_alone(each);
      compare(kPairs, each, alone);
      compare(kSingles, each, alone);
    }
}

void unequal_teams_give_the_right_numbers() {
  for (const double max_norm : {0.0, 1.0}) {
    const Case each{.max_norm = max_norm, .tolerance = 2e-6};
    const Result alone = train_alone(each);
    compare(kUnequal, each, alone);
    compare(kCrossed, each, alone);
    compare({{0}, {1, 2, 3}}, each, alone);
  }
}

void chunks_and_windows_do_not_change_a_bit() {
  const Case plain{.lengths = {20'000, 3, 8000}};
  const Result alone = train_alone(plain);
  for (const int window : {1, 2, 5})
    for (const std::int64_t chunk : {1, 1024, 3000, 1'000'000}) {
      Case each = plain;
      each.rails = {chunk, window, false};
      compare(kPairs, each, alone);
    }
}

void halves_do_not_change_a_bit() {
  for (const std::int64_t chunk : {0, 1024, 3000}) {
    Case each{.lengths = {20'000, 3, 8000}, .rails = {.chunk = chunk, .way = RailOptions::Way::halving}};
    const Result alone = train_alone(each);
    for (const auto& teams : {kPairs, kSingles, kUnequal}) {
      each.tolerance = teams == kUnequal ? 2e-6 : 0;  // which goes from all to all
      compare(teams, each, alone);
    }
    each.rails.narrow = true;
    each.tolerance = 3e-2;
    compare(kSingles, each, alone);
  }
}

void empty_segments_and_tiny_plans_work() {
  for (const std::vector<std::int64_t>& lengths :
       {std::vector<std::int64_t>{0}, {1}, {0, 1, 0}, {1024}, {1025, 0, 5}})
    for (const int window : {1, 2}) {
      Case each{.lengths = lengths, .rails = {1024, window, false}, .max_norm = 1};
      const Result alone = train_alone(each);
      for (const auto& teams : {kPairs, kSingles}) compare(teams, each, alone);
      each.rails.way = RailOptions::Way::halving;
      compare(kSingles, each, alone);
    }
}

// Every partial sum is off by at most 2^-9 of itself.
void narrow_sums_give_numbers_that_are_close() {
  for (const int window : {1, 5}) {
    const Case each{.rails = {1024, window, true}, .tolerance = 3e-2};
    const Result alone = train_alone(each);
    for (const auto& teams : {kPairs, kUnequal, kSingles}) compare(teams, each, alone);
  }
}

// Gradients that bfloat16 holds travel unharmed.
void narrow_sums_of_few_bits_are_exact() {
  const Ranks ranks(4, kPairs);
  ranks.run_well([&](int rank) {
    const Case each{.lengths = {5000}, .rails = {1024, 2, true}, .extrapolation = "none"};
    const auto engine = make_engine(team_for(ranks, rank, each), each);
    engine->adopt(0);
    for (std::int64_t i = 0; i < 5000; ++i) gradient(*engine, 0, 0)[i] = static_cast<float>(i % 8 * rank);
    step(*engine, each, 1.0);
    for (std::int64_t i = 0; i < 5000; ++i)
      CHECK(weights(*engine, 0, 0)[i] == -static_cast<float>(i % 8) * 1.5f);
  });
}

void a_step_that_is_not_finite_is_skipped_by_all_teams() {
  const Ranks ranks(4, kUnequal);
  ranks.run_well([&](int rank) {
    const Case each{.norms_first = true};
    const auto engine = make_engine(std::make_shared<Team>(ranks.options(rank)), each);
    engine->adopt(0);
    fill_gradients(*engine, each, 0);
    if (rank == 3) gradient(*engine, 0, 0)[4000] = INFINITY;
    CHECK(step(*engine, each, 0.1).skipped && engine->updates(0) == 0);
    for (std::int64_t i = 0; i < each.lengths[0]; ++i) CHECK(weights(*engine, 0, 0)[i] == 0);
    fill_gradients(*engine, each, 0);
    CHECK(!step(*engine, each, 0.1).skipped);
  });
}

void a_mismatch_is_the_same_error_in_all_teams() {
  const Ranks ranks(4, kPairs);
  ranks.run_well([&](int rank) {
    const Case each;
    const auto engine = make_engine(std::make_shared<Team>(ranks.options(rank)), each);
    engine->adopt(0);
    const std::string lr = thrown<MismatchError>([&] { step(*engine, each, rank == 3 ? 0.2 : 0.1); });
    CHECK(lr.find("lr of parameter group 0 is 0.1") == 0 && lr.find("rank 3") != std::string::npos);
    const std::string calls = thrown<MismatchError>([&] {
      if (rank == 2) return engine->adopt(0);
      step(*engine, each, 0.1);
    });
    CHECK(calls.find("rank 2 is in adopt") != std::string::npos ||
          calls.find("rank 2 in adopt") != std::string::npos);
    CHECK(thrown<UsageError>([&] {
            if (rank == 1) engine->complain("my lr is silly");
            step(*engine, each, 0.1);
          }) == "rank 1: my lr is silly");
    CHECK(!step(*engine, each, 0.1).skipped);  // nothing was spoilt
  });
}

// Whichever team it was in, and though most see nothing of it but the wire.
void a_dead_rank_is_named_in_all_teams() {
  for (const auto& teams : {kPairs, kUnequal}) {
    const Ranks ranks(4, teams);
    const auto states = ranks.run([&](int rank) {
      const Case each;
      const auto engine = make_engine(std::make_shared<Team>(ranks.options(rank)), each);
      engine->adopt(0);
      if (rank == 1) raise(SIGKILL);
      const auto since = std::chrono::steady_clock::now();
      const std::string text = thrown<PeerError>([&] { step(*engine, each, 0.1); });
      CHECK(text.find("rank 1 died") == 0);
      CHECK(std::chrono::steady_clock::now() - since < std::chrono::seconds(10));
    });
    CHECK(WIFSIGNALED(states[1]) && states[0] == 0 && states[2] == 0 && states[3] == 0);
  }
}

// Nobody shares memory with it, so only the deadline tells.
void a_late_rank_is_named_in_all_teams() {
  const Ranks ranks(3, {{0, 1}, {2}});
  const auto states = ranks.run([&](int rank) {
    auto options = ranks.options(rank);
    options.limits = {Seconds(0.5), Seconds(0.5), Seconds(20)};
    const Case each;
    const auto engine = make_engine(std::make_shared<Team>(std::move(options)), each);
    engine->adopt(0);
    if (rank == 2) raise(SIGKILL);
    CHECK(thrown<PeerError>([&] { step(*engine, each, 0.1); }).find("rank 2 did not come in time") == 0);
  });
  CHECK(states[0] == 0 && states[1] == 0 && WIFSIGNALED(states[2]));
}

void a_rank_that_leaves_is_named_in_all_teams() {
  const Ranks ranks(3, {{0, 1}, {2}});
  ranks.run_well([&](int rank) {
    const Case each;
    auto team = std::make_shared<Team>(ranks.options(rank));
    const auto engine = make_engine(team, each);
    engine->adopt(0);
    if (rank == 1) return team->leave("weariness");
    CHECK(thrown<PeerError>([&] { step(*engine, each, 0.1); }).find("rank 1 ended with weariness") == 0);
  });
}

void collectives_go_between_teams() {
  for (const auto& teams : {kPairs, kUnequal, kCrossed}) {
    const Ranks ranks(4, teams);
    ranks.run_well([&](int rank) {
      SharedArray array(std::make_shared<Team>(ranks.options(rank)), DType::f64, 9);
      auto* mine = reinterpret_cast<double*>(array.view(0).get());
      std::fill_n(mine, 9, rank + 1.0);
      array.reduce_scatter(Reduction::sum);
      for (std::int64_t i = array.block(rank).begin; i < array.block(rank).end; ++i) CHECK(mine[i] == 10);
      array.all_gather();
      for (int i = 0; i < 9; ++i) CHECK(mine[i] == 10);
      mine[4] = rank;
      array.broadcast(3);
      CHECK(mine[4] == 3);
      array.all_reduce(Reduction::mean);
      CHECK(mine[4] == 3 && mine[0] == 10);
    });
  }
}

}  // namespace

int main() {
  teams_do_not_change_a_bit();
  rules_that_measure_do_not_change_a_bit();
  maximizing_does_not_change_a_bit();
  unequal_teams_give_the_right_numbers();
  chunks_and_windows_do_not_change_a_bit();
  halves_do_not_change_a_bit();
  empty_segments_and_tiny_plans_work();
  narrow_sums_give_numbers_that_are_close();
  narrow_sums_of_few_bits_are_exact();
  a_step_that_is_not_finite_is_skipped_by_all_teams();
  a_mismatch_is_the_same_error_in_all_teams();
  a_dead_rank_is_named_in_all_teams();
  a_late_rank_is_named_in_all_teams();
  a_rank_that_leaves_is_named_in_all_teams();
  collectives_go_between_teams();
}
