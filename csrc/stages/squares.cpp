#include "stages/squares.hpp"

#include "core/clones.hpp"
#include "stages/tree.hpp"

namespace xc {
namespace {

template <class E, bool kDecayed>
XC_CLONES void own_squares(const std::byte* gradient, Master<E> own, Master<E> decay,
                           const Master<E>* __restrict w, std::int64_t first, std::int64_t count,
                           double* lanes) {
  const E* __restrict g = reinterpret_cast<const E*>(gradient);
  add_terms<1>(first, count, lanes, {}, [&](std::int64_t i, double* term) XC_INLINE {
    Master<E> value = widen(g[i]) * own;
    if constexpr (kDecayed) value = value + decay * w[i];
    term[0] = product(value, value);
  });
}

template <class E>
OwnSquaresFn<Master<E>> own_squares_of(bool decayed) {
  return decayed ? &own_squares<E, true> : &own_squares<E, false>;
}

template <class T>
XC_CLONES void squares(const T* __restrict values, std::int64_t first, std::int64_t count, double* lanes,
                       const Upcoming& next) {
  add_terms<1>(first, count, lanes, next,
               [&](std::int64_t i, double* term) XC_INLINE { term[0] = product(values[i], values[i]); });
}

template <class E, int kWorkers>
XC_CLONES void observe(const std::byte* const* sources, std::int64_t first_byte, std::int64_t first,
                       std::int64_t count, Master<E> scale, Master<E> own, double* mean_lanes,
                       double* own_lanes) {
  const E* g[kWorkers];
  for (int k = 0; k < kWorkers; ++k) g[k] = reinterpret_cast<const E*>(sources[k] + first_byte);
  double means[kLanes], owns[kWorkers][kLanes];
  std::copy_n(mean_lanes, kLanes, means);
  for (int k = 0; k < kWorkers; ++k) std::copy_n(own_lanes + k * kLanes, kLanes, owns[k]);
  const auto add = [&](std::int64_t i, int lane) XC_INLINE {
    const Master<E> mean = tree<0, kWorkers>(g, i) * scale;
    means[lane] += product(mean, mean);
    for (int k = 0; k < kWorkers; ++k) {
      const Master<E> value = widen(g[k][i]) * own;
      owns[k][lane] += product(value, value);
    }
  };
  std::int64_t i = 0;
  for (; i < count && (first + i) % kLanes != 0; ++i) add(i, static_cast<int>((first + i) % kLanes));
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  for (int lane = 0; i < count; ++i, ++lane) add(i, lane);
  std::copy_n(means, kLanes, mean_lanes);
  for (int k = 0; k < kWorkers; ++k) std::copy_n(owns[k], kLanes, own_lanes + k * kLanes);
}

template <class E>
ObserveFn<Master<E>> observe_of(int workers) {
  switch (workers) {
    case 1:
      return &observe<E, 1>;
    case 2:
      return &observe<E, 2>;
    case 4:
      return &observe<E, 4>;
    default:
      return nullptr;
  }
}

}  // namespace

template <class T>
void add_squares(const T* values, std::int64_t first, std::int64_t count, double* lanes,
                 const Upcoming& next) {
  squares(values, first, count, lanes, next);
}

template <>
OwnSquaresFn<float> own_squares_kernel<float>(DType element, bool decayed) {
  if (element == DType::f32) return own_squares_of<float>(decayed);
  return element == DType::bf16 ? own_squares_of<Bf16>(decayed) : own_squares_of<F16>(decayed);
}

template <>
OwnSquaresFn<double> own_squares_kernel<double>(DType, bool decayed) {
  return own_squares_of<double>(decayed);
}

template void add_squares<float>(const float*, std::int64_t, std::int64_t, double*, const Upcoming&);
template void add_squares<double>(const double*, std::int64_t, std::int64_t, double*, const Upcoming&);

template <>
ObserveFn<float> observe_kernel<float>(DType element, int workers) {
  if (element == DType::f32) return observe_of<float>(workers);
  return element == DType::bf16 ? observe_of<Bf16>(workers) : nullptr;
}

template <>
ObserveFn<double> observe_kernel<double>(DType, int) {
  return nullptr;
}

}  // namespace xc
