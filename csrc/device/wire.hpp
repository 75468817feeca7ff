#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "device/stream.hpp"

namespace xc {

// What goes between teams, on device memory. Nobody waits on the host: transfers queue up behind the work
// that makes their bytes, and what needs their bytes queues up behind them. So a failure cannot be told where
// it happens; check() tells of it later.
struct Transfer {
  int rank;  // the other side
  std::byte* at;
  std::int64_t bytes;
};

class DeviceWire {
 public:
  virtual ~DeviceWire() = default;
  // Queues one group of transfers on the stream: all ranks' groups correspond, in the same order. Returns
  // without waiting for them.
  virtual void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives,
                        Stream stream) = 0;
  // Throws CommError, with the wire's own words, if a transfer is known to have failed.
  virtual void check() = 0;
  // Ends what is under way; everything later throws. Idempotent.
  virtual void abort(const std::string& reason) = 0;
};

}  // namespace xc
