#include "rules/noise.hpp"

#include <algorithm>

#include "core/clones.hpp"
#include "stages/tables.hpp"

// Random numbers of a run of elements. Whole blocks are a loop that vectorises over the blocks; of a block
// that is cut by either end of the run, only some numbers are kept.

namespace xc {
namespace {

template <class K, class T>
XC_CLONES void fill_blocks(const NoiseKey& key, std::uint64_t first_block, std::int64_t blocks,
                           T* __restrict noise) {
  const NoiseKey own = key;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Numbers numbers = K::numbers(noise_words(own, first_block + static_cast<std::uint64_t>(b)));
    noise[b * kNoiseLanes] = static_cast<T>(numbers.at0);
    noise[b * kNoiseLanes + 1] = static_cast<T>(numbers.at1);
    noise[b * kNoiseLanes + 2] = static_cast<T>(numbers.at2);
    noise[b * kNoiseLanes + 3] = static_cast<T>(numbers.at3);
  }
}

template <class K, class T>
void fill_part(const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise) {
  T block[kNoiseLanes];
  fill_blocks<K>(key, static_cast<std::uint64_t>(first / kNoiseLanes), 1, block);
  std::copy_n(block + first % kNoiseLanes, count, noise);
}

template <class K, class T>
void fill(const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise) {
  const std::int64_t head = std::min(count, (kNoiseLanes - first % kNoiseLanes) % kNoiseLanes);
  const std::int64_t blocks = (count - head) / kNoiseLanes;
  const std::int64_t tail = count - head - blocks * kNoiseLanes;
  if (head) fill_part<K>(key, first, head, noise);
  fill_blocks<K>(key, static_cast<std::uint64_t>((first + head) / kNoiseLanes), blocks, noise + head);
  if (tail) fill_part<K>(key, first + count - tail, tail, noise + count - tail);
}

}  // namespace

template <class T>
void make_noise(Noise kind, const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise) {
  if (kind == Noise::gaussian)
    fill<GaussianNoise>(key, first, count, noise);
  else
    fill<UniformNoise>(key, first, count, noise);
}

template void make_noise<float>(Noise, const NoiseKey&, std::int64_t, std::int64_t, float*);
template void make_noise<double>(Noise, const NoiseKey&, std::int64_t, std::int64_t, double*);

}  // namespace xc
