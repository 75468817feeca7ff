#include <cmath>
#include <vector>

#include "check.hpp"
#include "core/float_environment.hpp"
#include "stages/tables.hpp"

// The generator beside the known answers that the Random123 library publishes, its words at their extremes,
// and runs of numbers beside one another.

using namespace xc;

namespace {

bool same(const Words& a, const Words& b) {
  return a.at0 == b.at0 && a.at1 == b.at1 && a.at2 == b.at2 && a.at3 == b.at3;
}

void philox_gives_the_known_answers() {
  constexpr std::uint32_t kOnes = 0xffffffffu;
  CHECK(same(philox({0, 0, 0, 0}, 0, 0), {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  CHECK(same(philox({kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes),
             {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  CHECK(same(philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u, 0x299f31d0u),
             {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

void a_key_and_a_block_make_the_counter() {
  const NoiseKey key{0x299f31d0a4093822u, 0x03707344u, 0x13198a2eu};
  CHECK(same(noise_words(key, 0x85a308d3243f6a88u), {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

void every_word_gives_a_uniform_number_inside_the_interval() {
  CHECK(UniformNoise::number(0x80000000u) == -1.0f + 0x1p-24f);
  CHECK(UniformNoise::number(0x7fffffffu) == 1.0f - 0x1p-24f);
  CHECK(UniformNoise::number(0) == 0x1p-24f && UniformNoise::number(0xffffffffu) == -0x1p-24f);
}

void extreme_words_give_finite_gaussian_numbers() {
  const std::uint32_t words[] = {0,           1,           0xff,        0x100,      0x3fffffffu,
                                 0x7fffffffu, 0x80000000u, 0xffffff00u, 0xffffffffu};
  for (const std::uint32_t radius : words)
    for (const std::uint32_t angle : words) {
      const auto [sine, cosine] = GaussianNoise::pair(radius, angle);
      CHECK(std::abs(sine) < 5.8f && std::abs(cosine) < 5.8f);  // false for NaN
    }
  CHECK(GaussianNoise::pair(0xffffffffu, 0).cosine == 0);
  CHECK(std::abs(GaussianNoise::pair(0, 0).cosine - std::sqrt(48 * std::log(2.0f))) < 1e-6f);
}

// Whichever loop of whichever instruction set makes them, and however a run of numbers is cut.
void both_types_see_the_numbers_of_single_elements(Noise kind) {
  const NoiseKey key{42, 3, 1};
  for (std::int64_t first = 0; first < 9; ++first)
    for (std::int64_t count = 0; count < 150; ++count) {
      std::vector<float> numbers(static_cast<std::size_t>(count) + 1, 9.0f);
      std::vector<double> doubles(static_cast<std::size_t>(count) + 1, 9.0);
      make_noise(kind, key, first, count, numbers.data());
      make_noise(kind, key, first, count, doubles.data());
      for (std::int64_t i = 0; i < count; ++i) {
        float alone;
        make_noise(kind, key, first + i, 1, &alone);
        const auto at = static_cast<std::size_t>(i);
        CHECK(numbers[at] == alone && doubles[at] == static_cast<double>(alone));
      }
      CHECK(numbers.back() == 9.0f && doubles.back() == 9.0);
    }
}

}  // namespace

int main() {
  const FloatEnvironment environment;
  philox_gives_the_known_answers();
  a_key_and_a_block_make_the_counter();
  every_word_gives_a_uniform_number_inside_the_interval();
  extreme_words_give_finite_gaussian_numbers();
  both_types_see_the_numbers_of_single_elements(Noise::gaussian);
  both_types_see_the_numbers_of_single_elements(Noise::uniform);
}
