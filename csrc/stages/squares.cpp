#include "core/clones.hpp"
#include "stages/tables.hpp"

// Sums of squares, in double and in a fixed number of lanes: an element's lane is its flat index modulo that
// number, so neither the length of a tile nor the instruction set changes the order in which a lane sums.

namespace xc {
namespace {

template <class T>
double square(T value) {
  return static_cast<double>(value) * static_cast<double>(value);
}

template <class T>
XC_CLONES void add_rows(const T* __restrict values, std::int64_t rows, double* __restrict lanes) {
  double sum[kSquareLanes];
  for (int l = 0; l < kSquareLanes; ++l) sum[l] = lanes[l];
  for (std::int64_t r = 0; r < rows; ++r)
    for (int l = 0; l < kSquareLanes; ++l) sum[l] += square(values[r * kSquareLanes + l]);
  for (int l = 0; l < kSquareLanes; ++l) lanes[l] = sum[l];
}

}  // namespace

template <class T>
void add_squares(const T* values, std::int64_t first, std::int64_t count, double* lanes) {
  std::int64_t i = 0;
  for (; i < count && (first + i) % kSquareLanes != 0; ++i)
    lanes[(first + i) % kSquareLanes] += square(values[i]);
  const std::int64_t rows = (count - i) / kSquareLanes;
  add_rows(values + i, rows, lanes);
  for (i += rows * kSquareLanes; i < count; ++i) lanes[(first + i) % kSquareLanes] += square(values[i]);
}

double sum_of_lanes(double* lanes) {
  for (int width = kSquareLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

template void add_squares<float>(const float*, std::int64_t, std::int64_t, double*);
template void add_squares<double>(const double*, std::int64_t, std::int64_t, double*);

}  // namespace xc
