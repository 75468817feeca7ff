#include "cuda/launcher.cuh"
#include "cuda/tables.hpp"

namespace xc {

void add_cuda_steps_f16(RuleTable& rules) { Tables<CudaLauncher>::add_steps<F16>(rules); }

}  // namespace xc
