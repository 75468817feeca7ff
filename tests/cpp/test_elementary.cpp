#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <limits>

#include "check.hpp"
#include "core/elementary.hpp"
#include "core/float_environment.hpp"

// exp, log, sine and cosine beside those of the C library in long double, over dense grids. Errors are
// counted in ulp: the distance between neighbouring numbers of the type where the exact result lies.

using namespace xc;

namespace {

constexpr int kPoints = 1'000'003;
constexpr long double kPi = 3.14159265358979323846264338327950288L;

template <class T>
long double errors_in_ulp(T got, long double exact) {
  using Limits = std::numeric_limits<T>;
  const int exponent = exact == 0 ? Limits::min_exponent : std::ilogb(exact) + 1;
  const int last_bit = std::max(exponent, Limits::min_exponent) - Limits::digits;
  return std::abs(static_cast<long double>(got) - exact) / std::ldexp(1.0L, last_bit);
}

// Evenly spaced from first to last, both included.
template <class T>
T point(int i, T first, T last) {
  return std::lerp(first, last, static_cast<T>(i) / static_cast<T>(kPoints - 1));
}

// The largest error of `function` beside `exact` over the points that `at` gives.
template <std::floating_point T>
long double worst(auto at, auto function, auto exact) {
  long double most = 0;
  for (int i = 0; i < kPoints; ++i) {
    const T x = at(i);
    most = std::max(most, errors_in_ulp<T>(function(x), exact(static_cast<long double>(x))));
  }
  return most;
}

void check_bound(const char* what, long double error, long double bound) {
  if (error > bound) std::fprintf(stderr, "%s: %.3Lf ulp\n", what, error);
  CHECK(error <= bound);
}

template <class T>
void exp_is_within_its_bound_down_to_the_subnormals(T lowest, T highest) {
  const auto error = [](T first, T last) {
    return worst<T>([=](int i) { return point(i, first, last); }, [](T x) { return exp_of(x); },
                    [](long double x) { return std::exp(x); });
  };
  check_bound("exp", error(lowest, highest), 1.25L);
  check_bound("exp near zero", error(T(-1e-3), T(1e-3)), 1);
}

template <class T>
void exp_saturates_and_passes_nan_on() {
  constexpr T kInfinity = std::numeric_limits<T>::infinity(), kLargest = std::numeric_limits<T>::max();
  CHECK(exp_of(T(0)) == 1 && exp_of(T(-0.0)) == 1);
  CHECK(exp_of(kInfinity) == kInfinity && exp_of(kLargest) == kInfinity);
  CHECK(exp_of(-kInfinity) == 0 && exp_of(-kLargest) == 0);
  CHECK(exp_of(std::log(kLargest) * T(1.001)) == kInfinity);
  CHECK(std::isnan(exp_of(std::numeric_limits<T>::quiet_NaN())));
}

template <class T>
void log_is_within_one_ulp_over_all_normal_numbers() {
  using Word = WordOf<T>;
  const Word first = std::bit_cast<Word>(std::numeric_limits<T>::min());
  const Word step = (std::bit_cast<Word>(std::numeric_limits<T>::max()) - first) / (kPoints - 1);
  const auto error = [](auto at) {
    return worst<T>(at, [](T x) { return log_of(x); }, [](long double x) { return std::log(x); });
  };
  check_bound("log", error([=](int i) { return std::bit_cast<T>(first + static_cast<Word>(i) * step); }), 1);
  check_bound("log around one", error([](int i) { return point(i, T(0.5), T(2)); }), 1);
  check_bound("log near its zero", error([](int i) { return point(i, T(1 - 1e-5), T(1 + 1e-5)); }), 1);
}

template <class T>
void log_of_one_is_zero_and_of_what_is_too_small_is_finite() {
  CHECK(log_of(T(1)) == 0);
  const T least = log_of(std::numeric_limits<T>::min());
  CHECK(log_of(T(0)) < least && std::isfinite(log_of(T(0))));
  CHECK(log_of(std::numeric_limits<T>::denorm_min()) >= log_of(T(0)));
}

// The exact angle less its nearest quarter turns, so that long double sees small arguments too.
long double exact_sine(long double turn) {
  const long double quarter = std::nearbyint(4 * turn), angle = 2 * kPi * (turn - quarter / 4);
  const int quadrant = static_cast<int>(quarter) % 4;
  const long double size = quadrant % 2 ? std::cos(angle) : std::sin(angle);
  return quadrant < 2 ? size : -size;
}

template <class T>
void sine_and_cosine_are_within_two_ulp_even_at_their_zeros(T last) {
  const auto error = [](auto at) {
    const auto of_sine = worst<T>(
        at, [](T u) { return sine_cosine_of_turn(u).sine; }, [](long double u) { return exact_sine(u); });
    const auto of_cosine = worst<T>(
        at, [](T u) { return sine_cosine_of_turn(u).cosine; },
        [](long double u) { return exact_sine(u + 0.25L); });
    return std::max(of_sine, of_cosine);
  };
  check_bound("sine and cosine", error([=](int i) { return point(i, T(0), last); }), 2);
  for (const T zero : {T(0.25), T(0.5), T(0.75)})
    check_bound("near a zero", error([=](int i) { return point(i, zero - T(1e-4), zero + T(1e-4)); }), 2);
}

template <class T>
void quarter_turns_are_exact() {
  const T quarters[] = {0, T(0.25), T(0.5), T(0.75)}, sines[] = {0, 1, 0, -1}, cosines[] = {1, 0, -1, 0};
  for (int i = 0; i < 4; ++i) {
    const auto [sine, cosine] = sine_cosine_of_turn(quarters[i]);
    CHECK(sine == sines[i] && cosine == cosines[i]);
  }
}

template <class T>
void check_all(T lowest, T highest) {
  exp_is_within_its_bound_down_to_the_subnormals(lowest, highest);
  exp_saturates_and_passes_nan_on<T>();
  log_is_within_one_ulp_over_all_normal_numbers<T>();
  log_of_one_is_zero_and_of_what_is_too_small_is_finite<T>();
  sine_and_cosine_are_within_two_ulp_even_at_their_zeros(std::nextafter(T(1), T(0)));
  quarter_turns_are_exact<T>();
}

}  // namespace

int main() {
  const FloatEnvironment environment;
  check_all(-104.0f, 88.72283f);
  check_all(-746.0, 709.782712893383);
}
