#include "nccl/wire.hpp"

namespace xc {
namespace {

bool failed(NcclResult result) { return result != NcclResult::success && result != NcclResult::in_progress; }

// Both sides leave out what is empty. The first that cannot be queued is the outcome.
template <class Function>
NcclOutcome queue(const Function& function, std::span<const Transfer> transfers, NcclHandle comm,
                  Stream stream) {
  for (const Transfer& transfer : transfers) {
    if (transfer.bytes == 0) continue;
    const NcclResult result = function(transfer.at, static_cast<std::size_t>(transfer.bytes), NcclType::uint8,
                                       transfer.rank, comm, stream);
    if (failed(result)) return {function.name, result};
  }
  return {function.name, NcclResult::success};
}

}  // namespace

void NcclWire::exchange(std::span<const Transfer> sends, std::span<const Transfer> receives, Stream stream) {
  const NcclApi& api = communicator_->api();
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    if (const NcclResult started = api.group_start(); failed(started)) return {api.group_start.name, started};
    NcclOutcome queued = queue(api.send, sends, comm, stream);
    if (!failed(queued.result)) queued = queue(api.receive, receives, comm, stream);
    const NcclOutcome ended{api.group_end.name, api.group_end()};  // a group that was begun must be ended
    return failed(queued.result) ? queued : ended;
  });
}

void NcclWire::reduce_scatter(const void* from, void* to, std::int64_t elements_per_rank, Stream stream) {
  const auto& function = communicator_->api().reduce_scatter;
  const auto count = static_cast<std::size_t>(elements_per_rank);
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    return {function.name, function(from, to, count, NcclType::float32, NcclReduction::sum, comm, stream)};
  });
}

void NcclWire::all_gather(const void* from, void* to, std::int64_t elements_per_rank, Stream stream) {
  const auto& function = communicator_->api().all_gather;
  const auto count = static_cast<std::size_t>(elements_per_rank);
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    return {function.name, function(from, to, count, NcclType::float32, comm, stream)};
  });
}

}  // namespace xc
