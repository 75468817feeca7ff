#include "device/run_table.hpp"

#include <algorithm>
#include <cstring>

#include "core/error.hpp"

namespace xc {
namespace {

DeviceRun device_run(const Run<float>& run) {
  DeviceRun seen{};
  seen.first_byte = run.byte_begin - run.begin * run.element_size;
  seen.scale = run.scale;
  seen.own = run.own;
  seen.clip = run.kernel ? run.clip : 1.0f;
  seen.decay = run.decay;
  seen.own_rate = run.own_rate;
  seen.shared_rate = run.shared_rate;
  seen.direction = run.extrapolation->direction;
  seen.clipped = run.clipped;
  seen.scaled = run.scaled && seen.direction != Direction::none;
  seen.random = run.extrapolation->random ? static_cast<std::int32_t>(*run.extrapolation->random) : -1;
  seen.noise = run.noise;
  std::memcpy(seen.scalars, run.scalars, sizeof seen.scalars);
  return seen;
}

std::vector<std::byte> content_of(std::span<const Run<float>> runs, const Bounds& bounds) {
  std::vector<std::byte> content(sizeof(DeviceBounds) + runs.size() * sizeof(DeviceRun));
  const DeviceBounds seen{bounds.max_norm, bounds.skips, static_cast<std::int32_t>(runs.size())};
  std::memcpy(content.data(), &seen, sizeof seen);
  std::byte* at = content.data() + sizeof seen;
  for (const Run<float>& run : runs) {
    const DeviceRun next = device_run(run);
    std::memcpy(at, &next, sizeof next);
    at += sizeof next;
  }
  return content;
}

}  // namespace

void RunTable::upload(std::span<const Run<float>> runs, const Bounds& bounds) {
  std::vector<std::byte> content = content_of(runs, bounds);
  size_ = content.size();
  replays_ = false;
  if (device_->captures()) return capture(content);
  if (content.size() > capacity_) {
    memory_ = storage_->allocate(content.size());
    capacity_ = content.size();
    content_.clear();
  }
  present_ = memory_.get();
  if (content == content_) return;
  content_ = std::move(content);
  storage_->copy(present_, content_.data(), content_.size());
}

void RunTable::prepare_capture() {
  if (device_->captures() || size_ == staged_size_) return;
  staged_size_ = size_;
  staged_ = device_->staging(staged_size_);
  captured_ = storage_->allocate(staged_size_);
}

void RunTable::capture(std::span<const std::byte> content) {
  if (staged_size_ != content.size())
    throw UsageError("take a step of the same parameters before one is captured");
  std::memcpy(staged_.get(), content.data(), content.size());
  storage_->copy(captured_.get(), staged_.get(), content.size());
  present_ = captured_.get();
}

void RunTable::stage(std::span<const Run<float>> runs, const Bounds& bounds) {
  if (!staged_) throw UsageError("no step was captured");
  const std::vector<std::byte> content = content_of(runs, bounds);
  replays_ = true;
  storage_->finish();  // the last replay may still read it
  std::memcpy(staged_.get(), content.data(), content.size());
}

}  // namespace xc
