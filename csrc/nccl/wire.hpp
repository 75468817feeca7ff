#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "device/stream.hpp"
#include "device/wire.hpp"
#include "nccl/communicator.hpp"

namespace xc {

// What a wire between GPUs does by NCCL, on streams of others. A group of sends and receives is one launch,
// whose kernel waits on the device for the other ranks; the host waits only while NCCL connects two ranks
// that have not talked before, and then for the communicator's patience at most. Sends to a rank meet its
// receives from here in the order of both.
class NcclWire {
 public:
  explicit NcclWire(std::shared_ptr<NcclCommunicator> communicator)
      : communicator_(std::move(communicator)) {}

  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives, Stream stream);
  void check() { communicator_->check(); }
  void abort(const std::string& reason) { communicator_->abort(reason); }

  // Collective, of the communicator's members, on blocks as CollectiveWire has them. NCCL chooses the order
  // of additions: it may differ between versions of NCCL, numbers of ranks, sizes and machines, so this is
  // outside of the promise of equal bits.
  void reduce_scatter(float* blocks, std::int64_t elements, Stream stream);
  void all_gather(float* blocks, std::int64_t elements, Stream stream);

 private:
  float* own_block(float* blocks, std::int64_t elements) const;

  std::shared_ptr<NcclCommunicator> communicator_;
};

}  // namespace xc
