#include "stages/fused.hpp"

namespace xc {

FusedFn<float> fused_bf16(std::string_view family, const FusedChoice& choice) {
  return of_family<Bf16>(family, choice, WithLoops{});
}

}  // namespace xc
