#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "device/device.hpp"
#include "engine/judge.hpp"
#include "engine/passes.hpp"

namespace xc {

// The runs of a step in the device's memory, behind the bounds of its norm. What the host brings is there
// already, most often, so it is compared first. While the device captures, the copy is part of the recording:
// each replay takes it from what is staged by then.
class RunTable {
 public:
  RunTable(std::shared_ptr<Device> device, std::shared_ptr<Storage> storage)
      : device_(std::move(device)), storage_(std::move(storage)) {}

  void upload(std::span<const Run<float>> runs, const Bounds& bounds = {});
  // Where they are. A kernel that changes them says so.
  DeviceBounds* bounds() const { return reinterpret_cast<DeviceBounds*>(present_); }
  const DeviceRun* runs() const { return reinterpret_cast<const DeviceRun*>(bounds() + 1); }
  void changed() { content_.clear(); }
  // What comes next is of another step.
  void begin_step() { ++serial_; }

  // Makes what captures of as many runs take; while work is captured no memory can be made.
  void prepare_capture();
  // For the next replay; from then on until an upload, replays are the steps that are taken.
  bool replays() const { return replays_; }
  void stage(std::span<const Run<float>> runs, const Bounds& bounds);
  // Waits for the stream on which that was said.
  void finish_replay() const;
  // Of the step whose runs came last; no two have the same.
  std::int64_t serial() const { return serial_; }
  // What a recording refers to, whatever takes its place here.
  std::vector<std::shared_ptr<std::byte>> captured() const { return {staged_, captured_}; }

 private:
  void capture(std::span<const std::byte> content);

  std::shared_ptr<Device> device_;
  std::shared_ptr<Storage> storage_;
  std::vector<std::byte> content_;  // of memory_
  std::shared_ptr<std::byte> memory_;
  std::size_t capacity_ = 0;
  std::size_t size_ = 0;
  std::byte* present_ = nullptr;  // memory_ or captured_
  std::shared_ptr<std::byte> staged_;
  std::shared_ptr<std::byte> captured_;
  std::size_t staged_size_ = 0;
  std::shared_ptr<std::byte> next_staged_;  // for the next capture, if staged_ has been captured
  bool is_captured_ = false;
  bool replays_ = false;
  Stream replayed_on_ = nullptr;
  std::int64_t serial_ = 0;
};

}  // namespace xc
