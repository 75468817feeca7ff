#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.hpp"

namespace xc::bind {

// A strided look at shared memory that keeps it mapped. Python sees it through the buffer protocol and
// DLPack.
struct View {
  std::shared_ptr<std::byte> data;
  DType dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
};

}  // namespace xc::bind
