#pragma once

#include <cstdint>

#include "core/dtype.hpp"

// The part of the DLPack interface (https://dmlc.github.io/dlpack) that is exchanged here: version 0, which
// every consumer understands.

namespace xc::dlpack {

struct Device {
  std::int32_t type;
  std::int32_t id;
};
inline constexpr std::int32_t kCpu = 1;

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
inline constexpr std::uint8_t kFloat = 2;
inline constexpr std::uint8_t kBfloat = 4;

constexpr DataType type_of(DType t) {
  return {t == DType::bf16 ? kBfloat : kFloat, static_cast<std::uint8_t>(8 * size_of(t)), 1};
}

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null for a contiguous tensor
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

inline constexpr const char* kName = "dltensor";

// The table of functions that a tensor type offers under `__dlpack_c_exchange_api__` since DLPack 1.2, in a
// capsule of the name kExchangeName. Only `fill` is used here: it describes a tensor without a new object and
// without waiting for a device. It returns 0, or -1 with a Python exception set. The other entries keep their
// places only.
struct ExchangeTable {
  std::uint32_t major;
  std::uint32_t minor;
  const ExchangeTable* older;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*fill)(void* object, Tensor* out);  // may be null
  void* stream;
};

inline constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kExchangeName = "dlpack_exchange_api";

}  // namespace xc::dlpack
