#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "nccl/communicator.hpp"

namespace xc {

// Device memory that all ranks of a communicator can load from and store to: each rank brings a block of the
// same size, NCCL makes them known to all as one symmetric window, and tells where the peers' blocks lie in
// this process. So kernels get plain addresses and need nothing of NCCL's. It takes NCCL 2.29.2 and GPUs that
// reach each other; where it cannot be had, the reason says why, and other ways remain.
//
// A rank's own block has one address here, that of the allocation: reading through one mapping what was
// written through another in the same kernel is undefined.
struct NcclRefusal {
  std::string reason;
};

class NcclMemory {
 public:
  // Collective: all ranks get memory, or all the same refusal, which leaves the communicator as it was.
  // CommError on all ranks if registering fails. The memory's contents are undefined.
  static std::variant<std::unique_ptr<NcclMemory>, NcclRefusal> share(
      std::shared_ptr<NcclCommunicator> communicator, std::size_t bytes);
  // Collective in NCCL's eyes: ranks destroy their memory in the same order, when nobody uses it any more.
  ~NcclMemory();
  NcclMemory(const NcclMemory&) = delete;
  NcclMemory& operator=(const NcclMemory&) = delete;

  std::size_t bytes() const { return bytes_; }
  // Where the blocks of the communicator's members lie.
  const std::vector<void*>& pointers() const { return pointers_; }

 private:
  NcclMemory(std::shared_ptr<NcclCommunicator> communicator, std::size_t bytes)
      : communicator_(std::move(communicator)), bytes_(bytes) {}
  std::string allocate();
  std::string register_window();
  void find_peers();

  std::shared_ptr<NcclCommunicator> communicator_;
  std::size_t bytes_;
  void* mine_ = nullptr;
  NcclWindow window_ = nullptr;
  std::vector<void*> pointers_;
};

}  // namespace xc
