#include <sys/wait.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstring>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "check.hpp"
#include "core/error.hpp"
#include "cuda/device.hpp"
#include "cuda/exported.hpp"
#include "engine/engine.hpp"
#include "fake_cuda/fake_cuda.hpp"
#include "ranks.hpp"

// The part for GPUs on a stand-in for CUDA's runtime. Ranks are processes, which open each other's memory and
// events by handles, or threads of one process. What a stream has been given runs later, on a thread of its
// own.

using namespace xc;
using namespace std::chrono_literals;

namespace {

constexpr std::int64_t kLengths[] = {3000, 7, 1025};
constexpr const char* kSyncs[] = {"event", "spin", "memop"};

// ---- ranks ----

using TeamOf = std::function<std::shared_ptr<Team>(int workers)>;
using Body = std::function<void(int rank, const TeamOf& team)>;

const Limits kShort{Seconds(20), Seconds(0.4), Seconds(60)};
const Limits kLong{Seconds(60), Seconds(30), Seconds(60)};

// Nothing is left of what this rank made, once all have let go.
void require_nothing_left(Team& team) {
  {
    const Export look(team);
  }
  if (fake_cuda::left() == 0) return;
  std::fprintf(stderr, "rank %d left %s\n", team.rank(), fake_cuda::what_is_left().c_str());
  std::exit(1);
}

std::string doing;  // for messages

void in_processes(int size, const Body& body, const Limits& limits = kLong) {
  const Ranks ranks(size);
  const auto states = ranks.run([&](int rank) {
    alarm(30);
    const auto team_of = [&](int workers) {
      TeamOptions options = ranks.options(rank, workers);
      options.limits = limits;
      return std::make_shared<Team>(options);
    };
    body(rank, team_of);
    require_nothing_left(*team_of(1));
  });
  for (int rank = 0; rank < size; ++rank)
    if (const int state = states[static_cast<std::size_t>(rank)]; state != 0) {
      std::fprintf(stderr, "rank %d ended with %d: %s\n", rank, state, doing.c_str());
      std::exit(1);
    }
}

void in_threads(int size, const Body& body) {
  std::barrier<> barrier(size);
  std::vector<std::string> texts(static_cast<std::size_t>(size));
  const auto options_of = [&](int rank, int workers) {
    TeamOptions options;
    options.topology = Topology::one_team(rank, size, workers);
    options.provider = Provider::local;
    options.limits = kLong;
    options.interrupted = [] {};
    options.warn = [](const std::string&) {};
    options.all_gather = [&, rank](const std::string& mine) {
      texts[static_cast<std::size_t>(rank)] = mine;
      barrier.arrive_and_wait();
      std::vector<std::string> all = texts;
      barrier.arrive_and_wait();
      return all;
    };
    return options;
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      const auto team_of = [&](int workers) { return std::make_shared<Team>(options_of(rank, workers)); };
      body(rank, team_of);
      const auto last = team_of(1);
      {
        const Export look(*last);
      }
      barrier.arrive_and_wait();
    });
  for (std::thread& thread : threads) thread.join();
  if (fake_cuda::left() != 0) std::fprintf(stderr, "left: %s\n", fake_cuda::what_is_left().c_str());
  CHECK(fake_cuda::left() == 0);
}

cudaStream_t own_stream() {
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
  return stream;
}

std::shared_ptr<Device> gpu(cudaStream_t stream, int index = 0) {
  const auto device = make_cuda_device(index);
  device->use(stream);
  return device;
}

void order_by(const char* sync) { setenv("XC_GPU_SYNC", sync, 1); }

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "\"%s\" lacks \"%s\"\n", text.c_str(), part.c_str());
  return false;
}

// ---- training ----

struct Case {
  const char* rule;
  std::vector<double> hyper;
  const char* extrapolation = "local";
  double max_norm = 0;
  unsigned flags = 0;
  bool maximize = false;
};

constexpr unsigned kAmsgrad = 2;  // among the flags of "adam"

