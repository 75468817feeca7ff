#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.hpp"
#include "device/device.hpp"

namespace xc::bind {

// A strided look at shared memory, the host's or a device's, that keeps it mapped. Python sees it through
// DLPack, and the host's through the buffer protocol.
struct View {
  std::shared_ptr<std::byte> data;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  Device::Place place;                // as DLPack names it
};

}  // namespace xc::bind
