#include "device/staged_wire.hpp"

#include <utility>

namespace xc {

StagedWire::StagedWire(const Team& team, std::shared_ptr<Storage> storage, std::int64_t channel,
                       Rails<float>::Wait wait)
    : wire_(*team.wire()),
      storage_(std::move(storage)),
      tag_(tag_of(channel, Tag::partial)),
      wait_(std::move(wait)) {}

// What a transfer that never ended may still write to stays where it is.
StagedWire::~StagedWire() {
  if (!pending_.empty()) new std::vector<std::byte>(std::move(staged_));
}

void StagedWire::exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) {
  std::size_t bytes = 0;
  for (const auto& list : {sends, receives})
    for (const Transfer& transfer : list) bytes += static_cast<std::size_t>(transfer.bytes);
  if (bytes > staged_.size()) staged_.resize(bytes);
  std::byte* at = staged_.data();
  for (const Transfer& transfer : receives) {
    const auto count = static_cast<std::size_t>(transfer.bytes);
    pending_.push_back({wire_.receive(at, count, transfer.rank, tag_), transfer.rank});
    at += count;
  }
  std::byte* const outgoing = at;
  for (const Transfer& transfer : sends) {
    storage_->copy(at, transfer.at, static_cast<std::size_t>(transfer.bytes));
    at += transfer.bytes;
  }
  storage_->finish();
  at = outgoing;
  for (const Transfer& transfer : sends) {
    const auto count = static_cast<std::size_t>(transfer.bytes);
    pending_.push_back({wire_.send(at, count, transfer.rank, tag_), transfer.rank});
    at += count;
  }
  wait();
  at = staged_.data();
  for (const Transfer& transfer : receives) {
    storage_->copy(transfer.at, at, static_cast<std::size_t>(transfer.bytes));
    at += transfer.bytes;
  }
  storage_->finish();
}

void StagedWire::wait() {
  const auto done = [this] {
    std::erase_if(pending_, [this](const Pending& one) { return wire_.done(one.transfer); });
    return pending_.empty();
  };
  const auto awaited = [this] {
    std::vector<int> ranks;
    for (const Pending& one : pending_) ranks.push_back(one.rank);
    return ranks;
  };
  if (!done()) wait_(done, awaited);
}

}  // namespace xc
