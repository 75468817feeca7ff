#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "check.hpp"
#include "core/error.hpp"
#include "nccl/memory.hpp"
#include "nccl/wire.hpp"
#include "party.hpp"

// NCCL's part without a GPU: ranks are threads, and the library is one that moves bytes between them and
// fails when it is told to. The paths of its variants come from CMake.

using namespace xc;
using namespace std::chrono_literals;

namespace {

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "\"%s\" lacks \"%s\"\n", text.c_str(), part.c_str());
  return false;
}

// --- the library ---

void a_library_is_named_by_path_or_found_in_the_process() {
  fake();
  const NcclApi named = NcclApi::load(FAKE_NCCL);
  CHECK(named.version == 23007 && named.path == FAKE_NCCL && named.mem_alloc && named.peer_pointer);
  const NcclApi found = NcclApi::load("");  // its name to the loader is that of NCCL
  CHECK(found.send.at == named.send.at);
  const NcclApi old = NcclApi::load(FAKE_NCCL_OLD);
  CHECK(old.send && !old.mem_alloc && !old.window_register && !old.peer_pointer);
}

void a_library_that_does_not_do_is_an_error_that_says_why() {
  CHECK(has(thrown<CommError>([] { NcclApi::load("/nowhere/libnccl.so.2"); }), "/nowhere/libnccl.so.2"));
  CHECK(has(thrown<CommError>([] { NcclApi::load("libm.so.6"); }), "libm.so.6 is no NCCL"));
  const std::string part = thrown<CommError>([] { NcclApi::load(FAKE_NCCL_PART); });
  CHECK(has(part, "NCCL 2.30.7 (" FAKE_NCCL_PART ") has no ncclGetUniqueId: NCCL 2.14.3 or newer"));
  fake().report_version(2803);
  const std::string old = thrown<CommError>([] { NcclApi::load(FAKE_NCCL); });
  fake().report_version(23007);
  CHECK(has(old, "NCCL 2.8.3 (" FAKE_NCCL ") is too old: NCCL 2.14.3 or newer"));
}

// --- connecting ---

void a_rank_without_a_library_is_an_error_on_all_ranks() {
  Party party(3);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    if (rank == 1) options.library = "/nowhere/libnccl.so.2";
    const std::string text = thrown<CommError>([&] { NcclCommunicator communicator(options); });
    CHECK(has(text, "rank 1: NCCL cannot be opened: /nowhere"));
  });
}

void different_versions_are_a_mismatch_on_all_ranks() {
  Party party(3);
  party.run([&](int rank) {
    if (rank == 1) fake().report_version(22907);
    const std::string text = thrown<MismatchError>([&] { party.communicator(rank); });
    CHECK(has(text, "NCCL 2.29.7 (" FAKE_NCCL ") on rank 1, NCCL 2.30.7 (" FAKE_NCCL ") on ranks 0, 2"));
  });
}

void a_rank_that_is_never_ready_is_an_error_within_the_deadline() {
  Party party(2);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    options.patience = 150ms;
    if (rank == 1) fake().never_connect();
    const auto start = std::chrono::steady_clock::now();
    const std::string text = thrown<CommError>([&] { NcclCommunicator communicator(options); });
    CHECK(std::chrono::steady_clock::now() - start < 5s);
    CHECK(has(text, "rank 0: ncclCommInitRankConfig did not end within 0.15 s"));
  });
  CHECK(fake().alive() == 0);
}

void a_rank_that_cannot_connect_is_an_error_on_all_ranks() {
  Party party(2);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    options.patience = 150ms;
    if (rank == 0) fake().fail_next("ncclCommInitRankConfig", 2);
    const std::string text = thrown<CommError>([&] { NcclCommunicator communicator(options); });
    CHECK(has(text, "rank 0: ncclCommInitRankConfig failed: something is wrong: the fake was told to fail"));
  });
  CHECK(fake().alive() == 0);
}

// --- transfers ---

std::size_t odd_size(int from, int to, int round) {
  return static_cast<std::size_t>((from * 7 + to * 3 + round * 5) % 4 * 1013 + (from == to ? 1 : 0));
}

std::byte filling(int from, int to, int round) { return static_cast<std::byte>(from * 16 + to * 4 + round); }

struct Letters {
  std::vector<std::vector<std::byte>> blocks;
  std::vector<Transfer> transfers;

