#include "nccl/memory.hpp"

#include "core/error.hpp"

namespace xc {
namespace {

template <class Signature>
std::string lack_of(const NcclApi& api, const NcclFunction<Signature>& function) {
  if (function) return {};
  return api.name() + " has no " + function.name + ", which came with " + nccl_version_text(function.since);
}

// What stands against memory that peers can reach; nothing if nothing does. The newest function first, as its
// version is the one to have.
std::string lack_of_functions(const NcclApi& api) {
  for (const std::string& lack :
       {lack_of(api, api.peer_pointer), lack_of(api, api.window_register),
        lack_of(api, api.window_deregister), lack_of(api, api.mem_alloc), lack_of(api, api.mem_free)})
    if (!lack.empty()) return lack;
  return {};
}

}  // namespace

std::variant<std::unique_ptr<NcclMemory>, NcclRefusal> NcclMemory::share(
    std::shared_ptr<NcclCommunicator> communicator, std::size_t bytes) {
  const NcclCommunicator& ranks = *communicator;
  const auto refused = [&ranks](const std::string& mine) { return ranks.first_complaint(mine); };
  if (std::string why = refused(lack_of_functions(ranks.api())); !why.empty())
    return NcclRefusal{std::move(why)};
  std::unique_ptr<NcclMemory> memory(new NcclMemory(communicator, bytes));
  if (std::string why = refused(memory->allocate()); !why.empty()) return NcclRefusal{std::move(why)};
  if (std::string why = refused(memory->register_window()); !why.empty()) return NcclRefusal{std::move(why)};
  if (std::string why = refused(complaint_of([&] { memory->find_peers(); })); !why.empty())
    return NcclRefusal{std::move(why)};
  return memory;
}

NcclMemory::~NcclMemory() {
  const NcclApi& api = communicator_->api();
  if (window_)
    complaint_of([&] {  // where the communicator has ended, so has the window
      communicator_->call([&](NcclHandle comm) -> NcclOutcome {
        return {api.window_deregister.name, api.window_deregister(comm, window_)};
      });
    });
  if (mine_) api.mem_free(mine_);
}

std::string NcclMemory::allocate() {
  const NcclApi& api = communicator_->api();
  const NcclResult result = api.mem_alloc(&mine_, bytes_);
  return result == NcclResult::success ? "" : api.words(api.mem_alloc.name, result);
}

// Registering may succeed and give no window.
std::string NcclMemory::register_window() {
  const NcclApi& api = communicator_->api();
  const std::string failure = complaint_of([&] {
    communicator_->call([&](NcclHandle comm) -> NcclOutcome {
      return {api.window_register.name,
              api.window_register(comm, mine_, bytes_, &window_, kNcclSymmetricWindow)};
    });
  });
  if (const std::string first = communicator_->first_complaint(failure); !first.empty()) {
    communicator_->abort(first);  // a rank without its communicator is no use to the others
    throw CommError(first);
  }
  if (window_) return {};
  return "NCCL makes no symmetric window here: all GPUs must reach each other peer to peer, and neither "
         "NCCL_CUMEM_ENABLE nor NCCL_WIN_ENABLE may be 0 [" +
         api.name() + "]";
}

void NcclMemory::find_peers() {
  const NcclApi& api = communicator_->api();
  const std::vector<int>& members = communicator_->members();
  pointers_.assign(members.size(), nullptr);
  for (const int rank : members) {
    const int place = communicator_->place_of(rank);
    void*& at = pointers_[static_cast<std::size_t>(place)];
    const NcclOutcome asked = communicator_->begin([&](NcclHandle) -> NcclOutcome {
      return {api.peer_pointer.name, api.peer_pointer(window_, 0, place, &at)};
    });
    if (asked.result != NcclResult::success) throw CommError(api.words(asked.doing, asked.result));
    if (!at) throw CommError("its GPU does not reach the memory of rank " + std::to_string(rank));
  }
  pointers_[static_cast<std::size_t>(communicator_->place_of(communicator_->rank()))] = mine_;
}

}  // namespace xc
