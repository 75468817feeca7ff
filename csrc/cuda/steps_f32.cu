#include "cuda/launcher.cuh"
#include "cuda/tables.hpp"

namespace xc {

void add_cuda_steps_f32(RuleTable& rules) { Tables<CudaLauncher>::add_steps<float>(rules); }

}  // namespace xc
