#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "core/host_device.hpp"

// exp, log, sine and cosine from + - * / and integer arithmetic alone. Every operation used is correctly
// rounded by IEEE 754, so the bits are the same on every processor, in every clone of a loop and on a GPU,
// which no library of mathematics promises. It needs what all arithmetic here needs: rounding to nearest and
// no contraction into fused multiply-add (-ffp-contract=off; nvcc -fmad=false). There are no branches and no
// conversions between integers and floating point: a sum with 1.5 * 2^23 (2^52) holds an integer in its low
// bits. So loops that call these functions vectorise even where only the baseline is at hand.
//
// Each function reduces its argument without error to a short interval around zero, evaluates a polynomial
// that is near the best in the maximum norm, and undoes the reduction. Errors, as
// tests/cpp/test_elementary.cpp holds them, in float and in double: at most 1.25 ulp for exp, 1 ulp for log,
// 2 ulp for sine and cosine.

namespace xc {

// The layout of a type, and ln 2 in two parts, of which the first times any exponent is exact.
template <class T>
struct Format;

template <>
struct Format<float> {
  using Word = std::uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Word kBias = 127;
  static constexpr Word kRootOfHalf = 0x3f3504f3u;
  static constexpr float kIntegers = 0x1.8p23f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpIsInfinite = 89.0f, kExpIsZero = -104.0f;
};

template <>
struct Format<double> {
  using Word = std::uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Word kBias = 1023;
  static constexpr Word kRootOfHalf = 0x3fe6a09e667f3bcdu;
  static constexpr double kIntegers = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa3p-1, kLn2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kExpIsInfinite = 710.0, kExpIsZero = -746.0;
};

template <class T>
using WordOf = typename Format<T>::Word;

// c0 + c1 x + c2 x^2 + ..., by Horner's scheme.
template <class T, class... C>
XC_HOST_DEVICE T polynomial(T x, T first, C... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return first;
  } else {
    return first + x * polynomial(x, rest...);
  }
}