const Case kSgd{"sgd", {0.1, 0.9, 0.0, 1e-3}};
const Case kClipped{"sgd", {0.1, 0.0, 0.0, 0.0}, "global", 0.5};
const Case kAdam{"adam", {0.01, 0.9, 0.999, 1e-8, 1e-2}, "anisotropic"};
const Case kLars{"lars", {0.1, 0.9, 1e-3, 1e-3, 1e-8, 1.0, 1.0, 0.0}};

std::vector<LayerSpec> layers() {
  std::vector<LayerSpec> specs;
  const DType types[] = {DType::f32, DType::bf16, DType::f16};
  for (int i = 0; i < 3; ++i) specs.push_back({std::to_string(i), types[i], {kLengths[i]}, {1}, 0});
  return specs;
}

std::unique_ptr<Engine> make_engine(const std::shared_ptr<Team>& team, const Case& each,
                                    const std::shared_ptr<Device>& device) {
  EngineOptions options;
  options.rule = each.rule;
  options.extrapolation.name = each.extrapolation;
  options.groups = {GroupSpec{each.flags, each.hyper, each.maximize}};
  options.version = "cuda";
  return Engine::create(team, layers(), options, device);
}

// Values of all layers, as they lie in an engine's memory.
std::vector<std::byte> values(const Plan& plan, int seed) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(plan.bytes));
  for (const Layer& layer : plan.layers)
    for (std::int64_t i = 0; i < layer.count; ++i) {
      const float value = 0.1f * std::sin(static_cast<float>(i + 17 * seed));
      std::byte* const to = bytes.data() + layer.byte_begin + i * size_of(layer.spec.dtype);
      const Bf16 shorter = narrow<Bf16>(value);
      const F16 half = narrow<F16>(value);
      if (layer.spec.dtype == DType::f32) std::memcpy(to, &value, sizeof value);
      if (layer.spec.dtype == DType::bf16) std::memcpy(to, &shorter, sizeof shorter);
      if (layer.spec.dtype == DType::f16) std::memcpy(to, &half, sizeof half);
    }
  return bytes;
}

// Queued on the device's stream, or done at once on the host.
void copy(const Engine& engine, std::byte* to, const std::byte* from, std::size_t bytes) {
  if (!engine.device()) {
    std::memcpy(to, from, bytes);
    return;
  }
  const auto stream = static_cast<cudaStream_t>(engine.device()->stream());
  if (cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream) != cudaSuccess)
    throw DeviceError("the test's own copying");
}

void fill(const Engine& engine, std::byte* at, int seed) {
  const std::vector<std::byte> bytes = values(engine.plan(), seed);
  copy(engine, at, bytes.data(), bytes.size());
}

void step(Engine& engine, const Case& each, int number, double lr) {
  const int workers = engine.team().workers_per_rank();
  const std::vector<std::uint8_t> present(std::size(kLengths) * static_cast<std::size_t>(workers), 1);
  auto hyper = each.hyper;
  hyper[0] = lr;
  hyper.push_back(0.05);
  for (int v = 0; v < workers; ++v)
    fill(engine, engine.gradients(v).get(), engine.team().first_worker() + v + 2 + 100 * number);
  engine.step({.hyper = hyper, .present = present, .max_norm = each.max_norm});
}

std::vector<float> numbers_of(const Engine& engine, std::size_t layer, int slot) {
  std::vector<float> numbers(static_cast<std::size_t>(kLengths[layer]));
  engine.read(layer, slot, 0, kLengths[layer], numbers.data());
  return numbers;
}

