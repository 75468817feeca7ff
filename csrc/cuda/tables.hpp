#pragma once

#include <vector>

#include "device/kernels.hpp"

namespace xc {

// One file each, so that they compile side by side.

using RuleTable = std::vector<std::vector<RuleKernels>>;

void add_cuda_steps_f32(RuleTable& rules);
void add_cuda_steps_bf16(RuleTable& rules);
void add_cuda_steps_f16(RuleTable& rules);
void add_cuda_rules(RuleTable& rules);
DeviceKernels cuda_element_kernels();

}  // namespace xc
