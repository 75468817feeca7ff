#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "device/kernels.hpp"
#include "device/wire.hpp"
#include "engine/storage.hpp"

namespace xc {

// A DEVICE has kernels that work on memory of its own. Work is queued on the stream in use, which is the
// caller's: what the caller queued there before a step comes before the step.
class Device {
 public:
  // What DLPack calls it: a type, and a number among those of that type.
  struct Place {
    std::int32_t type;
    std::int32_t index;
  };

  virtual ~Device() = default;
  virtual Place place() const = 0;
  virtual std::string name() const = 0;
  virtual const DeviceKernels& kernels() const = 0;

  // Collective: memory for what one engine keeps here, and the order of the team's work on it.
  virtual std::shared_ptr<Storage> storage(Team& team) = 0;
  // The host's memory that queued copies may read when they run, not when they are queued.
  virtual std::shared_ptr<std::byte> staging(std::size_t bytes) = 0;
  // Collective, with several teams: what goes between them past the hosts' memory; null if nothing does.
  virtual std::unique_ptr<CollectiveWire> wire(Team& team) = 0;
  virtual void launch(KernelFn kernel, const Launch& launch) = 0;
  virtual void judge(const Judgement& at) = 0;

  // Whether what is queued is recorded, to run whenever the recording is replayed, and not now.
  virtual bool captures() const = 0;

  void use(Stream stream) { stream_ = stream; }
  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

}  // namespace xc
