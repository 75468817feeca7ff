#include "stages/squares.hpp"

#include "core/clones.hpp"

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

}  // namespace xc
