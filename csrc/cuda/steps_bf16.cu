#include "cuda/launcher.cuh"
#include "cuda/tables.hpp"

namespace xc {

void add_cuda_steps_bf16(RuleTable& rules) { Tables<CudaLauncher>::add_steps<Bf16>(rules); }

}  // namespace xc