  void add(int rank, std::size_t bytes, std::byte value) {
    blocks.emplace_back(bytes, value);
    transfers.push_back({rank, blocks.back().data(), static_cast<std::int64_t>(bytes)});
  }
};

// Every rank to every rank, itself too; some messages are empty.
void exchange_all_with_all(NcclWire& wire, int rank, int size, int round) {
  Letters out;
  Letters in;
  for (int other = 0; other < size; ++other) {
    out.add(other, odd_size(rank, other, round), filling(rank, other, round));
    in.add(other, odd_size(other, rank, round), std::byte{0xff});
  }
  wire.exchange(out.transfers, in.transfers, nullptr);
  for (int other = 0; other < size; ++other)
    for (const std::byte value : in.blocks[static_cast<std::size_t>(other)])
      CHECK(value == filling(other, rank, round));
}

void every_rank_gets_what_the_others_sent() {
  for (const int size : {1, 2, 3, 4}) {
    Party party(size);
    party.run([&](int rank) {
      NcclWire wire(party.communicator(rank));
      for (int round = 0; round < 4; ++round) exchange_all_with_all(wire, rank, size, round);
      wire.exchange({}, {}, nullptr);
      wire.check();
    });
  }
  CHECK(fake().alive() == 0);
}

void two_messages_to_one_rank_keep_their_order() {
  Party party(2);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    Letters out;
    Letters in;
    for (int i = 0; i < 3; ++i) out.add(1 - rank, 10, std::byte(i));
    for (int i = 0; i < 3; ++i) in.add(1 - rank, 10, std::byte{0xff});
    wire.exchange(out.transfers, in.transfers, nullptr);
    for (int i = 0; i < 3; ++i) CHECK(in.blocks[std::size_t(i)][9] == std::byte(i));
  });
}

void sums_are_scattered_and_gathered() {
  for (const int size : {1, 3, 4}) {
    Party party(size);
    party.run([&](int rank) {
      NcclWire wire(party.communicator(rank));
      std::vector<float> all(static_cast<std::size_t>(5 * size));
      std::iota(all.begin(), all.end(), static_cast<float>(rank));
      wire.reduce_scatter(all.data(), 5, nullptr);
      wire.all_gather(all.data(), 5, nullptr);
      for (std::size_t i = 0; i < all.size(); ++i)
        CHECK(all[i] == static_cast<float>(static_cast<int>(i) * size + size * (size - 1) / 2));
    });
  }
}

// Two parts of two ranks each, whose places are in the order that they are named in.
void parts_of_all_ranks_are_connected_on_their_own() {
  Party party(4);
  party.run([&](int rank) {
    const std::vector<int> members = rank % 3 ? std::vector{2, 1} : std::vector{0, 3};
    NcclWire wire(party.communicator(rank, members));
    const int other = members[0] == rank ? members[1] : members[0];
    Letters out;
    Letters in;
    out.add(other, 10, std::byte(rank));
    in.add(other, 10, std::byte{0xff});
    wire.exchange(out.transfers, in.transfers, nullptr);
    CHECK(in.blocks[0][9] == std::byte(other));
    std::vector<float> blocks = {static_cast<float>(rank), static_cast<float>(10 * rank)};
    wire.reduce_scatter(blocks.data(), 1, nullptr);
    wire.all_gather(blocks.data(), 1, nullptr);
    CHECK(blocks[0] == 3 && blocks[1] == 30);
  });
  CHECK(fake().alive() == 0);
}

void a_failure_in_one_part_is_an_error_in_all() {
  Party party(4);
  party.run([&](int rank) {
    if (rank == 3) fake().fail_next("ncclCommInitRankConfig", 2);
    NcclOptions options = party.options(rank);
    options.patience = 150ms;
    options.members = rank % 2 ? std::vector{1, 3} : std::vector{0, 2};
    const std::string text = thrown<CommError>([&] { NcclCommunicator communicator(options); });
    CHECK(has(text, "rank 1: ncclCommInitRankConfig did not end"));
  });
  CHECK(fake().alive() == 0);
}

// --- failures ---

Transfer to_or_from(int rank, std::vector<std::byte>& block) {
  return {rank, block.data(), static_cast<std::int64_t>(block.size())};
}

