#pragma once

#include <cmath>
#include <cstdint>

#include "core/elementary.hpp"
#include "core/host_device.hpp"

// Random numbers that are a function of (seed, step, worker, element) and of nothing else, by a counter-based
// generator: Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
// There is no state: whoever needs the number of an element computes it, in any order and on any device. A
// BLOCK is the generator's output for one counter: four words, from which come the numbers of four
// neighbouring elements. They are computed in float, so master weights of either type see the same noise.

namespace xc {

enum class Noise { gaussian, uniform };

struct NoiseKey {
  std::uint64_t seed;
  std::uint32_t step;
  std::uint32_t worker;
};

inline constexpr int kNoiseLanes = 4;

struct Words {
  std::uint32_t at0, at1, at2, at3;
};

struct Numbers {
  float at0, at1, at2, at3;
};

// Rounds of the cipher from kRound on: two products, whose high halves are mixed with the other words and the
// key; the key moves on by a fixed amount between rounds.
template <int kRound = 0>
XC_HOST_DEVICE Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
  if constexpr (kRound == 10) {
    return counter;
  } else {
    const std::uint64_t product0 = std::uint64_t{0xd2511f53u} * counter.at0;
    const std::uint64_t product1 = std::uint64_t{0xcd9e8d57u} * counter.at2;
    const Words next = {static_cast<std::uint32_t>(product1 >> 32) ^ counter.at1 ^ key0,
                        static_cast<std::uint32_t>(product1),
                        static_cast<std::uint32_t>(product0 >> 32) ^ counter.at3 ^ key1,
                        static_cast<std::uint32_t>(product0)};
    return philox<kRound + 1>(next, key0 + 0x9e3779b9u, key1 + 0xbb67ae85u);
  }
}

XC_HOST_DEVICE Words noise_words(const NoiseKey& key, std::uint64_t block) {
  return philox(
      {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), key.worker, key.step},
      static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32));
}

// The middles of 2^24 equal parts of [-1, 1): symmetric, and every one a float.
struct UniformNoise {
  XC_HOST_DEVICE static float number(std::uint32_t word) {
    return static_cast<float>((static_cast<std::int32_t>(word) >> 7) | 1) * 0x1p-24f;
  }
  XC_HOST_DEVICE static Numbers numbers(const Words& words) {
    return {number(words.at0), number(words.at1), number(words.at2), number(words.at3)};
  }
};

// Two independent normal numbers from two words (Box & Muller 1958): the radius sqrt(-2 ln u) with u in (0,
// 1], and an angle. Both have 24 bits, so no number is further out than sqrt(48 ln 2) = 5.77.
struct GaussianNoise {
  XC_HOST_DEVICE static float top_bits(std::uint32_t word) {
    return static_cast<float>(static_cast<std::int32_t>(word >> 8));
  }
  XC_HOST_DEVICE static SineCosine<float> pair(std::uint32_t word0, std::uint32_t word1) {
    const float radius = std::sqrt(-2.0f * log_of((top_bits(word0) + 1.0f) * 0x1p-24f));
    const auto [sine, cosine] = sine_cosine_of_turn(top_bits(word1) * 0x1p-24f);
    return {radius * sine, radius * cosine};
  }
  XC_HOST_DEVICE static Numbers numbers(const Words& words) {
    const auto first = pair(words.at0, words.at1), second = pair(words.at2, words.at3);
    return {first.cosine, first.sine, second.cosine, second.sine};
  }
};

}  // namespace xc
