#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>

#include "check.hpp"
#include "core/error.hpp"
#include "device/collective_rails.hpp"
#include "device/host.hpp"
#include "device/tree_rails.hpp"
#include "engine/engine.hpp"
#include "engine/partials.hpp"
#include "mail.hpp"
#include "nccl/wire.hpp"
#include "party.hpp"

// Rails of a device between threads, over the stand-in for NCCL. The stream in use and the wire's are queues
// here, one of which does everything at once and the other as late as it may: what is not ordered by a fork
// or a join comes out wrong.

using namespace xc;

namespace {

constexpr std::int64_t kLength = 30'000;
constexpr std::int64_t kChunk = 2048;

using Teams = std::vector<std::vector<int>>;
using Order = RailOptions::Order;
using Numbers = std::vector<float>;

// --- two streams ---

enum class Late { caller, wire };

class Streams {
 public:
  explicit Streams(Late late) : late_(late) {}
  ~Streams() { CHECK(late_ == Late::caller || queued_.empty()); }  // everything has been joined
  void on_caller(std::function<void()> work) { take(Late::caller, std::move(work)); }
  void on_wire(std::function<void()> work) { take(Late::wire, std::move(work)); }
  void fork() { catch_up(Late::caller); }
  void join() { catch_up(Late::wire); }
  void finish() { catch_up(Late::caller); }
  // Whether the wire still has something to do.
  bool wire_is_late() const { return late_ == Late::wire && !queued_.empty(); }

 private:
  void take(Late stream, std::function<void()> work) {
    if (stream == late_)
      queued_.push_back(std::move(work));
    else
      work();
  }
  void catch_up(Late stream) {
    for (; stream == late_ && !queued_.empty(); queued_.pop_front()) queued_.front()();
  }

  Late late_;
  std::deque<std::function<void()>> queued_;
};

// What is copied from the host is read at once, and what lies here when its turn comes.
class QueuedStorage final : public Storage {
 public:
  explicit QueuedStorage(Streams& streams) : streams_(streams) {}
  Shared share(Team& team, std::size_t bytes) override { return team.share(bytes); }
  std::shared_ptr<std::byte> allocate(std::size_t bytes) override {
    const auto memory = std::make_shared<Mapping>(std::max(bytes, std::size_t{1}));
    mine_.push_back({memory->data(), bytes});
    return {memory, memory->data()};
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    if (bytes == 0) return;
    if (is_mine(from)) return streams_.on_caller([=] { std::memcpy(to, from, bytes); });
    const auto* const begin = static_cast<const std::byte*>(from);
    streams_.on_caller([to, content = std::vector<std::byte>(begin, begin + bytes)] {
      std::memcpy(to, content.data(), content.size());
    });
  }
  void clear(void* at, std::size_t bytes) override {
    streams_.on_caller([=] { std::memset(at, 0, bytes); });
  }
  void finish() override { streams_.finish(); }
  void mark() override {}
  void await_mark() override { finish(); }
  void announce() override {}
  void follow() override {}

 private:
  bool is_mine(const void* at) const {
    return std::any_of(mine_.begin(), mine_.end(), [at](const auto& block) {
      return at >= block.first && at < block.first + block.second;
    });
  }

  Streams& streams_;
  std::vector<std::pair<const std::byte*, std::size_t>> mine_;
};

class QueuedDevice final : public HostDevice {
 public:
  explicit QueuedDevice(Streams& streams) : streams_(streams) {}
  void launch(KernelFn kernel, const Launch& launch) override {
    streams_.on_caller([=] { kernel(launch, nullptr); });
  }