void exchange_one(NcclWire& wire, int other, std::size_t bytes = 8) {
  std::vector<std::byte> out(bytes);
  std::vector<std::byte> in(8);
  const Transfer send = to_or_from(other, out);
  const Transfer receive = to_or_from(other, in);
  wire.exchange({&send, 1}, {&receive, 1}, nullptr);
}

std::string failure_of(NcclWire& wire) {
  for (;;) {
    const std::string text = complaint_of([&] { wire.check(); });
    if (!text.empty()) return text;
    std::this_thread::sleep_for(1ms);
  }
}

void a_failure_is_told_on_its_rank_and_an_abort_ends_the_others_waits() {
  Party party(3);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    const int next = (rank + 1) % 3;
    if (rank == 1) {
      fake().fail_after(1, 6);
      const std::string text = thrown<CommError>([&] { exchange_one(wire, next); });
      CHECK(has(
          text,
          "rank 1: ncclGroupEnd failed: another rank is gone: the fake was told to fail later [NCCL 2.30.7"));
      CHECK(text == failure_of(wire));
      party.meet();
      return;
    }
    std::thread liveness([&] {
      party.meet();
      wire.abort("rank 1 has left");
    });
    CHECK(thrown<CommError>([&] { exchange_one(wire, next == 1 ? 1 : rank - 1); }) == "rank 1 has left");
    liveness.join();
    CHECK(failure_of(wire) == "rank 1 has left");
    CHECK(thrown<CommError>([&] { exchange_one(wire, next); }) == "rank 1 has left");
  });
  CHECK(fake().alive() == 0);
}

void two_sides_that_differ_in_size_fail() {
  Party party(2);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    const std::string text = thrown<CommError>([&] { exchange_one(wire, 1 - rank, rank ? 9 : 8); });
    CHECK(has(text, "the two sides of a transfer differ in size"));
  });
}

// On a slow machine the call itself finds it, which is as well.
void the_watchdog_finds_a_failure_that_comes_after_the_call() {
  Party party(2);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    if (rank == 1) fake().fail_later(6);
    complaint_of([&] { exchange_one(wire, 1 - rank); });
    if (rank == 1) CHECK(has(failure_of(wire), "rank 1: a transfer by NCCL failed: another rank is gone"));
    party.meet();
  });
  CHECK(fake().alive() == 0);
}

void what_cannot_be_queued_fails_with_its_name() {
  Party party(2);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    if (rank == 0) {
      fake().fail_next("ncclSend", 4);
      CHECK(has(thrown<CommError>([&] { exchange_one(wire, 1); }), "rank 0: ncclSend failed"));
    }
    CHECK(has(thrown<CommError>([&] { wire.abort("given up"), wire.check(); }),
              rank == 0 ? "ncclSend" : "given up"));
  });
}

void a_rank_that_never_comes_ends_a_wait_within_the_deadline() {
  Party party(2);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    options.patience = 100ms;
    NcclWire wire(std::make_shared<NcclCommunicator>(options));
    if (rank == 0)
      CHECK(has(thrown<CommError>([&] { exchange_one(wire, 1); }), "ncclGroupEnd did not end within 0.1 s"));
    party.meet();
  });
}

void an_abort_is_done_once_whoever_asks_and_how_often() {
  Party party(1);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    const auto abort = [&](const char* reason) {
      return std::thread([&wire, reason] { wire.abort(reason); });
    };
    std::thread one = abort("one");
    std::thread two = abort("two");
    one.join();
    two.join();
    CHECK(fake().alive() == 0);
    const std::string reason = thrown<CommError>([&] { wire.check(); });
    CHECK(reason == "one" || reason == "two");
    wire.abort("three");
    CHECK(thrown<CommError>([&] { exchange_one(wire, 0); }) == reason);
  });
}

void an_abort_does_not_wait_for_a_thread_that_is_stuck_in_a_call() {
  Party party(2);
  party.run([&](int rank) {
    NcclWire wire(party.communicator(rank));
    if (rank == 0) {
      fake().get_stuck();
      std::thread other([&] { wire.abort("nobody comes back"); });
      CHECK(thrown<CommError>([&] { exchange_one(wire, 1); }) == "nobody comes back");
      other.join();
    }
    party.meet();
  });
  CHECK(fake().alive() == 0);
}

// --- memory ---

using Shared = std::variant<std::unique_ptr<NcclMemory>, NcclRefusal>;

