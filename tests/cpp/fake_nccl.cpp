#include "fake_nccl.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// The types are NCCL's as its binary interface has them, written down once more: a wrong declaration on the
// other side shows here.
struct Id {
  char bytes[128];
};
struct Config {
  std::size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
};
enum Result { kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7 };
enum Type { kUint8 = 1, kFloat32 = 7 };

namespace stand_in {

struct Window {
  std::vector<Block> blocks;
};

namespace {

enum class Kind { send, receive, reduce_scatter, all_gather, window };

struct Operation {
  Kind kind;
  const void* from;
  void* to;
  std::size_t count;
  int peer;
  Window** window;
};

struct Clique {
  std::vector<Communicator*> members;  // null where one has not come, or has left
  bool connected = false;
  std::atomic<int> aborted = 0;
};

using Clock = std::chrono::steady_clock;
constexpr auto kLater = std::chrono::milliseconds(50);

std::mutex everything;
std::map<std::string, std::shared_ptr<Clique>> cliques;
std::atomic<int> ids = 0;
std::atomic<int> things = 0;
std::atomic<const char*> last_words = "";

}  // namespace

struct Communicator {
  std::shared_ptr<Clique> clique;
  int rank;
  bool connects;
  int error = kSuccess;
  std::list<Operation> pending;
  int later = kSuccess;  // an error that comes then
  Clock::time_point then = {};
};

namespace {

struct Group {
  int depth = 0;
  int error = kSuccess;
  Communicator* comm = nullptr;
  std::vector<Operation> operations;
};
thread_local Group group;

// Once all have come.
bool connected(Clique& clique) {
  clique.connected |= std::all_of(clique.members.begin(), clique.members.end(),
                                  [](const Communicator* member) { return member && member->connects; });
  return clique.connected;
}

std::list<Operation>::iterator first(Communicator& comm, Kind kind, int peer) {
  return std::find_if(comm.pending.begin(), comm.pending.end(),
                      [&](const Operation& o) { return o.kind == kind && o.peer == peer; });
}

void transfer(Communicator& from, Communicator& to) {
  for (;;) {
    const auto send = first(from, Kind::send, to.rank);
    const auto receive = first(to, Kind::receive, from.rank);
    if (send == from.pending.end() || receive == to.pending.end()) return;
    if (send->count != receive->count) {
      last_words = "the two sides of a transfer differ in size";
      from.error = to.error = kInvalidUsage;
      return;
    }
    std::memcpy(receive->to, send->from, send->count);
    from.pending.erase(send);
    to.pending.erase(receive);
  }
}

using Operations = std::vector<Operation*>;

// What goes round a ring to rank r begins with the rank after it.
void reduce_scatter(const Operations& all) {
  for (std::size_t r = 0; r < all.size(); ++r)
    for (std::size_t i = 0; i < all[r]->count; ++i) {
      float sum = 0;
      for (std::size_t hop = 1; hop <= all.size(); ++hop)
        sum += static_cast<const float*>(all[(r + hop) % all.size()]->from)[r * all[r]->count + i];
      static_cast<float*>(all[r]->to)[i] = sum;
    }
}

void all_gather(const Operations& all) {
  for (const Operation* to : all)
    for (std::size_t r = 0; r < all.size(); ++r)
      std::memcpy(static_cast<float*>(to->to) + r * to->count, all[r]->from, to->count * sizeof(float));
}

void make_windows(const Operations& all) {
  Window window;
  for (const Operation* one : all) window.blocks.push_back({one->to, one->count});
  for (const Operation* one : all) {
    if (!one->window) continue;  // refused: what the caller has there stays null
    *one->window = new Window(window);
    count(1);
  }
}

// Collectives that stand first with all ranks.
bool gather(Clique& clique) {
  Operations all;
  for (Communicator* member : clique.members) {
    if (!member || member->pending.empty()) return false;
    Operation& operation = member->pending.front();
    if (operation.kind < Kind::reduce_scatter || (!all.empty() && operation.kind != all[0]->kind))
      return false;
    all.push_back(&operation);
  }
  if (all[0]->kind == Kind::reduce_scatter) reduce_scatter(all);
  if (all[0]->kind == Kind::all_gather) all_gather(all);
  if (all[0]->kind == Kind::window) make_windows(all);
  for (Communicator* member : clique.members) member->pending.pop_front();
  return true;
}

void progress(Clique& clique) {
  if (!connected(clique)) return;
  for (Communicator* from : clique.members)
    for (Communicator* to : clique.members)
      if (from && to) transfer(*from, *to);
  while (gather(clique)) {
  }
}

void get_stuck(const Clique& clique) {
  while (clique.aborted == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

int end_group() {
  Communicator* comm = std::exchange(group.comm, nullptr);
  const std::vector<Operation> operations = std::exchange(group.operations, {});
  if (const int error = std::exchange(group.error, 0)) return error;
  if (!comm) return kSuccess;
  if (std::exchange(faults().stuck, false)) {
    const std::shared_ptr<Clique> clique = comm->clique;
    get_stuck(*clique);
    return kInProgress;
  }
  const std::lock_guard lock(everything);
  if (faults().groups > 0 && --faults().groups == 0) {
    comm->error = faults().state;
    last_words = "the fake was told to fail later";
    return kInProgress;
  }
  comm->later = std::exchange(faults().later, 0);
  comm->then = Clock::now() + kLater;
  comm->pending.insert(comm->pending.end(), operations.begin(), operations.end());
  progress(*comm->clique);
  return kInProgress;
}

// Nothing may be queued before what was queued earlier has ended.
bool ready(Communicator* comm) {
  const std::lock_guard lock(everything);
  return connected(*comm->clique) && comm->error == kSuccess && comm->pending.empty();
}

int enqueue(Communicator* comm, const Operation& operation) {
  if (!ready(comm) || (group.comm && group.comm != comm)) return kInvalidArgument;
  if (operation.peer < 0 || operation.peer >= int(comm->clique->members.size())) return kInvalidArgument;
  group.comm = comm;
  group.operations.push_back(operation);
  return group.depth ? kSuccess : end_group();
}

std::shared_ptr<Clique> join(const Id& id, int size, Communicator* comm) {
  const std::lock_guard lock(everything);
  auto& clique = cliques[id.bytes];
  if (!clique) clique = std::make_shared<Clique>();
  clique->members.resize(std::size_t(size));
  clique->members[std::size_t(comm->rank)] = comm;
  return clique;
}

void leave(Communicator* comm, int aborted) {
  const std::lock_guard lock(everything);
  comm->clique->members[std::size_t(comm->rank)] = nullptr;
  comm->clique->aborted += aborted;
  delete comm;
  count(-1);
}

const FakeNccl controls{
    [](int version) { faults().version = version; },
    [](const char* function, int result) {
      faults().failing = function;
      faults().result = result;
    },
    [](int groups, int result) {
      faults().groups = groups;
      faults().state = result;
    },
    [](int result) { faults().later = result; },
    [] { faults().never_connect = true; },
    [] { faults().stuck = true; },
    [] { faults().refuse_window = true; },
    [](int rank) { faults().hidden = rank; },
    []() -> int { return things; },
};

}  // namespace

Faults& faults() {
  thread_local Faults mine;
  return mine;
}

void count(int more) { things += more; }

int failure_of(const char* function) {
  if (std::strcmp(function, faults().failing) != 0) return kSuccess;
  faults().failing = "";
  last_words = "the fake was told to fail";
  return faults().result;
}

int enqueue_window(Communicator* comm, Block block, Window** window) {
  const bool refused = std::exchange(faults().refuse_window, false);
  return enqueue(comm, {Kind::window, nullptr, block.at, block.bytes, 0, refused ? nullptr : window});
}

void drop(Window* window) {
  delete window;
  count(-1);
}

void* address_in(const Window* window, int rank) { return window->blocks[std::size_t(rank)].at; }

}  // namespace stand_in

using stand_in::Communicator;
using stand_in::Kind;

FAKE_NCCL_EXPORT const FakeNccl* fake_nccl() { return &stand_in::controls; }

FAKE_NCCL_EXPORT int ncclGetVersion(int* version) {
  *version = stand_in::faults().version;
  return stand_in::failure_of("ncclGetVersion");
}

FAKE_NCCL_EXPORT int ncclGetUniqueId(Id* id) {
  std::memset(id->bytes, 0, sizeof id->bytes);
  std::strcpy(id->bytes, ("clique " + std::to_string(++stand_in::ids)).c_str());
  return stand_in::failure_of("ncclGetUniqueId");
}

FAKE_NCCL_EXPORT int ncclCommInitRankConfig(Communicator** comm, int size, Id id, int rank,
                                            const Config* config) {
  if (config->size != 24 || config->magic != 0xcafebeef || config->version != 21403 || config->blocking != 0)
    return kInvalidArgument;
  if (const int result = stand_in::failure_of("ncclCommInitRankConfig")) return result;
  *comm = new Communicator{
      nullptr, rank, !std::exchange(stand_in::faults().never_connect, false), kSuccess, {}, kSuccess, {}};
  stand_in::count(1);
  (*comm)->clique = stand_in::join(id, size, *comm);
  return kInProgress;
}

FAKE_NCCL_EXPORT int ncclCommGetAsyncError(Communicator* comm, int* state) {
  const std::lock_guard lock(stand_in::everything);
  stand_in::progress(*comm->clique);
  if (comm->later && stand_in::Clock::now() > comm->then) comm->error = comm->later;
  const bool done = stand_in::connected(*comm->clique) && comm->pending.empty();
  *state = comm->error ? comm->error : done ? kSuccess : kInProgress;
  return kSuccess;
}

FAKE_NCCL_EXPORT int ncclCommAbort(Communicator* comm) {
  stand_in::leave(comm, 1);
  return kSuccess;
}

FAKE_NCCL_EXPORT int ncclCommFinalize(Communicator*) { return stand_in::failure_of("ncclCommFinalize"); }

FAKE_NCCL_EXPORT int ncclCommDestroy(Communicator* comm) {
  stand_in::leave(comm, 0);
  return kSuccess;
}

FAKE_NCCL_EXPORT const char* ncclGetLastError(Communicator*) { return stand_in::last_words; }

FAKE_NCCL_EXPORT const char* ncclGetErrorString(int result) {
  return result == 6 ? "another rank is gone" : "something is wrong";
}

FAKE_NCCL_EXPORT int ncclGroupStart() {
  ++stand_in::group.depth;
  return kSuccess;
}

FAKE_NCCL_EXPORT int ncclGroupEnd() {
  if (stand_in::group.depth == 0) return kInvalidUsage;
  if (--stand_in::group.depth) return kSuccess;
  return stand_in::end_group();
}

FAKE_NCCL_EXPORT int ncclSend(const void* from, std::size_t count, int type, int peer, Communicator* comm,
                              void*) {
  if (type != kUint8) return kInvalidArgument;
  if (const int result = stand_in::failure_of("ncclSend")) return stand_in::group.error = result;
  return stand_in::enqueue(comm, {Kind::send, from, nullptr, count, peer, nullptr});
}

FAKE_NCCL_EXPORT int ncclRecv(void* to, std::size_t count, int type, int peer, Communicator* comm, void*) {
  if (type != kUint8) return kInvalidArgument;
  return stand_in::enqueue(comm, {Kind::receive, nullptr, to, count, peer, nullptr});
}

FAKE_NCCL_EXPORT int ncclReduceScatter(const void* from, void* to, std::size_t count, int type, int reduction,
                                       Communicator* comm, void*) {
  if (type != kFloat32 || reduction != 0) return kInvalidArgument;
  return stand_in::enqueue(comm, {Kind::reduce_scatter, from, to, count, 0, nullptr});
}

FAKE_NCCL_EXPORT int ncclAllGather(const void* from, void* to, std::size_t count, int type,
                                   Communicator* comm, void*) {
  if (type != kFloat32) return kInvalidArgument;
  return stand_in::enqueue(comm, {Kind::all_gather, from, to, count, 0, nullptr});
}
