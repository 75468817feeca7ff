#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

#include "core/host_device.hpp"

namespace xc {

// Element types of parameters. Sums, master weights and rule state are kept in the master type: float for the
// three shorter ones, double for f64. The 16-bit types are plain bits, converted by integer arithmetic: the
// loops vectorise and every value rounds to nearest even, whatever the compiler thinks of native half
// precision.

enum class DType : std::uint8_t { f32, f64, bf16, f16 };

inline constexpr DType kAllDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

constexpr std::int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

constexpr std::string_view name_of(DType t) {
  constexpr std::string_view kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(t)];
}

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

// The parameter types that share one master type.
template <class E>
struct MasterOf {
  using type = float;
};
template <>
struct MasterOf<double> {
  using type = double;
};
template <class E>
using Master = typename MasterOf<E>::type;

XC_HOST_DEVICE float widen(float value) { return value; }
XC_HOST_DEVICE double widen(double value) { return value; }

XC_HOST_DEVICE float widen(Bf16 value) { return std::bit_cast<float>(std::uint32_t{value.bits} << 16); }

// The exponent is rebased by a multiplication, which is exact and also normalises subnormals.
XC_HOST_DEVICE float widen(F16 value) {
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const bool special = (value.bits & 0x7c00u) == 0x7c00u;
  return std::bit_cast<float>(sign | (special ? magnitude | 0x7f800000u : finite));
}

template <class E>
XC_HOST_DEVICE E narrow(Master<E> value) {
  return value;
}

template <>
XC_HOST_DEVICE Bf16 narrow<Bf16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded)};
}

// Three ranges: results that are subnormal in f16 are rounded by adding 0.5, whose last mantissa bit is the
// f16 unit; normal ones by the usual carry into the kept bits; above them come infinity and NaN.
template <>
XC_HOST_DEVICE F16 narrow<F16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<std::uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite))};
}

}  // namespace xc