void every_rank_reaches_the_memory_of_all() {
  for (const int size : {1, 2, 4}) {
    Party party(size);
    party.run([&](int rank) {
      const auto communicator = party.communicator(rank);
      {
        const Shared shared = NcclMemory::share(communicator, 64 * sizeof(int));
        const NcclMemory& memory = *std::get<0>(shared);
        CHECK(memory.bytes() == 64 * sizeof(int) &&
              memory.pointers().size() == static_cast<std::size_t>(size));
        static_cast<int*>(memory.pointers()[static_cast<std::size_t>(rank)])[63] = rank + 10;
        party.meet();
        for (int r = 0; r < size; ++r)
          CHECK(static_cast<int*>(memory.pointers()[std::size_t(r)])[63] == r + 10);
        party.meet();
      }
      NcclWire wire(communicator);
      exchange_all_with_all(wire, rank, size, 0);
    });
  }
  CHECK(fake().alive() == 0);
}

// `break_it` is told to rank 1 alone; the refusal is the same on all ranks and leaves a wire that works.
template <class Break>
void expect_refusal(const std::string& reason, Break break_it, const char* library = FAKE_NCCL) {
  Party party(3);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    options.library = library;
    const auto communicator = std::make_shared<NcclCommunicator>(options);
    if (rank == 1) break_it();
    CHECK(has(std::get<1>(NcclMemory::share(communicator, 64)).reason, reason));
    NcclWire wire(communicator);
    exchange_all_with_all(wire, rank, 3, 1);
  });
  CHECK(fake().alive() == 0);
}

void memory_is_refused_for_a_reason() {
  expect_refusal("has no ncclGetPeerDevicePointer, which came with 2.29.2", [] {}, FAKE_NCCL_OLD);
  expect_refusal("rank 1: ncclMemAlloc failed: something is wrong",
                 [] { fake().fail_next("ncclMemAlloc", 1); });
  expect_refusal("rank 1: NCCL makes no symmetric window here", [] { fake().refuse_window(); });
  expect_refusal("rank 1: its GPU does not reach the memory of rank 2", [] { fake().hide(2); });
  expect_refusal("rank 1: ncclGetPeerDevicePointer failed",
                 [] { fake().fail_next("ncclGetPeerDevicePointer", 4); });
}

void memory_that_cannot_be_registered_ends_the_communicator_on_all_ranks() {
  Party party(2);
  party.run([&](int rank) {
    NcclOptions options = party.options(rank);
    options.patience = 100ms;
    const auto communicator = std::make_shared<NcclCommunicator>(options);
    if (rank == 0) fake().fail_next("ncclCommWindowRegister", 1);
    const std::string text = thrown<CommError>([&] { NcclMemory::share(communicator, 64); });
    CHECK(text.starts_with("rank 0: ncclCommWindowRegister failed"));
    CHECK(!complaint_of([&] { communicator->check(); }).empty());
  });
  CHECK(fake().alive() == 0);
}

}  // namespace

int main() {
  a_library_is_named_by_path_or_found_in_the_process();
  a_library_that_does_not_do_is_an_error_that_says_why();
  a_rank_without_a_library_is_an_error_on_all_ranks();
  different_versions_are_a_mismatch_on_all_ranks();
  a_rank_that_is_never_ready_is_an_error_within_the_deadline();
  a_rank_that_cannot_connect_is_an_error_on_all_ranks();
  every_rank_gets_what_the_others_sent();
  two_messages_to_one_rank_keep_their_order();
  sums_are_scattered_and_gathered();
  parts_of_all_ranks_are_connected_on_their_own();
  a_failure_in_one_part_is_an_error_in_all();
  a_failure_is_told_on_its_rank_and_an_abort_ends_the_others_waits();
  two_sides_that_differ_in_size_fail();
  the_watchdog_finds_a_failure_that_comes_after_the_call();
  what_cannot_be_queued_fails_with_its_name();
  a_rank_that_never_comes_ends_a_wait_within_the_deadline();
  an_abort_is_done_once_whoever_asks_and_how_often();
  an_abort_does_not_wait_for_a_thread_that_is_stuck_in_a_call();
  every_rank_reaches_the_memory_of_all();
  memory_is_refused_for_a_reason();
  memory_that_cannot_be_registered_ends_the_communicator_on_all_ranks();
}