// Every own worker's weights, w and the slots that this rank may read.
std::vector<std::byte> left_of(const Engine& engine) {
  std::vector<std::byte> left;
  const auto bytes = static_cast<std::size_t>(engine.plan().bytes);
  for (int v = 0; v < engine.team().workers_per_rank(); ++v) {
    left.resize(left.size() + bytes);
    copy(engine, left.data() + left.size() - bytes, engine.weights(v).get(), bytes);
  }
  for (std::size_t layer = 0; layer < std::size(kLengths); ++layer)
    for (int slot = 0; slot <= engine.slots(); ++slot) {
      const std::vector<float> numbers = numbers_of(engine, layer, slot);
      const auto* at = reinterpret_cast<const std::byte*>(numbers.data());
      left.insert(left.end(), at, at + numbers.size() * sizeof(float));
    }
  return left;
}

// All that is left after some steps.
std::vector<std::byte> train(const std::shared_ptr<Team>& team, const Case& each,
                             const std::shared_ptr<Device>& device, int steps = 3) {
  const auto engine = make_engine(team, each, device);
  fill(*engine, engine->weights(0).get(), 1);
  engine->adopt(0);
  for (int i = 0; i < steps; ++i) step(*engine, each, i, each.hyper[0]);
  auto left = left_of(*engine);
  engine->close();
  return left;
}

// ---- bits ----

void a_gpu_gives_the_bits_of_the_cpu() {
  const Case cases[] = {kSgd,
                        kAdam,
                        kClipped,
                        kLars,
                        {"sgd", {0.1, 0.9, 0.0, 0.0}, "gaussian"},
                        {"clars", {0.1, 0.9, 1e-3, 1e-3, 1e-8, 1.0, 1.0, 0.0}},
                        {"lamb", {0.01, 0.9, 0.999, 1e-6, 0.01, 1.0, 1.0}},
                        {"lans", {0.01, 0.9, 0.999, 1e-6, 0.01, 1.0}, "uniform"},
                        {"adam", {0.01, 0.9, 0.999, 1e-8, 1e-2}, "local", 0.5, kAmsgrad, true},
                        {"sgd", {0.1, 0.9, 0.0, 1e-3}, "anisotropic", 0, 0, true}};
  in_processes(1, [&](int, const TeamOf& team) {
    for (const Case& each : cases)
      for (const int workers : {1, 3, 4, 9}) {
        const auto expected = train(team(workers), each, nullptr);
        CHECK(train(team(workers), each, gpu(own_stream())) == expected);
      }
    CHECK(train(team(2), kSgd, gpu(nullptr)) == train(team(2), kSgd, nullptr));
  });
}

void in(bool threads, int size, const Body& body) {
  if (threads)
    in_threads(size, body);
  else
    in_processes(size, body);
}

// One rank's GPU is late with everything, each in turn, so that whoever does not wait reads what is not
// there.
void ranks_have_the_bits_of_the_cpu_whoever_is_late(bool threads) {
  for (const int size : {2, 3})
    for (const char* sync : kSyncs) {
      order_by(sync);
      in(threads, size, [](int rank, const TeamOf& team) {
        const cudaStream_t stream = own_stream();
        for (const Case& each : {kSgd, kClipped, kAdam, kLars}) {
          const auto expected = train(team(2), each, nullptr);
          for (int late = 0; late <= 1; ++late) {
            fake_cuda::delay(stream, rank == late ? 1ms : 0ms);
            CHECK(train(team(2), each, gpu(stream)) == expected);
          }
        }
      });
    }
}

// Sums and weights go by way of the host's memory.
void teams_have_the_bits_of_the_cpu() {
  setenv("XC_GPU_WIRE", "mpi", 1);
  for (const char* sync : kSyncs) {
    order_by(sync);
    const Ranks ranks(4, {{0, 1}, {2, 3}});
    ranks.run_well([&](int rank) {
      alarm(30);
      for (const Case& each : {kSgd, kLars}) {
        const auto run = [&](const std::shared_ptr<Device>& device) {
          const auto team = std::make_shared<Team>(ranks.options(rank));
          const auto engine = make_engine(team, each, device);
          fill(*engine, engine->weights(0).get(), 1);
          engine->adopt(0);
          for (int i = 0; i < 3; ++i) step(*engine, each, i, 0.1);
          engine->collect_state(std::nullopt);
          return left_of(*engine);
        };
        const cudaStream_t stream = own_stream();
        if (rank == 2) fake_cuda::delay(stream, 1ms);
        const auto expected = run(nullptr);
        CHECK(run(gpu(stream)) == expected);
      }
    });
  }
}

