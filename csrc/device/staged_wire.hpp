#pragma once

#include <memory>
#include <vector>

#include "device/wire.hpp"
#include "engine/rails.hpp"
#include "engine/storage.hpp"

namespace xc {

// The wire between teams by way of the host: what is sent is copied to the host's memory first, and the other
// way round what is received. It goes wherever MPI goes, and waits for the device twice in every exchange.
class StagedWire final : public DeviceWire {
 public:
  StagedWire(const Team& team, std::shared_ptr<Storage> storage, std::int64_t channel,
             Rails<float>::Wait wait);
  ~StagedWire() override;

  // An exchange has ended when it returns, so nothing runs beside it.
  void fork() override {}
  void join() override {}
  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) override;
  // Failures are told where they happen.
  void check() override {}
  void abort(const std::string&) override {}

 private:
  struct Pending {
    Wire::Transfer transfer;
    int rank;
  };
  void wait();

  Wire& wire_;
  std::shared_ptr<Storage> storage_;
  int tag_;
  Rails<float>::Wait wait_;
  std::vector<std::byte> staged_;
  std::vector<Pending> pending_;  // may still write to what is staged
};

}  // namespace xc