 private:
  Streams& streams_;
};

class QueuedWire final : public CollectiveWire {
 public:
  QueuedWire(Streams& streams, std::shared_ptr<NcclCommunicator> communicator)
      : streams_(streams), nccl_(std::move(communicator)) {}
  void fork() override { streams_.fork(); }
  void join() override { streams_.join(); }
  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) override {
    const std::vector out(sends.begin(), sends.end()), in(receives.begin(), receives.end());
    streams_.on_wire([=, this] { nccl_.exchange(out, in, nullptr); });
  }
  void reduce_scatter(float* blocks, std::int64_t elements) override {
    streams_.on_wire([=, this] { nccl_.reduce_scatter(blocks, elements, nullptr); });
  }
  void all_gather(float* blocks, std::int64_t elements) override {
    streams_.on_wire([=, this] { nccl_.all_gather(blocks, elements, nullptr); });
  }
  void check() override { nccl_.check(); }
  void abort(const std::string& reason) override { nccl_.abort(reason); }

 private:
  Streams& streams_;
  NcclWire nccl_;
};

// --- ranks ---

struct Board {
  Board(Teams of_ranks, Order which, int workers_of_rank)
      : teams(std::move(of_ranks)), order(which), workers(workers_of_rank) {}
  Teams teams;
  Order order;
  int workers;
  int size =
      static_cast<int>(std::accumulate(teams.begin(), teams.end(), std::size_t{0},
                                       [](std::size_t n, const auto& team) { return n + team.size(); }));
  Mail mail{size};
  Party party{size};
};

std::shared_ptr<Team> make_team(Board& board, int rank) {
  TeamOptions options;
  options.topology = Topology(rank, board.workers, board.teams);
  options.wire = std::make_shared<MailWire>(board.mail, rank);
  options.rails.chunk = kChunk;
  options.rails.order = board.order;
  options.provider = Provider::local;
  options.all_gather = [&board, rank](const std::string& mine) { return board.party.all_gather(rank, mine); };
  options.interrupted = [] {};
  options.warn = [](const std::string&) {};
  return std::make_shared<Team>(std::move(options));
}

// --- what sums come to ---

// A team's partial sum, in sizes that make every order of additions round otherwise.
float partial(int team, std::int64_t element, int call) {
  const auto angle = static_cast<float>(element % 1009 + 31 * team + 7 * call);
  return std::sin(angle) * std::exp2(static_cast<float>((element + 3 * team) % 11 - 5));
}

double exact_sum(int teams, std::int64_t element, int call) {
  double sum = 0;
  for (int team = 0; team < teams; ++team) sum += partial(team, element, call);
  return sum;
}

float tree_sum(int teams, std::int64_t element, int call) {
  Numbers parts, scratch(64);
  for (int team = 0; team < teams; ++team) parts.push_back(partial(team, element, call));
  std::vector<const std::byte*> at;
  for (const float& part : parts) at.push_back(reinterpret_cast<const std::byte*>(&part));
  float sum = 0;
  add_tree(at, 1, &sum, scratch.data());
  return sum;
}

// As the stand-in adds, for an owner in this team.
float ring_sum(int owner_team, int teams, std::int64_t element, int call) {
  float sum = 0;
  for (int hop = 1; hop <= teams; ++hop) sum += partial((owner_team + hop) % teams, element, call);
  return sum;
}

// --- one rank's rails ---

class Rank {
 public:
  Rank(Board& board, int rank, Late late)
      : streams_(late),
        team_(make_team(board, rank)),
        storage_(std::make_shared<QueuedStorage>(streams_)),
        plan_(make_plan(std::vector<LayerSpec>{{"w", DType::f32, {kLength}, {1}, 0}}, team_->worker_count())),
        rails_(make_rails(board, rank)),
        weights_(storage_->allocate(static_cast<std::size_t>(bytes_of(kLength)))),
        means_(storage_->allocate(static_cast<std::size_t>(bytes_of(kLength)))),
        published_(2 * kLength) {}

  void step(int call) {
    call_ = call;
    std::fill(published_.begin(), published_.end(), NAN);
    rails_->reduce_and_gather({partials(), settling(), publication()}, arrays());
    storage_->finish();
    for_carried([this](int k, std::int64_t i) {
      check_sum(k, i, published_[std::size_t(kLength + i)]);
      CHECK(published_[std::size_t(i)] == 0.5f * published_[std::size_t(kLength + i)]);
    });
  }