// Each rank has its engine on a GPU that is not the current one, which stays what it was.
void ranks_work_on_gpus_of_their_own() {
  for (const char* sync : kSyncs) {
    order_by(sync);
    in_processes(2, [](int rank, const TeamOf& team) {
      fake_cuda::set_devices(3);
      const int mine = rank + 1;
      cudaSetDevice(mine);
      const cudaStream_t stream = own_stream();
      const auto expected = train(team(1), kSgd, nullptr);
      CHECK(train(team(1), kSgd, gpu(stream, mine)) == expected);
      const auto engine = make_engine(team(1), kSgd, gpu(stream, mine));
      cudaSetDevice(0);
      engine->adopt(0);
      std::vector<float> w = numbers_of(*engine, 0, 0);
      engine->close();
      int current = -1;
      cudaGetDevice(&current);
      CHECK(current == 0);
    });
  }
}

// The null stream, on which memory is cleared, is late, and the streams in use do not wait for it.
void memory_is_clear_before_anybody_uses_it() {
  for (const char* sync : kSyncs) {
    order_by(sync);
    in_processes(2, [](int rank, const TeamOf& team) {
      if (rank == 1) fake_cuda::delay(nullptr, 20ms);
      const auto expected = train(team(1), kLars, nullptr);
      CHECK(train(team(1), kLars, gpu(own_stream())) == expected);
    });
  }
}

void gradients_that_lie_elsewhere_are_collected() {
  order_by("event");
  in_processes(1, [](int, const TeamOf& team) {
    const auto engine = make_engine(team(1), kSgd, gpu(own_stream()));
    const auto bytes = static_cast<std::size_t>(engine->plan().bytes);
    void* elsewhere = nullptr;
    CHECK(cudaMalloc(&elsewhere, bytes) == cudaSuccess);
    fill(*engine, static_cast<std::byte*>(elsewhere), 5);
    std::vector<Engine::Source> sources;
    for (const Layer& layer : engine->plan().layers)
      sources.push_back({static_cast<const std::byte*>(elsewhere) + layer.byte_begin,
                         layer.count * size_of(layer.spec.dtype)});
    std::vector<std::uint8_t> present(sources.size());
    engine->gather(0, sources, present);
    std::vector<std::byte> seen(bytes);
    copy(*engine, seen.data(), engine->gradients(0).get(), bytes);
    const std::vector<std::byte> wanted = values(engine->plan(), 5);
    for (const Layer& layer : engine->plan().layers)
      CHECK(std::memcmp(seen.data() + layer.byte_begin, wanted.data() + layer.byte_begin,
                        std::size_t(layer.count * size_of(layer.spec.dtype))) == 0);
    engine->close();
    cudaFree(elsewhere);
  });
}

// Copies from pinned memory read it when they run.
void what_is_loaded_may_be_overwritten_on_return() {
  order_by("event");
  in_processes(2, [](int, const TeamOf& team) {
    const cudaStream_t stream = own_stream();
    const auto engine = make_engine(team(1), kSgd, gpu(stream));
    void* at = nullptr;
    const auto bytes = static_cast<std::size_t>(kLengths[0]) * sizeof(float);
    CHECK(cudaHostAlloc(&at, bytes, cudaHostAllocMapped) == cudaSuccess);
    auto* const w = static_cast<float*>(at);
    std::fill_n(w, kLengths[0], 3.0f);
    fake_cuda::delay(stream, 5ms);
    const Engine::Saved saved[] = {{w, {}, 0}, {nullptr, {}, 0}, {nullptr, {}, 0}};
    engine->load(saved, 1);
    std::fill_n(w, kLengths[0], 4.0f);
    for (const float value : numbers_of(*engine, 0, 0)) CHECK(value == 3.0f);
    engine->close();
    cudaFreeHost(at);
  });
}

