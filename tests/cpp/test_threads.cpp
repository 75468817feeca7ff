#include <barrier>
#include <cmath>
#include <random>
#include <thread>

#include "check.hpp"
#include "core/error.hpp"
#include "engine/engine.hpp"
#include "engine/shared_array.hpp"
#include "mail.hpp"

// Four ranks as threads of one process, in one team and in several: the same protocol, where a thread
// sanitizer can watch it.

using namespace xc;

namespace {

constexpr int kRanks = 4;
constexpr std::int64_t kLength = 5000;
using Teams = std::vector<std::vector<int>>;

struct Board {
  explicit Board(Teams of_ranks) : teams(std::move(of_ranks)) {}
  Teams teams;
  Mail mail{kRanks};
  std::barrier<> barrier{kRanks};
  std::vector<std::string> texts = std::vector<std::string>(kRanks);

  std::vector<std::string> all_gather(int rank, const std::string& mine) {
    texts[static_cast<std::size_t>(rank)] = mine;
    barrier.arrive_and_wait();
    std::vector<std::string> all = texts;
    barrier.arrive_and_wait();
    return all;
  }
};

std::shared_ptr<Team> make_team(Board& board, int rank) {
  TeamOptions options;
  options.topology = Topology(rank, 1, board.teams);
  if (board.teams.size() > 1) options.wire = std::make_shared<MailWire>(board.mail, rank);
  options.provider = Provider::local;
  options.all_gather = [&board, rank](const std::string& mine) { return board.all_gather(rank, mine); };
  options.interrupted = [] {};
  options.warn = [](const std::string&) {};
  return std::make_shared<Team>(std::move(options));
}

// Every step each gradient is the rank's own weights, so w shrinks; one call on the way is a mismatch.
void train(const std::shared_ptr<Team>& team) {
  const LayerSpec layer{"w", DType::f32, {kLength}, {1}, 0};
  const auto engine = Engine::create(team, std::span(&layer, 1),
                                     {.rule = "sgd",
                                      .extrapolation = {"local"},
                                      .groups = {GroupSpec{0, {0.01, 0.9, 0.0, 0.0}}},
                                      .tile = 256,
                                      .version = "threads"});
  auto* x = reinterpret_cast<float*>(engine->weights(0).get());
  auto* gradient = reinterpret_cast<float*>(engine->gradients(0).get());
  for (std::int64_t i = 0; i < kLength; ++i) x[i] = 1;
  engine->adopt(0);
  std::mt19937 random(static_cast<unsigned>(team->rank()));
  const std::uint8_t present[] = {1};
  for (int step = 0; step < 300; ++step) {
    for (std::int64_t i = 0; i < kLength; ++i) gradient[i] = x[i];
    if (random() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
    const bool odd = step == 150 && team->rank() == 2;
    const double hyper[] = {odd ? 0.02 : 0.01, 0.9, 0.0, 0.0, 0.005};
    if (step == 150)
      thrown<MismatchError>([&] { engine->step({hyper, present}); });
    else
      engine->step({.hyper = hyper, .present = present, .max_norm = step % 2 ? 1.0 : 0.0});
  }
  std::vector<float> w(kLength);
  engine->read(0, 0, 0, kLength, w.data());
  for (const float value : w) CHECK(value == w[0] && std::abs(value) < 1);
}

// Ranks that train alone meet every third step and then have the same weights; one complains on the way.
void train_alone(const std::shared_ptr<Team>& team) {
  const LayerSpec layer{"w", DType::f32, {kLength}, {1}, 0};
  const auto engine = Engine::create(team, std::span(&layer, 1),
                                     {.rule = "sgd",
                                      .extrapolation = {"none"},
                                      .groups = {GroupSpec{0, {0.01, 0.9, 0.0, 0.0}}},
                                      .tile = 256,
                                      .streaming = true,
                                      .version = "threads"});
  auto* x = reinterpret_cast<float*>(engine->weights(0).get());
  auto* gradient = reinterpret_cast<float*>(engine->gradients(0).get());
  std::fill_n(x, kLength, 1.0f);
  engine->adopt(0);
  engine->begin_local();
  const std::uint8_t present[] = {1};
  const double hyper[] = {0.01, 0.9, 0.0, 0.0, 0.0};
  std::vector<float> w(kLength);
  for (int round = 0; round < 60; ++round) {
    for (int step = 0; step < 2; ++step) {
      for (std::int64_t i = 0; i < kLength; ++i) gradient[i] = x[i] * static_cast<float>(team->rank());
      if (round == 30 && step == 1 && team->rank() == 2)
        thrown<UsageError>([&] { engine->complain("not now"); });
      engine->local_step({.hyper = hyper, .present = present});
    }
    if (round == 30 && team->rank() != 2) thrown<UsageError>([&] { engine->average(); });
    engine->averaging_step({.hyper = hyper, .present = present});
    engine->read(0, 0, 0, kLength, w.data());
    for (std::int64_t i = 0; i < kLength; ++i) CHECK(x[i] == w[0] && w[i] == w[0]);
  }
  CHECK(engine->updates(0) == 180);
}

void sum(const std::shared_ptr<Team>& team) {
  SharedArray array(team, DType::f32, 1000);
  auto* mine = reinterpret_cast<float*>(array.view(0).get());
  for (int call = 0; call < 300; ++call) {
    std::fill_n(mine, 1000, static_cast<float>(team->rank() + call));
    array.all_reduce(Reduction::sum);
    for (int i = 0; i < 1000; ++i) CHECK(mine[i] == static_cast<float>(6 + 4 * call));
  }
}

void run(const Teams& teams) {
  Board board(teams);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank)
    ranks.emplace_back([&board, rank] {
      const auto team = make_team(board, rank);
      train(team);
      train_alone(team);
      sum(team);
    });
  for (std::thread& rank : ranks) rank.join();
}

}  // namespace

int main() {
  for (const Teams& teams : {Teams{{0, 1, 2, 3}}, Teams{{0, 1}, {2, 3}}, Teams{{0, 1, 2}, {3}}}) run(teams);
}
