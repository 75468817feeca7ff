#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "device/device.hpp"

namespace xc {

// The host as a device: the kernels' bodies called by loops, on the host's shared memory, each launch
// complete when it returns. It is for tests: all that an engine does on a device it does on this one, where
// sanitizers and machines without a GPU can look at it. Between begin_capture() and end_capture() work is
// recorded.
class HostDevice : public Device {
 public:
  Place place() const override;
  std::string name() const override { return "host"; }
  const DeviceKernels& kernels() const override;
  std::shared_ptr<Storage> storage(Team& team) override;
  std::shared_ptr<std::byte> staging(std::size_t bytes) override;
  std::unique_ptr<CollectiveWire> wire(Team&) override { return nullptr; }
  void launch(KernelFn kernel, const Launch& launch) override;
  void judge(const Judgement& at) override;
  bool captures() const override { return captures_; }

  void begin_capture();
  void end_capture() { captures_ = false; }
  void replay();
  // How often engines have announced work here; their ranks must have done so equally often.
  int announcements() const { return announcements_; }
  void count_announcement() { ++announcements_; }
  // Runs the work now, or records it.
  void queue(std::function<void()> work);

 private:
  bool captures_ = false;
  int announcements_ = 0;
  std::vector<std::function<void()>> recorded_;
};

}  // namespace xc