// ---- ends ----

// What others have open stays when a rank's engine ends before theirs; the stand-in looks at that.
void an_engine_may_end_at_each_rank_when_it_likes(bool threads) {
  for (const char* sync : kSyncs) {
    order_by(sync);
    in(threads, 3, [](int rank, const TeamOf& team) {
      const auto all = team(1);
      auto engine = make_engine(all, kSgd, gpu(own_stream()));
      engine->adopt(0);
      step(*engine, kSgd, 0, 0.1);
      std::this_thread::sleep_for(rank * 30ms);
      if (rank == 2) numbers_of(*engine, 0, 0);
      if (rank != 1) engine->close();
      engine.reset();
    });
  }
}

// Memory that only waited for others to close it is there for the next engine.
void the_next_engine_finds_the_memory_of_the_last() {
  order_by("event");
  in_processes(2, [](int, const TeamOf& team) {
    const auto all = team(1);
    int first = 0;
    for (int i = 0; i < 3; ++i) {
      const auto engine = make_engine(all, kSgd, gpu(nullptr));
      if (i == 0) first = fake_cuda::left();
      CHECK(fake_cuda::left() == first);
    }
  });
}

// ---- ranks that do not come ----

template <class Call>
void require_late(int rank, Call call) {
  const auto since = std::chrono::steady_clock::now();
  try {
    call();
  } catch (const PeerError& error) {
    CHECK(error.rank == rank && error.kind == "late");
    CHECK(std::chrono::steady_clock::now() - since < 10s);
    return;
  }
  CHECK(!"a PeerError");
}

// Work that takes so long is queued.
void be_busy(const Engine& engine, std::chrono::milliseconds time) {
  const auto stream = static_cast<cudaStream_t>(engine.device()->stream());
  fake_cuda::delay(stream, time);
  fill(engine, engine.gradients(0).get(), 0);
  fake_cuda::delay(stream, 0ms);
}

void a_gpu_that_is_late_is_an_error_within_the_deadline() {
  for (const char* sync : {"spin", "memop"}) {
    order_by(sync);
    in_processes(
        3,
        [](int rank, const TeamOf& team) {
          const auto engine = make_engine(team(1), kSgd, gpu(own_stream()));
          engine->adopt(0);
          step(*engine, kSgd, 0, 0.1);
          numbers_of(*engine, 0, 0);
          if (rank == 1) be_busy(*engine, 2s);
          step(*engine, kSgd, 1, 0.1);
          if (rank == 1) return;
          require_late(1, [&] { numbers_of(*engine, 0, 0); });
          require_late(1, [&] { step(*engine, kSgd, 2, 0.1); });
          require_late(1, [&] { numbers_of(*engine, 0, 0); });
        },
        kShort);
  }
}

// Its process ends with work queued, and the others' streams wait for it.
void a_rank_that_dies_is_an_error_within_the_deadline() {
  for (const char* sync : {"spin", "memop"}) {
    order_by(sync);
    const Ranks ranks(3);
    const auto states = ranks.run([&](int rank) {
      alarm(30);
      TeamOptions options = ranks.options(rank);
      options.limits = kShort;
      const auto engine = make_engine(std::make_shared<Team>(options), kSgd, gpu(own_stream()));
      engine->adopt(0);
      if (rank == 1) be_busy(*engine, 60s);
      step(*engine, kSgd, 0, 0.1);
      if (rank == 1) _exit(7);
      require_late(1, [&] { numbers_of(*engine, 0, 0); });
    });
    for (int rank = 0; rank < 3; ++rank) {
      const int state = states[static_cast<std::size_t>(rank)];
      CHECK(WIFEXITED(state) && WEXITSTATUS(state) == (rank == 1 ? 7 : 0));
    }
  }
}

