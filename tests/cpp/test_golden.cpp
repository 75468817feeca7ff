#include <cstring>

#include "check.hpp"
#include "core/hash.hpp"
#include "engine/engine.hpp"
#include "ranks.hpp"
#include "stages/tables.hpp"

// A hundred steps from fixed numbers, and the random numbers, must give fixed bits: on every processor, and
// from a build with and without the clones of the tile loops.

using namespace xc;

namespace {

constexpr std::int64_t kLength = 3001;
constexpr int kWorkers = 3;

// Numbers in [-0.5, 0.5) from integer arithmetic alone.
float noise(std::uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<std::int32_t>(state >> 40) - (1 << 23)) * 0x1p-24f;
}

std::uint64_t hash_after_100_steps(const std::string& rule, const std::string& extrapolation, DType dtype,
                                   std::vector<double> hyper) {
  const Ranks alone(1);
  const LayerSpec layer{"w", dtype, {kLength}, {1}, 0};
  const GroupSpec group{rule == "sgd" ? 1u : 0u, hyper};
  const auto engine = Engine::create(
      std::make_shared<Team>(alone.options(0, kWorkers)), std::span(&layer, 1),
      {.rule = rule, .extrapolation = {extrapolation}, .groups = {group}, .tile = 1000, .version = "golden"});
  engine->adopt(0);
  hyper.push_back(0.02);
  std::uint64_t state = 1;
  const std::vector<std::uint8_t> present(kWorkers, 1);
  const auto size = static_cast<std::size_t>(kLength * size_of(dtype));
  for (int step = 0; step < 100; ++step) {
    for (int v = 0; v < kWorkers; ++v)
      for (std::int64_t i = 0; i < kLength; ++i) {
        std::byte* const at = engine->gradients(v).get() + i * size_of(dtype);
        const float value = noise(state);
        if (dtype == DType::f32) std::memcpy(at, &value, sizeof value);
        if (dtype == DType::bf16) *reinterpret_cast<Bf16*>(at) = narrow<Bf16>(value);
        if (dtype == DType::f16) *reinterpret_cast<F16*>(at) = narrow<F16>(value);
      }
    engine->step({hyper, present});
  }
  std::vector<float> w(kLength);
  engine->read(0, 0, 0, kLength, w.data());
  std::uint64_t hash = hash_of({reinterpret_cast<const char*>(w.data()), w.size() * sizeof(float)});
  for (int v = 0; v < kWorkers; ++v)
    hash = hash_of({reinterpret_cast<const char*>(engine->weights(v).get()), size}, hash);
  return hash;
}

std::uint64_t hash_of_noise(Noise kind) {
  std::vector<float> numbers(100'003);
  make_noise(kind, {0x0123456789abcdefu, 7, 5}, (std::int64_t{1} << 34) - 50'001, 100'003, numbers.data());
  return hash_of({reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(float)});
}

void check_golden(std::uint64_t hash, std::uint64_t golden) {
  if (hash != golden) std::fprintf(stderr, "hash is 0x%016lx\n", static_cast<unsigned long>(hash));
  CHECK(hash == golden);
}

}  // namespace

int main() {
  check_golden(hash_after_100_steps("sgd", "local", DType::f32, {0.1, 0.9, 0.0, 1e-4}), 0x417e0c86674467b7);
  check_golden(hash_after_100_steps("sgd", "global", DType::bf16, {0.1, 0.9, 0.0, 1e-4}), 0x93636c124f03e714);
  check_golden(hash_after_100_steps("adam", "none", DType::f16, {0.01, 0.9, 0.999, 1e-8, 1e-2}),
               0x0efb9dda5d1cd891);
  check_golden(hash_of_noise(Noise::uniform), 0x2f6689ca95fc565a);
  check_golden(hash_of_noise(Noise::gaussian), 0xa9ce6aa876e6b648);
}