// 2^exponent, which must be that of a normal number; negative ones wrap around.
template <class T>
XC_HOST_DEVICE T power_of_two(WordOf<T> exponent) {
  return std::bit_cast<T>((exponent + Format<T>::kBias) << Format<T>::kMantissa);
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2.
template <class T>
XC_HOST_DEVICE T exp_tail(T r) {
  if constexpr (std::is_same_v<T, float>) {
    return polynomial(r, 0.5f, 0.166665763f, 0.0416665524f, 0.00836323295f, 0.00139262504f);
  } else {
    return polynomial(r, 0.5, 0.16666666666666669, 0.041666666666623824, 0.008333333333330039,
                      0.0013888888917367081, 0.00019841269863171557, 2.4801521057868204e-05,
                      2.7557268276905696e-06, 2.7620201591031547e-07, 2.5100472505694996e-08);
  }
}

// e^x. Infinity above the largest number, subnormals and zero below the least normal one, NaN for NaN. 2^k is
// multiplied in two halves, as it need not be a number itself where the product is.
template <class T>
XC_HOST_DEVICE T exp_of(T x) {
  using F = Format<T>;
  using Word = WordOf<T>;
  x = x > F::kExpIsInfinite ? F::kExpIsInfinite : x;
  x = x < F::kExpIsZero ? F::kExpIsZero : x;
  const T shifted = x * T(1.4426950408889634) + F::kIntegers;
  const T k = shifted - F::kIntegers;
  const T r = (x - k * F::kLn2High) - k * F::kLn2Low;
  const T power = T(1) + (r + r * r * exp_tail(r));
  const Word whole = std::bit_cast<Word>(shifted) - std::bit_cast<Word>(F::kIntegers);
  const Word half = ((whole + 2048) >> 1) - 1024;
  return power * power_of_two<T>(half) * power_of_two<T>(whole - half);
}

// (2 artanh(s) / s - 2) / s^2 for z = s^2 and s <= (sqrt(2) - 1) / (sqrt(2) + 1).
template <class T>
XC_HOST_DEVICE T log_tail(T z) {
  if constexpr (std::is_same_v<T, float>) {
    return polynomial(z, 0.666666865f, 0.399887592f, 0.295809865f);
  } else {
    return polynomial(z, 0.666666666666667, 0.3999999999989889, 0.28571428626253836, 0.22222211089379496,
                      0.1818289243253687, 0.15331611722055008, 0.14617807153417325);
  }
}

// ln(x) of a positive normal number. Zero and subnormals give what the bits of their mantissa would mean with
// the exponent -127 (-1023): finite, and in order. Negative numbers, infinity and NaN must not be asked for.
//
// x = 2^e m with m between sqrt(1/2) and sqrt(2). With f = m - 1 and s = f / (2 + f), ln(m) = 2 artanh(s) =
// f - (f^2/2 - s (f^2/2 + s^2 tail(s^2))), whose largest term is exact.
template <class T>
XC_HOST_DEVICE T log_of(T x) {
  using F = Format<T>;
  using Word = WordOf<T>;
  constexpr Word kOffset = F::kBias + 1;
  const Word bits = std::bit_cast<Word>(x);
  const Word exponent = (bits - F::kRootOfHalf + (kOffset << F::kMantissa)) >> F::kMantissa;
  const T e = std::bit_cast<T>(std::bit_cast<Word>(F::kIntegers) + exponent) - (F::kIntegers + T(kOffset));
  const T f = std::bit_cast<T>(bits - ((exponent - kOffset) << F::kMantissa)) - T(1);
  const T s = f / (T(2) + f);
  const T z = s * s;
  const T half_square = T(0.5) * f * f;
  const T rest = half_square - (s * (half_square + z * log_tail(z)) + e * F::kLn2Low);
  return e * F::kLn2High - (rest - f);
}

template <class T>
struct SineCosine {
  T sine, cosine;
};

// Both for |r| <= 1/8 of a turn.
template <class T>
XC_HOST_DEVICE SineCosine<T> sine_cosine_near_zero(T r) {
  const T z = r * r;
  if constexpr (std::is_same_v<T, float>) {
    return {r * polynomial(z, 6.28318531f, -41.3416977f, 81.5995178f, -75.7263031f),
            polynomial(z, 1.0f, -19.7392082f, 64.9393692f, -85.448822f, 59.4241066f)};
  } else {
    return {r * polynomial(z, 6.283185307179586, -41.341702240399755, 81.6052492760517, -76.70585973562093,
                           42.05868918088512, -15.094054182079999, 3.78643334956545),
            polynomial(z, 1.0, -19.739208802178716, 64.93939402266824, -85.4568172066438, 60.24464135270201,
                       -26.426253275854723, 7.903206911569678, -1.6990343940660637)};
  }
}

// The sign turned where the lowest bit of `odd` is set.
template <class T>
XC_HOST_DEVICE T negated_if(WordOf<T> odd, T value) {
  return std::bit_cast<T>(std::bit_cast<WordOf<T>>(value) ^ (odd << (8 * sizeof(T) - 1)));
}

// (sin 2 pi u, cos 2 pi u) for u in [0, 1). The nearest quarter turn is taken off exactly, so both are as
// precise near their zeros as elsewhere.
template <class T>
XC_HOST_DEVICE SineCosine<T> sine_cosine_of_turn(T u) {
  const T shifted = T(4) * u + Format<T>::kIntegers;
  const WordOf<T> quarter = std::bit_cast<WordOf<T>>(shifted);
  const auto [sine, cosine] = sine_cosine_near_zero(u - T(0.25) * (shifted - Format<T>::kIntegers));
  const bool swapped = (quarter & 1) != 0;
  return {negated_if(quarter >> 1, swapped ? cosine : sine),
          negated_if((quarter + 1) >> 1, swapped ? sine : cosine)};
}

}  // namespace xc
