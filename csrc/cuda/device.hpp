#pragma once

#include <memory>

#include "device/device.hpp"

namespace xc {

// How many GPUs this process sees; 0 also where there is no driver.
int cuda_device_count();

// The GPU with this number, as the CUDA runtime counts them.
std::shared_ptr<Device> make_cuda_device(int index);

// One line per fact that users look for: name, compute capability, memory, processors.
std::string describe_cuda_device(int index);

// The same for no other GPU of any host, by whatever number a process calls it.
std::string identify_cuda_device(int index);

}  // namespace xc