  void only_reduce(int call) {
    call_ = call;
    rails_->reduce({partials(), settling(), {}});
    storage_->finish();
    for_carried([this](int k, std::int64_t i) {
      if (is_own(k)) check_sum(k, i, means()[i]);
    });
  }

  void gather_from(int team) {
    for_carried([this](int, std::int64_t i) { weights()[i] = partial(topology().team(), i, 9); });
    rails_->gather({{}, {}, publication()}, {arrays()[0]}, team);
    storage_->finish();
    for_carried([&](int, std::int64_t i) { CHECK(published_[std::size_t(i)] == partial(team, i, 9)); });
  }

  // Whether NCCL's order showed.
  bool differed() const { return differed_; }
  // Whether sums were taken, and were settled, while the wire still had something to do.
  bool overlapped() const { return summed_beside_ && settled_beside_; }

 private:
  std::unique_ptr<DeviceRails> make_rails(Board& board, int rank) {
    auto wire = std::make_unique<QueuedWire>(streams_, board.party.communicator(rank, topology().rail()));
    const DeviceRails::Site site{*team_, plan_, 0, [](const auto&, const auto&) {}, {}, storage_};
    if (board.order == Order::nccl) return std::make_unique<CollectiveRails>(site, std::move(wire));
    return std::make_unique<TreeRails>(site, std::make_shared<QueuedDevice>(streams_), std::move(wire));
  }

  const Topology& topology() const { return team_->topology(); }
  bool is_own(int k) const { return topology().owner(k) == topology().rank(); }
  float* weights() const { return reinterpret_cast<float*>(weights_.get()); }
  float* means() const { return reinterpret_cast<float*>(means_.get()); }

  template <class Visit>
  void for_carried(Visit visit) const {
    for (const int k : topology().carried(topology().rank()))
      for (std::int64_t i = segment(k).begin; i < std::min(segment(k).end, kLength); ++i) visit(k, i);
  }
  const Segment& segment(int k) const { return plan_.segments[static_cast<std::size_t>(k)]; }

  std::vector<DeviceRails::Array> arrays() const {
    return {[this](int k) { return weights() + segment(k).begin; },
            [this](int k) { return means() + segment(k).begin; }};
  }

  template <class Visit>
  void queue(const Slice& slice, Visit visit) {
    streams_.on_caller([=] {
      for (std::int64_t i = slice.begin; i < std::min(slice.end, kLength); ++i) visit(i, i - slice.begin);
    });
  }
  std::function<void(const Slice&, float*)> partials() {
    return [this](const Slice& slice, float* to) {
      summed_beside_ |= streams_.wire_is_late();
      queue(slice, [=, team = topology().team(), call = call_](std::int64_t i, std::int64_t place) {
        to[place] = partial(team, i, call);
      });
    };
  }
  std::function<void(const Slice&, const float*)> settling() {
    return [this](const Slice& slice, const float* total) {
      CHECK(is_own(slice.segment));
      settled_beside_ |= streams_.wire_is_late();
      queue(slice, [=, this](std::int64_t i, std::int64_t place) {
        means()[i] = total[place];
        weights()[i] = 0.5f * total[place];
      });
    };
  }
  std::function<void(const Slice&)> publication() {
    return [this](const Slice& slice) {
      queue(slice, [this](std::int64_t i, std::int64_t) {
        published_[std::size_t(i)] = weights()[i];
        published_[std::size_t(kLength + i)] = means()[i];
      });
    };
  }

  void check_sum(int k, std::int64_t i, float sum) {
    const int teams = topology().team_count();
    const float tree = tree_sum(teams, i, call_);
    const bool is_tree = team_->rails().order == Order::tree;
    CHECK(sum == (is_tree ? tree : ring_sum(topology().team_of(topology().owner(k)), teams, i, call_)));
    CHECK(std::abs(sum - exact_sum(teams, i, call_)) < 1e-4);
    differed_ |= sum != tree;
  }

