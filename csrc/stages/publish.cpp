#include <array>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "rules/extrapolation.hpp"
#include "stages/tables.hpp"

// The publish stage: the new weights, displaced for their worker, go straight into that worker's memory.
//
// When a step moves more than the caches hold, the weights are streamed: computed in blocks that fit a few
// cache lines, then stored past the cache. An ordinary store would first read the line it is about to
// overwrite, a word per element that the step does not need; and while stores drain, loads of the next tile
// can run.

namespace xc {
namespace {

template <class E, class K>
XC_CLONES void publish(const Master<E>* __restrict w, Master<E> inner, const std::byte* own_bytes,
                       const Master<E>* __restrict mean, std::byte* x_bytes, std::int64_t count) {
  const E* __restrict own = reinterpret_cast<const E*>(own_bytes);
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = 0; i < count; ++i) x[i] = narrow<E>(K::displace(w[i], inner, widen(own[i]), mean[i]));
}

template <class E, class K>
XC_CLONES void stream(const Master<E>* __restrict w, Master<E> inner, const std::byte* own_bytes,
                      const Master<E>* __restrict mean, std::byte* x_bytes, std::int64_t count,
                      const Ahead& ahead) {
  const E* __restrict own = reinterpret_cast<const E*>(own_bytes);
  const std::int64_t blocks = is_streamable(x_bytes) ? count / kStreamBlock : 0;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t i = b * kStreamBlock;
    fetch(ahead.at[0] + b * ahead.block_bytes[0], ahead.block_bytes[0]);
    fetch(ahead.at[1] + b * ahead.block_bytes[1], ahead.block_bytes[1]);
    alignas(kLineBytes) E block[kStreamBlock];
    for (std::int64_t j = 0; j < kStreamBlock; ++j)
      block[j] = narrow<E>(K::displace(w[i + j], inner, widen(own[i + j]), mean[i + j]));
    store_past_cache<sizeof block>(block, x_bytes + i * static_cast<std::int64_t>(sizeof(E)));
  }
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = blocks * kStreamBlock; i < count; ++i)
    x[i] = narrow<E>(K::displace(w[i], inner, widen(own[i]), mean[i]));
}

template <class E, class K>
XC_CLONES void displace(Master<E> inner, const std::byte* own_bytes, const Master<E>* __restrict mean,
                        std::byte* x_bytes, std::int64_t count) {
  const E* __restrict own = reinterpret_cast<const E*>(own_bytes);
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = 0; i < count; ++i)
    x[i] = narrow<E>(K::displace(widen(x[i]), inner, widen(own[i]), mean[i]));
}

// The kernels of one element type, by extrapolation.
template <class E, class... K>
PublishFn<Master<E>> publish_of(int extrapolation, Extrapolations<K...>) {
  static constexpr std::array<PublishFn<Master<E>>, sizeof...(K)> kTable = {&publish<E, K>...};
  return kTable.at(static_cast<std::size_t>(extrapolation));
}

template <class E, class... K>
StreamFn<Master<E>> stream_of(int extrapolation, Extrapolations<K...>) {
  static constexpr std::array<StreamFn<Master<E>>, sizeof...(K)> kTable = {&stream<E, K>...};
  return kTable.at(static_cast<std::size_t>(extrapolation));
}

template <class E, class... K>
DisplaceFn<Master<E>> displace_of(int extrapolation, Extrapolations<K...>) {
  static constexpr std::array<DisplaceFn<Master<E>>, sizeof...(K)> kTable = {&displace<E, K>...};
  return kTable.at(static_cast<std::size_t>(extrapolation));
}

}  // namespace

int extrapolation_index(std::string_view name) {
  for (std::size_t i = 0; i < AllExtrapolations::kNames.size(); ++i)
    if (AllExtrapolations::kNames[i] == name) return static_cast<int>(i);
  return -1;
}

bool displaces_by_own(int extrapolation) {
  return AllExtrapolations::kByOwn.at(static_cast<std::size_t>(extrapolation));
}

bool displaces_by_mean(int extrapolation) {
  return AllExtrapolations::kByMean.at(static_cast<std::size_t>(extrapolation));
}

template <>
PublishFn<float> publish_kernel<float>(DType element, int extrapolation) {
  if (element == DType::f32) return publish_of<float>(extrapolation, AllExtrapolations{});
  if (element == DType::bf16) return publish_of<Bf16>(extrapolation, AllExtrapolations{});
  return publish_of<F16>(extrapolation, AllExtrapolations{});
}

template <>
PublishFn<double> publish_kernel<double>(DType, int extrapolation) {
  return publish_of<double>(extrapolation, AllExtrapolations{});
}

template <>
StreamFn<float> stream_kernel<float>(DType element, int extrapolation) {
  if (element == DType::f32) return stream_of<float>(extrapolation, AllExtrapolations{});
  if (element == DType::bf16) return stream_of<Bf16>(extrapolation, AllExtrapolations{});
  return stream_of<F16>(extrapolation, AllExtrapolations{});
}

template <>
StreamFn<double> stream_kernel<double>(DType, int extrapolation) {
  return stream_of<double>(extrapolation, AllExtrapolations{});
}

template <>
DisplaceFn<float> displace_kernel<float>(DType element, int extrapolation) {
  if (element == DType::f32) return displace_of<float>(extrapolation, AllExtrapolations{});
  if (element == DType::bf16) return displace_of<Bf16>(extrapolation, AllExtrapolations{});
  return displace_of<F16>(extrapolation, AllExtrapolations{});
}

template <>
DisplaceFn<double> displace_kernel<double>(DType, int extrapolation) {
  return displace_of<double>(extrapolation, AllExtrapolations{});
}

}  // namespace xc