void a_driver_without_memory_operations_is_refused_on_all_ranks() {
  order_by("memop");
  in_processes(3, [](int rank, const TeamOf& team) {
    if (rank == 1) fake_cuda::set_memory_operations(false);
    const std::string text = thrown<DeviceError>([&] { make_engine(team(1), kSgd, gpu(nullptr)); });
    CHECK(has(text, "rank 1: the driver has no cuStreamWriteValue32; take XC_GPU_SYNC=event"));
    fake_cuda::set_memory_operations(true);
    if (rank == 2) fake_cuda::fail("cuStreamWaitValue32", 1, cudaErrorNotSupported);
    const std::string other = thrown<DeviceError>([&] { make_engine(team(1), kSgd, gpu(nullptr)); });
    CHECK(has(other, "rank 2: letting a stream await a word: the driver's error 801"));
  });
}

void choices_are_agreed_on() {
  in_processes(2, [](int rank, const TeamOf& team) {
    order_by(rank == 0 ? "event" : "spin");
    CHECK(has(thrown<MismatchError>([&] { make_engine(team(1), kSgd, gpu(nullptr)); }), "XC_GPU_SYNC"));
    order_by(rank == 0 ? "event" : "sleep");
    CHECK(has(thrown<UsageError>([&] { make_engine(team(1), kSgd, gpu(nullptr)); }),
              "rank 1: XC_GPU_SYNC cannot be sleep"));
  });
}

// ---- failures ----

enum class End { well, device_error, peer_error };

// What becomes of a short life of an engine.
End live(const std::shared_ptr<Team>& team, const std::shared_ptr<Device>& device, bool& is_made) {
  try {
    const auto engine = make_engine(team, kClipped, device);
    is_made = true;
    engine->adopt(0);
    step(*engine, kClipped, 0, 0.1);
    numbers_of(*engine, 0, 0);
    engine->close();
    return End::well;
  } catch (const DeviceError&) {
    return End::device_error;
  } catch (const PeerError&) {
    return End::peer_error;
  }
}

struct Told {
  char calls[4096];
};

