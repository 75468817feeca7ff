#include <cmath>
#include <cstring>
#include <string>

#include "check.hpp"
#include "core/error.hpp"
#include "device/host.hpp"
#include "engine/engine.hpp"
#include "ranks.hpp"

// The kernels of devices, run by the host, against its own loops: the same bits, and sanitizers look on.

using namespace xc;

namespace {

constexpr std::int64_t kLengths[] = {3000, 7, 1025};

struct Case {
  const char* rule;
  std::vector<double> hyper;
  const char* extrapolation = "local";
  double max_norm = 0;
  unsigned flags = 0;
  bool maximize = false;
};

constexpr unsigned kAmsgrad = 2;  // among the flags of "adam"

std::vector<LayerSpec> layers() {
  std::vector<LayerSpec> specs;
  const DType types[] = {DType::f32, DType::bf16, DType::f16};
  for (int i = 0; i < 3; ++i) specs.push_back({std::to_string(i), types[i], {kLengths[i]}, {1}, 0});
  return specs;
}

EngineOptions options_of(const Case& each) {
  return {.rule = each.rule,
          .extrapolation = {each.extrapolation},
          .groups = {GroupSpec{each.flags, each.hyper, each.maximize}},
          .version = "device"};
}

// Any pattern of bits that is no NaN will do for weights and gradients, if it is not large.
void fill(std::byte* at, const Plan& plan, int seed) {
  for (const Layer& layer : plan.layers)
    for (std::int64_t i = 0; i < layer.count; ++i) {
      const float value = 0.1f * std::sin(static_cast<float>(i + 17 * seed));
      std::byte* const to = at + layer.byte_begin + i * size_of(layer.spec.dtype);
      const Bf16 shorter = narrow<Bf16>(value);
      const F16 half = narrow<F16>(value);
      if (layer.spec.dtype == DType::f32) std::memcpy(to, &value, sizeof value);
      if (layer.spec.dtype == DType::bf16) std::memcpy(to, &shorter, sizeof shorter);
      if (layer.spec.dtype == DType::f16) std::memcpy(to, &half, sizeof half);
    }
}

// All that is left after three steps: every own worker's weights, w and the slots.
std::vector<std::byte> train(const Ranks& ranks, int rank, int workers, const Case& each,
                             const std::shared_ptr<Device>& device) {
  const auto team = std::make_shared<Team>(ranks.options(rank, workers));
  const auto engine = Engine::create(team, layers(), options_of(each), device);
  fill(engine->weights(0).get(), engine->plan(), 1);
  engine->adopt(0);
  const std::vector<std::uint8_t> present(std::size(kLengths) * static_cast<std::size_t>(workers), 1);
  auto hyper = each.hyper;
  hyper.push_back(0.05);
  for (int step = 0; step < 3; ++step) {
    for (int v = 0; v < workers; ++v)
      fill(engine->gradients(v).get(), engine->plan(), team->first_worker() + v + 2 + 100 * step);
    engine->step({.hyper = hyper, .present = present, .max_norm = each.max_norm});
  }
  std::vector<std::byte> left;
  for (int v = 0; v < workers; ++v)
    left.insert(left.end(), engine->weights(v).get(), engine->weights(v).get() + engine->plan().bytes);
  for (std::size_t layer = 0; layer < std::size(kLengths); ++layer)
    for (int slot = 0; slot <= engine->slots(); ++slot) {
      std::vector<float> numbers(static_cast<std::size_t>(kLengths[layer]));
      engine->read(layer, slot, 0, kLengths[layer], numbers.data());
      const auto* bytes = reinterpret_cast<const std::byte*>(numbers.data());
      left.insert(left.end(), bytes, bytes + numbers.size() * sizeof(float));
    }
  return left;
}

void a_device_gives_the_bits_of_the_cpu() {
  const Case cases[] = {{"sgd", {0.1, 0.9, 0.0, 1e-3}},
                        {"adam", {0.01, 0.9, 0.999, 1e-8, 1e-2}, "anisotropic"},
                        {"sgd", {0.1, 0.9, 0.0, 0.0}, "gaussian"},
                        {"sgd", {0.1, 0.0, 0.0, 0.0}, "global", 0.5},
                        {"lars", {0.1, 0.9, 1e-3, 1e-3, 1e-8, 1.0, 1.0, 0.0}},
                        {"clars", {0.1, 0.9, 1e-3, 1e-3, 1e-8, 1.0, 1.0, 0.0}},
                        {"lamb", {0.01, 0.9, 0.999, 1e-6, 0.01, 1.0, 1.0}},
                        {"lans", {0.01, 0.9, 0.999, 1e-6, 0.01, 1.0}, "uniform"},
                        {"adam", {0.01, 0.9, 0.999, 1e-8, 1e-2}, "local", 0.5, kAmsgrad, true},
                        {"sgd", {0.1, 0.9, 0.0, 1e-3}, "anisotropic", 0, 0, true}};
  for (const Case& each : cases)
    for (const int workers : {1, 3, 4, 9}) {
      const Ranks one(1);
      CHECK(train(one, 0, workers, each, nullptr) ==
            train(one, 0, workers, each, std::make_shared<HostDevice>()));
    }
  const Ranks two(2);
  two.run_well([&](int rank) {
    CHECK(train(two, rank, 2, cases[0], nullptr) ==
          train(two, rank, 2, cases[0], std::make_shared<HostDevice>()));
  });
}

// The numbers of a replay are those that it was given, not those that were captured.
void a_captured_step_is_replayed_with_new_numbers() {
  const Case each{"adam", {0.01, 0.9, 0.999, 1e-8, 0.0}};
  const auto run = [&](bool captured) {
    const Ranks one(1);
    const auto team = std::make_shared<Team>(one.options(0, 1));
    const auto device = std::make_shared<HostDevice>();
    const auto engine = Engine::create(team, layers(), options_of(each), device);
    fill(engine->weights(0).get(), engine->plan(), 1);
    engine->adopt(0);
    const std::vector<std::uint8_t> present(std::size(kLengths), 1);
    auto hyper = each.hyper;
    hyper.push_back(0.05);
    for (int step = 0; step < 5; ++step) {
      fill(engine->gradients(0).get(), engine->plan(), 10 * step);
      if (captured && step == 1) {
        device->begin_capture();
        engine->step({.hyper = hyper, .present = present});
        device->end_capture();
      }
      hyper[0] = 0.01 / (step + 1);
      if (captured && step >= 1) {
        engine->prepare_replay({.hyper = hyper, .present = present});
        device->replay();
      } else {
        engine->step({.hyper = hyper, .present = present});
      }
    }
    CHECK(engine->steps() == 5 && engine->updates(0) == 5);
    std::vector<float> w(kLengths[0]);
    engine->read(0, 0, 0, kLengths[0], w.data());
    return w;
  };
  CHECK(run(false) == run(true));
}

void ranks_announce_equally_often_when_one_complains() {
  const Case each{"sgd", {0.1, 0.9, 0.0, 0.0}};
  const Ranks two(2);
  two.run_well([&](int rank) {
    const auto device = std::make_shared<HostDevice>();
    const auto team = std::make_shared<Team>(two.options(rank, 1));
    const auto engine = Engine::create(team, layers(), options_of(each), device);
    const std::vector<std::uint8_t> present(std::size(kLengths), 1);
    auto hyper = each.hyper;
    hyper.push_back(0.05);
    thrown<UsageError>([&] {
      if (rank == 0) engine->complain("not yet");
      engine->step({.hyper = hyper, .present = present});
    });
    CHECK(device->announcements() == 1);
    engine->step({.hyper = hyper, .present = present});
    CHECK(device->announcements() == 3);
  });
}

void what_a_device_does_not_have_is_said() {
  const Ranks one(1);
  const auto team = std::make_shared<Team>(one.options(0, 2));
  const auto device = std::make_shared<HostDevice>();
  const auto make = [&](const Case& each, DType dtype) {
    const LayerSpec layer{"w", dtype, {8}, {1}, 0};
    return thrown<UsageError>([&] { Engine::create(team, {&layer, 1}, options_of(each), device); });
  };
  const auto says = [](const std::string& text, const char* words) { return text.find(words) != text.npos; };
  CHECK(says(make({"adamp", {0.1, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.1}}, DType::f32),
             "rule 'adamp' has no kernels"));
  CHECK(says(make({"sgd", {0.1, 0.9, 0.0, 0.0}}, DType::f64), "float64 parameters have no kernels"));
  CHECK(says(make({"sgd", {0.1, 0.9, 0.0, 0.0}, "filter"}, DType::f32), "'filter' has no kernels"));
}

}  // namespace

int main() {
  a_device_gives_the_bits_of_the_cpu();
  a_captured_step_is_replayed_with_new_numbers();
  ranks_announce_equally_often_when_one_complains();
  what_a_device_does_not_have_is_said();
}