  Streams streams_;
  std::shared_ptr<Team> team_;
  std::shared_ptr<QueuedStorage> storage_;
  Plan plan_;
  std::unique_ptr<DeviceRails> rails_;
  std::shared_ptr<std::byte> weights_, means_;
  Numbers published_;  // weights, then means
  int call_ = 0;
  bool differed_ = false, summed_beside_ = false, settled_beside_ = false;
};

const Teams kSingles = {{0}, {1}, {2}}, kPairs = {{0, 1}, {2, 3}}, kInTurns = {{0, 3}, {1, 2}},
            kUnequal = {{0, 1, 2}, {3}};

void check_rails(const Teams& teams, Order order, int workers, Late late) {
  Board board(teams, order, workers);
  board.party.run([&](int number) {
    Rank rank(board, number, late);
    for (int call = 0; call < 3; ++call) rank.step(call);
    rank.only_reduce(3);
    rank.gather_from(1);
    rank.step(4);
    CHECK(rank.differed() == (order == Order::nccl && teams.size() > 2));  // two terms have one sum
    CHECK(rank.overlapped() == (late == Late::wire));
  });
  CHECK(fake().alive() == 0);
}

void sums_have_the_order_of_the_tree_or_of_nccl_whichever_stream_is_late() {
  for (const Late late : {Late::caller, Late::wire}) {
    for (const Order order : {Order::tree, Order::nccl})
      for (const Teams& teams : {kSingles, kPairs, kInTurns})
        for (const int workers : {1, 2}) check_rails(teams, order, workers, late);
    check_rails(kUnequal, Order::tree, 1, late);
  }
}

// --- engines ---

// A host's device with the stand-in as its wire.
class ConnectedDevice final : public HostDevice {
 public:
  ConnectedDevice(Board& board, int rank) : board_(board), rank_(rank) {}
  std::unique_ptr<CollectiveWire> wire(Team& team) override {
    auto communicator = board_.party.communicator(rank_, team.topology().rail());
    return std::make_unique<QueuedWire>(streams_, std::move(communicator));
  }

 private:
  Board& board_;
  int rank_;
  Streams streams_{Late::wire};
};

struct Case {
  const char* rule;
  std::vector<double> hyper;
  const char* extrapolation;
  double max_norm = 0;
  bool maximize = false;
};

std::unique_ptr<Engine> make_engine(const std::shared_ptr<Team>& team, const Case& each,
                                    std::shared_ptr<Device> device) {
  const LayerSpec layer{"w", DType::f32, {kLength}, {1}, 0};
  EngineOptions options;
  options.rule = each.rule;
  options.extrapolation.name = each.extrapolation;
  options.groups = {GroupSpec{0, each.hyper, each.maximize}};
  options.version = "rails";
  return Engine::create(team, std::span(&layer, 1), options, std::move(device));
}

double gradient(int worker, std::int64_t element, int step) { return partial(worker, element, step) * 0.01f; }

// Master weights after three steps.
Numbers train(const std::shared_ptr<Team>& team, Engine& engine, const Case& each) {
  engine.adopt(0);
  auto hyper = each.hyper;
  hyper.push_back(0.05);
  const std::vector<std::uint8_t> present(static_cast<std::size_t>(team->workers_per_rank()), 1);
  for (int step = 0; step < 3; ++step) {
    for (int v = 0; v < team->workers_per_rank(); ++v) {
      auto* const at = reinterpret_cast<float*>(engine.gradients(v).get());
      for (std::int64_t i = 0; i < kLength; ++i)
        at[i] = static_cast<float>(gradient(team->first_worker() + v, i, step));
    }
    engine.step({.hyper = hyper, .present = present, .max_norm = each.max_norm});
  }
  Numbers w(kLength);
  engine.read(0, 0, 0, kLength, w.data());
  return w;
}