// Rank 1's calls of each function, in one life in which all goes well.
std::map<std::string, int> calls_of_a_life() {
  void* const at = mmap(nullptr, sizeof(Told), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto* const told = static_cast<Told*>(at);
  in_processes(2, [told](int rank, const TeamOf& team) {
    const auto device = gpu(own_stream());
    const auto all = team(1);
    fake_cuda::fail_nothing();
    bool is_made = false;
    CHECK(live(all, device, is_made) == End::well);
    std::string text;
    for (const auto& [function, n] : fake_cuda::calls()) text += function + " " + std::to_string(n) + " ";
    CHECK(text.size() < sizeof told->calls);
    if (rank == 1) std::strcpy(told->calls, text.c_str());
  });
  std::map<std::string, int> calls;
  std::istringstream stream(told->calls);
  std::string function;
  for (int n = 0; stream >> function >> n;) calls[function] = n;
  munmap(at, sizeof(Told));
  return calls;
}

// A failure is a DeviceError where it happens, and on all ranks while the engine is made; afterwards the
// others learn that a rank gave up. Nobody waits beyond the deadline, and nothing is left.
void fail_in_a_life(const std::string& function, int n) {
  in_processes(
      2,
      [&](int rank, const TeamOf& team) {
        const auto device = gpu(own_stream());
        const auto all = team(1);
        bool is_made = false;
        fake_cuda::fail_nothing();
        if (rank == 1) fake_cuda::fail(function, n, cudaErrorUnknown);
        const End end = live(all, device, is_made);
        all->leave();
        if (is_made && end == End::well && (fake_cuda::only_ends(function) || function == "cudaGetDevice"))
          return;
        if (rank == 1 || !is_made) CHECK(end == End::device_error);
        if (rank == 0 && is_made) CHECK(end != End::device_error);
      },
      Limits{Seconds(10), Seconds(2), Seconds(60)});
}

void every_failing_call_is_an_error_and_never_a_hang() {
  for (const char* sync : kSyncs) {
    order_by(sync);
    for (const auto& [function, count] : calls_of_a_life())
      for (const int n : std::set<int>{1, 2, count / 3, count / 2, count - 1, count}) {
        if (n < 1 || n > count) continue;
        doing = std::string(sync) + ": " + function + " fails, call " + std::to_string(n);
        fail_in_a_life(function, n);
      }
  }
}

// CUDA's last error is the next caller's business only if it is its own.
void a_failure_leaves_no_error_behind() {
  order_by("event");
  in_processes(1, [](int, const TeamOf& team) {
    fake_cuda::fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
    CHECK(has(thrown<DeviceError>([&] { make_engine(team(1), kSgd, gpu(nullptr)); }),
              "cudaErrorMemoryAllocation"));
    CHECK(cudaGetLastError() == cudaSuccess);
  });
}

// ---- captures ----

std::vector<std::byte> train_captured(const TeamOf& team, const Case& each) {
  const cudaStream_t stream = own_stream();
  const auto engine = make_engine(team(1), each, gpu(stream));
  fill(*engine, engine->weights(0).get(), 1);
  engine->adopt(0);
  step(*engine, each, 0, each.hyper[0]);
  const std::vector<std::uint8_t> present(std::size(kLengths), 1);
  auto hyper = each.hyper;
  hyper.push_back(0.05);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  engine->step({.hyper = hyper, .present = present, .max_norm = each.max_norm});
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  CHECK(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess);
  for (int i = 1; i < 5; ++i) {
    hyper[0] = each.hyper[0] / i;
    fill(*engine, engine->gradients(0).get(), 2 + 100 * i);
    engine->prepare_replay({.hyper = hyper, .present = present, .max_norm = each.max_norm});
    CHECK(cudaGraphLaunch(replay, stream) == cudaSuccess);
  }
  auto left = left_of(*engine);
  CHECK(engine->steps() == 5);
  engine->close();
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return left;
}

// The numbers of a replay are those that it was given, not those that were captured.
void a_captured_step_is_replayed_with_new_numbers() {
  order_by("event");
  in_processes(1, [](int, const TeamOf& team) {
    for (const Case& each : {kAdam, kClipped}) {
      const auto engine = make_engine(team(1), each, gpu(own_stream()));
      fill(*engine, engine->weights(0).get(), 1);
      engine->adopt(0);
      for (int i = 0; i < 5; ++i) step(*engine, each, i, each.hyper[0] / std::max(i, 1));
      CHECK(train_captured(team, each) == left_of(*engine));
      engine->close();
    }
  });
}

// What a thread sanitizer can watch; it does not take to processes.
void with_threads() {
  ranks_have_the_bits_of_the_cpu_whoever_is_late(true);
  an_engine_may_end_at_each_rank_when_it_likes(true);
}

void with_processes() {
  a_gpu_gives_the_bits_of_the_cpu();
  ranks_have_the_bits_of_the_cpu_whoever_is_late(false);
  teams_have_the_bits_of_the_cpu();
  ranks_work_on_gpus_of_their_own();
  memory_is_clear_before_anybody_uses_it();
  gradients_that_lie_elsewhere_are_collected();
  what_is_loaded_may_be_overwritten_on_return();
  an_engine_may_end_at_each_rank_when_it_likes(false);
  the_next_engine_finds_the_memory_of_the_last();
  a_gpu_that_is_late_is_an_error_within_the_deadline();
  a_rank_that_dies_is_an_error_within_the_deadline();
  a_driver_without_memory_operations_is_refused_on_all_ranks();
  choices_are_agreed_on();
  every_failing_call_is_an_error_and_never_a_hang();
  a_failure_leaves_no_error_behind();
  a_captured_step_is_replayed_with_new_numbers();
}

}  // namespace

int main(int count, char** words) {
  const std::string with = count > 1 ? words[1] : "";
  if (with == "threads") with_threads();
  if (with == "processes") with_processes();
}
