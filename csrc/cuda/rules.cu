#include "cuda/launcher.cuh"
#include "cuda/tables.hpp"

namespace xc {

void add_cuda_rules(RuleTable& rules) { Tables<CudaLauncher>::add_rules(rules); }

DeviceKernels cuda_element_kernels() {
  using Own = Tables<CudaLauncher>;
  return {{Own::element<float>(), Own::element<Bf16>(), Own::element<F16>()},
          &CudaLauncher::launch<TakeBody>,
          &CudaLauncher::launch<ClipBody>,
          &CudaLauncher::sum<MeanSquaresBody>,
          {}};
}

}  // namespace xc
