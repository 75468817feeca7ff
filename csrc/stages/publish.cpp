#include <array>

#include "core/clones.hpp"
#include "rules/extrapolation.hpp"
#include "stages/tables.hpp"

// The publish stage: the new weights, displaced for their worker, go straight into that worker's memory.

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
