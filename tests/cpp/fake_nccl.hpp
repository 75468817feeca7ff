#pragma once

#include <cstddef>

// NCCL between threads of one process, on host memory: each thread is a rank. Transfers happen while somebody
// asks for a communicator's state, so they are in progress after a call like those of a real NCCL that does
// not block, and have happened when they no longer are. Sums are taken as on a ring: in the order of ranks,
// the last of which is the one that gets them. What it is told to do wrong it does to the calling thread's
// rank.
struct FakeNccl {
  void (*report_version)(int version);
  // The next call of a function returns `result`.
  void (*fail_next)(const char* function, int result);
  // The state is `result` from the n-th group on that ends now; its transfers never happen.
  void (*fail_after)(int groups, int result);
  // Of the next group the transfers happen; the state is `result` a little later.
  void (*fail_later)(int result);
  // A communicator that is made next is never ready.
  void (*never_connect)();
  // The next group does not return before its communicator, or another one of the same id, is aborted.
  void (*get_stuck)();
  // The next window is null.
  void (*refuse_window)();
  // The memory of this rank has no address for the calling one from now on; -1 ends that.
  void (*hide)(int rank);
  // Communicators, windows and blocks of memory that nobody has freed.
  int (*alive)();
};

// What the files of the fake share.
namespace stand_in {

struct Block {
  void* at;
  std::size_t bytes;
};
struct Window;
struct Communicator;

struct Faults {
  int version = 23007;
  const char* failing = "";
  int result = 0;
  int groups = -1;  // until one fails
  int state = 0;
  int later = 0;
  bool never_connect = false;
  bool stuck = false;
  bool refuse_window = false;
  int hidden = -1;
};
Faults& faults();      // of this thread's rank
void count(int more);  // of things alive
// The result that a function was told to fail with; 0 if none.
int failure_of(const char* function);
// A window of all ranks' blocks, in the order of registration.
int enqueue_window(Communicator* comm, Block block, Window** window);
void drop(Window* window);
void* address_in(const Window* window, int rank);

}  // namespace stand_in

#define FAKE_NCCL_EXPORT extern "C" __attribute__((visibility("default")))