Numbers train(Board& board, int rank, const Case& each) {
  const auto team = make_team(board, rank);
  const auto device = std::make_shared<ConnectedDevice>(board, rank);
  const auto engine = make_engine(team, each, device);
  CHECK(engine->way() == std::string(board.order == Order::nccl ? "nccl" : "direct"));
  return train(team, *engine, each);
}

void check_training(const Teams& teams, int workers, const Case& each) {
  Board by_tree(teams, Order::tree, workers), by_nccl(teams, Order::nccl, workers);
  std::vector<Numbers> found(static_cast<std::size_t>(by_tree.size));
  by_nccl.party.run([&](int rank) {
    const Numbers tree = train(by_tree, rank, each);
    Numbers& nccl = found[static_cast<std::size_t>(rank)] = train(by_nccl, rank, each);
    for (std::size_t i = 0; i < nccl.size(); ++i) CHECK(std::abs(nccl[i] - tree[i]) < 1e-4);
    CHECK((nccl != tree) == (teams.size() > 2));
  });
  for (const Numbers& w : found) CHECK(w == found[0]);
}

void training_by_nccls_sums_is_that_by_trees_but_for_rounding() {
  const Case cases[] = {{"sgd", {0.1, 0.9, 0.0, 0.0}, "local"},
                        {"sgd", {0.1, 0.9, 0.0, 0.0}, "anisotropic", 0, true},
                        {"adam", {0.01, 0.9, 0.999, 1e-3, 0.0}, "anisotropic"},
                        {"sgd", {0.1, 0.9, 0.0, 0.0}, "global", 0.5}};
  for (const Case& each : cases) {
    check_training(kSingles, 2, each);
    check_training(kInTurns, 1, each);
  }
}

void training_by_nccls_sums_follows_the_formula() {
  const Case sgd{"sgd", {0.1, 0.9, 0.0, 0.0}, "none"};
  Board board(kSingles, Order::nccl, 1);
  board.party.run([&](int rank) {
    const Numbers found = train(board, rank, sgd);
    for (std::int64_t i = 0; i < kLength; ++i) {
      double w = 0, momentum = 0;
      for (int step = 0; step < 3; ++step) {
        const double mean = (gradient(0, i, step) + gradient(1, i, step) + gradient(2, i, step)) / 3;
        momentum = 0.9 * momentum + mean;
        w -= 0.1 * momentum;
      }
      CHECK(std::abs(found[static_cast<std::size_t>(i)] - w) < 1e-6);
    }
  });
}

// --- refusals, on all ranks ---

void expect_refusal(const Teams& teams, const std::string& words,
                    const std::function<std::shared_ptr<Device>(Board&, int)>& device_of) {
  Board board(teams, Order::nccl, 1);
  board.party.run([&](int rank) {
    const auto team = make_team(board, rank);
    const std::string text = thrown<UsageError>(
        [&] { make_engine(team, {"sgd", {0.1, 0.9, 0.0, 0.0}, "none"}, device_of(board, rank)); });
    CHECK(text.find(words) != std::string::npos);
  });
}

void what_nccl_cannot_sum_is_refused() {
  const auto connected = [](Board& board, int rank) {
    return std::make_shared<ConnectedDevice>(board, rank);
  };
  expect_refusal(kUnequal, "takes teams of one size", connected);
  expect_refusal(kPairs, "is for parameters on GPUs", [](Board&, int) { return nullptr; });
  expect_refusal(kPairs, "takes NCCL between the ranks",
                 [](Board&, int) { return std::make_shared<HostDevice>(); });
}

}  // namespace

int main() {
  sums_have_the_order_of_the_tree_or_of_nccl_whichever_stream_is_late();
  training_by_nccls_sums_is_that_by_trees_but_for_rounding();
  training_by_nccls_sums_follows_the_formula();
  what_nccl_cannot_sum_is_refused();
}
