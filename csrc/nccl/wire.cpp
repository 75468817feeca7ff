#include "nccl/wire.hpp"

namespace xc {
namespace {

bool failed(NcclResult result) { return result != NcclResult::success && result != NcclResult::in_progress; }

// Both sides leave out what is empty. The first that cannot be queued is the outcome.
template <class Function>
NcclOutcome queue(const Function& function, std::span<const Transfer> transfers,
                  const NcclCommunicator& communicator, NcclHandle comm, Stream stream) {
  for (const Transfer& transfer : transfers) {
    if (transfer.bytes == 0) continue;
    const NcclResult result = function(transfer.at, static_cast<std::size_t>(transfer.bytes), NcclType::uint8,
                                       communicator.place_of(transfer.rank), comm, stream);
    if (failed(result)) return {function.name, result};
  }
  return {function.name, NcclResult::success};
}

}  // namespace

void NcclWire::exchange(std::span<const Transfer> sends, std::span<const Transfer> receives, Stream stream) {
  const NcclApi& api = communicator_->api();
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    if (const NcclResult started = api.group_start(); failed(started)) return {api.group_start.name, started};
    NcclOutcome queued = queue(api.send, sends, *communicator_, comm, stream);
    if (!failed(queued.result)) queued = queue(api.receive, receives, *communicator_, comm, stream);
    const NcclOutcome ended{api.group_end.name, api.group_end()};  // a group that was begun must be ended
    return failed(queued.result) ? queued : ended;
  });
}

float* NcclWire::own_block(float* blocks, std::int64_t elements) const {
  return blocks + communicator_->place_of(communicator_->rank()) * elements;
}

// Both in place, which NCCL knows by the address of the own block.
void NcclWire::reduce_scatter(float* blocks, std::int64_t elements, Stream stream) {
  const auto& function = communicator_->api().reduce_scatter;
  const auto count = static_cast<std::size_t>(elements);
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    return {function.name, function(blocks, own_block(blocks, elements), count, NcclType::float32,
                                    NcclReduction::sum, comm, stream)};
  });
}

void NcclWire::all_gather(float* blocks, std::int64_t elements, Stream stream) {
  const auto& function = communicator_->api().all_gather;
  const auto count = static_cast<std::size_t>(elements);
  communicator_->call([&](NcclHandle comm) -> NcclOutcome {
    return {function.name,
            function(own_block(blocks, elements), blocks, count, NcclType::float32, comm, stream)};
  });
}

}  // namespace xc
