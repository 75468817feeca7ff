#include "stages/fused.hpp"

namespace xc {

FusedFn<float> fused_f32(std::string_view family, const FusedChoice& choice) {
  return of_family<float>(family, choice, WithLoops{});
}

template <>
FusedFn<float> fused_kernel<float>(DType element, int family, unsigned member, int workers,
                                   Direction direction, bool scaled) {
  const std::string_view name = families()[static_cast<std::size_t>(family)].name;
  const FusedChoice choice{member, workers, direction, scaled};
  if (element == DType::f32) return fused_f32(name, choice);
  if (element == DType::bf16) return fused_bf16(name, choice);
  return nullptr;
}

template <>
FusedFn<double> fused_kernel<double>(DType, int, unsigned, int, Direction, bool) {
  return nullptr;
}

}  // namespace xc
