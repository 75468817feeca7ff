#pragma once

#include <cstdint>
#include <memory>

#include "device/wire.hpp"
#include "nccl/communicator.hpp"

namespace xc {

// The wire between GPUs over NCCL. A group of sends and receives is one launch, whose kernel waits on the
// device for the other ranks; the host waits only while NCCL connects two ranks that have not talked before,
// and then for the communicator's patience at most. Sends to a rank meet its receives from here in the order
// of both.
class NcclWire final : public DeviceWire {
 public:
  explicit NcclWire(std::shared_ptr<NcclCommunicator> communicator)
      : communicator_(std::move(communicator)) {}

  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives, Stream stream) override;
  void check() override { communicator_->check(); }
  void abort(const std::string& reason) override { communicator_->abort(reason); }

  // Collective, on float32. Rank r gets the sum over ranks of elements r * elements_per_rank and on, of
  // `from`. NCCL chooses the order of additions: it may differ between versions of NCCL, numbers of ranks,
  // sizes and machines, so this is outside of the promise of equal bits.
  void reduce_scatter(const void* from, void* to, std::int64_t elements_per_rank, Stream stream);
  // Collective, on float32. Every rank gets all ranks' elements, in the order of ranks.
  void all_gather(const void* from, void* to, std::int64_t elements_per_rank, Stream stream);

 private:
  std::shared_ptr<NcclCommunicator> communicator_;
};

}  // namespace xc
