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

std::vector<std::byte> content_of(std::span<const Run<float>> runs, const Bounds& bounds,
                                  std::int64_t serial) {
  std::vector<std::byte> content(sizeof(DeviceBounds) + runs.size() * sizeof(DeviceRun));
  const DeviceBounds seen{bounds.max_norm, serial, bounds.skips, static_cast<std::int64_t>(runs.size())};
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
  std::vector<std::byte> content = content_of(runs, bounds, serial_);
  size_ = content.size();
  if (device_->captures()) return capture(content);
  replays_ = false;
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

// What was captured may still be read when the next capture begins, so that gets memory of its own.
void RunTable::prepare_capture() {
  if (size_ != staged_size_) {
    staged_size_ = size_;
    staged_ = device_->staging(size_);
    captured_ = storage_->allocate(size_);
    is_captured_ = false;
    next_staged_ = nullptr;
  } else if (is_captured_ && !next_staged_) {
    next_staged_ = device_->staging(size_);
  }
}

void RunTable::capture(std::span<const std::byte> content) {
  if (staged_size_ != content.size() || (is_captured_ && !next_staged_))
    throw UsageError("take a step of the same parameters before one is captured");
  if (is_captured_) staged_ = std::move(next_staged_);
  is_captured_ = true;
  std::memcpy(staged_.get(), content.data(), content.size());
  storage_->copy(captured_.get(), staged_.get(), content.size());
  present_ = captured_.get();
}

void RunTable::stage(std::span<const Run<float>> runs, const Bounds& bounds) {
  if (!is_captured_) throw UsageError("no step was captured");
  const std::vector<std::byte> content = content_of(runs, bounds, ++serial_);
  replays_ = true;
  replayed_on_ = device_->stream();
  storage_->finish();  // the last replay may still read it
  std::memcpy(staged_.get(), content.data(), content.size());
}

void RunTable::finish_replay() const {
  const Stream now = device_->stream();
  device_->use(replayed_on_);
  storage_->finish();
  device_->use(now);
}

}  // namespace xc
