#include <cmath>
#include <cstring>

#include "check.hpp"
#include "core/dtype.hpp"
#include "core/float_environment.hpp"

// Every one of the 65,536 values of both 16-bit types, against arithmetic that follows their definition.

namespace {

float defined_f16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

float defined_bf16(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// value -> E must give the nearest of the neighbours of `bits`, the even one when it lies in the middle.
template <class E>
void check_rounding_between(std::uint16_t bits, float (*defined)(std::uint16_t)) {
  const double low = defined(bits), high = defined(static_cast<std::uint16_t>(bits + 1));
  if (!std::isfinite(low) || !std::isfinite(high)) return;
  const auto even = static_cast<std::uint16_t>(bits & 1 ? bits + 1 : bits);
  const auto middle = static_cast<float>((low + high) / 2);  // exact: one bit more than the type has
  CHECK(xc::narrow<E>(middle).bits == even);
  CHECK(xc::narrow<E>(std::nextafter(middle, static_cast<float>(low))).bits == bits);
  CHECK(xc::narrow<E>(std::nextafter(middle, static_cast<float>(high))).bits == bits + 1);
}

template <class E>
void check_all(float (*defined)(std::uint16_t)) {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = xc::widen(E{bits});
    if (std::isnan(defined(bits))) {
      CHECK(std::isnan(value));
      CHECK(std::isnan(xc::widen(xc::narrow<E>(value))));
      continue;
    }
    CHECK(value == defined(bits) && std::signbit(value) == std::signbit(defined(bits)));
    CHECK(xc::narrow<E>(value).bits == bits);
    if ((bits & 0x7fff) != 0x7fff) check_rounding_between<E>(bits, defined);
  }
}

}  // namespace

int main() {
  const xc::FloatEnvironment environment;
  check_all<xc::F16>(&defined_f16);
  check_all<xc::Bf16>(&defined_bf16);
  CHECK(xc::narrow<xc::F16>(65519.9f).bits == 0x7bff);
  CHECK(xc::narrow<xc::F16>(65520.0f).bits == 0x7c00);
  CHECK(xc::narrow<xc::F16>(-1e30f).bits == 0xfc00);
  CHECK(xc::narrow<xc::Bf16>(3.4e38f).bits == 0x7f80);
}
