#include <array>

#include "core/clones.hpp"
#include "core/streaming.hpp"
#include "rules/extrapolation.hpp"
#include "stages/displaced.hpp"
#include "stages/squares.hpp"
#include "stages/tables.hpp"

// The publish stage: the new weights, displaced for their worker, go straight into that worker's memory.
//
// When a step moves more than the caches hold, the weights are streamed: computed in blocks that fit a few
// cache lines, then stored past the cache. An ordinary store would first read the line it is about to
// overwrite, a word per element that the step does not need; and while stores drain, loads of the next tile
// can run.

namespace xc {
namespace {

template <class E, Direction kDirection, bool kScaled>
XC_CLONES void publish(const Master<E>* __restrict w, const Displacement<Master<E>>& to, std::byte* x_bytes,
                       std::int64_t count) {
  const Displacement<Master<E>> by = to;
  const E* __restrict own = reinterpret_cast<const E*>(by.own);
  const Master<E>* __restrict shared = by.shared;
  const Master<E>* __restrict factor = by.factor;
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = 0; i < count; ++i)
    x[i] = narrow<E>(displaced<kDirection, kScaled>(w[i], by, own, shared, factor, i));
}

template <class E>
XC_HOST_DEVICE void observe(const Observed<Master<E>>& observed, const E* own, std::int64_t i,
                            std::int64_t count) {
  const Master<E>* mean = observed.mean;
  const Master<E> scale = observed.own;
  if (observed.own_lanes)
    add_terms<1>(observed.first + i, count, observed.own_lanes, {},
                 [&](std::int64_t j, double* term) XC_INLINE {
                   const Master<E> value = widen(own[i + j]) * scale;
                   term[0] = product(value, value);
                 });
  if (observed.mean_lanes)
    add_terms<1>(observed.first + i, count, observed.mean_lanes, {},
                 [&](std::int64_t j, double* term)
                     XC_INLINE { term[0] = product(mean[i + j], mean[i + j]); });
}

template <class E, Direction kDirection, bool kScaled>
XC_CLONES void stream(const Master<E>* __restrict w, const Displacement<Master<E>>& to, std::byte* x_bytes,
                      std::int64_t count, const Ahead& ahead, const Observed<Master<E>>& observed) {
  const Displacement<Master<E>> by = to;
  const E* __restrict own = reinterpret_cast<const E*>(by.own);
  const Master<E>* __restrict shared = by.shared;
  const Master<E>* __restrict factor = by.factor;
  const StoreWidth store = store_for(x_bytes, ahead.store);
  const std::int64_t blocks = store == StoreWidth::none ? 0 : count / kStreamBlock;
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t i = b * kStreamBlock;
    fetch(ahead.at[0] + b * ahead.block_bytes[0], ahead.block_bytes[0]);
    fetch(ahead.at[1] + b * ahead.block_bytes[1], ahead.block_bytes[1]);
    alignas(kLineBytes) E block[kStreamBlock];
    for (std::int64_t j = 0; j < kStreamBlock; ++j)
      block[j] = narrow<E>(displaced<kDirection, kScaled>(w[i + j], by, own, shared, factor, i + j));
    store_past_cache<sizeof block>(block, x_bytes + i * static_cast<std::int64_t>(sizeof(E)), store);
    observe(observed, own, i, kStreamBlock);
  }
  observe(observed, own, blocks * kStreamBlock, count - blocks * kStreamBlock);
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = blocks * kStreamBlock; i < count; ++i)
    x[i] = narrow<E>(displaced<kDirection, kScaled>(w[i], by, own, shared, factor, i));
}

template <class E, Direction kDirection>
XC_CLONES void displace(const Displacement<Master<E>>& to, std::byte* x_bytes, std::int64_t count) {
  const Displacement<Master<E>> by = to;
  const E* __restrict own = reinterpret_cast<const E*>(by.own);
  const Master<E>* __restrict shared = by.shared;
  E* __restrict x = reinterpret_cast<E*>(x_bytes);
  for (std::int64_t i = 0; i < count; ++i)
    x[i] = narrow<E>(displaced<kDirection, false>(widen(x[i]), by, own, shared, shared, i));
}

// The kernels of one element type, by direction.
template <class E, bool kScaled>
PublishFn<Master<E>> publish_by(Direction direction) {
  static constexpr std::array<PublishFn<Master<E>>, kDirections> kTable = {
      &publish<E, Direction::none, false>, &publish<E, Direction::own, kScaled>,
      &publish<E, Direction::shared, kScaled>, &publish<E, Direction::deviation, kScaled>};
  return kTable.at(static_cast<std::size_t>(direction));
}

template <class E>
PublishFn<Master<E>> publish_of(Direction direction, bool scaled) {
  return scaled ? publish_by<E, true>(direction) : publish_by<E, false>(direction);
}

template <class E, bool kScaled>
StreamFn<Master<E>> stream_by(Direction direction) {
  static constexpr std::array<StreamFn<Master<E>>, kDirections> kTable = {
      &stream<E, Direction::none, false>, &stream<E, Direction::own, kScaled>,
      &stream<E, Direction::shared, kScaled>, &stream<E, Direction::deviation, kScaled>};
  return kTable.at(static_cast<std::size_t>(direction));
}

template <class E>
StreamFn<Master<E>> stream_of(Direction direction, bool scaled) {
  return scaled ? stream_by<E, true>(direction) : stream_by<E, false>(direction);
}

template <class E>
DisplaceFn<Master<E>> displace_of(Direction direction) {
  static constexpr std::array<DisplaceFn<Master<E>>, kDirections> kTable = {
      &displace<E, Direction::none>, &displace<E, Direction::own>, &displace<E, Direction::shared>,
      &displace<E, Direction::deviation>};
  return kTable.at(static_cast<std::size_t>(direction));
}

}  // namespace

template <>
PublishFn<float> publish_kernel<float>(DType element, Direction direction, bool scaled) {
  if (element == DType::f32) return publish_of<float>(direction, scaled);
  return element == DType::bf16 ? publish_of<Bf16>(direction, scaled) : publish_of<F16>(direction, scaled);
}

template <>
PublishFn<double> publish_kernel<double>(DType, Direction direction, bool scaled) {
  return publish_of<double>(direction, scaled);
}

template <>
StreamFn<float> stream_kernel<float>(DType element, Direction direction, bool scaled) {
  if (element == DType::f32) return stream_of<float>(direction, scaled);
  return element == DType::bf16 ? stream_of<Bf16>(direction, scaled) : stream_of<F16>(direction, scaled);
}

template <>
StreamFn<double> stream_kernel<double>(DType, Direction direction, bool scaled) {
  return stream_of<double>(direction, scaled);
}

template <>
DisplaceFn<float> displace_kernel<float>(DType element, Direction direction) {
  if (element == DType::f32) return displace_of<float>(direction);
  return element == DType::bf16 ? displace_of<Bf16>(direction) : displace_of<F16>(direction);
}

template <>
DisplaceFn<double> displace_kernel<double>(DType, Direction direction) {
  return displace_of<double>(direction);
}

}  // namespace xc
