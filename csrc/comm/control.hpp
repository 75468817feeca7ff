#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace xc {

// What lies in shared memory to let ranks meet. Words are accessed by several processes, so they must be
// lock-free, and each kind has its own cache line.

inline constexpr std::size_t kLine = 64;

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

// Why a meeting failed. The rank that is named is the one that did not come, or the one that gave up.
enum class Failure : std::uint8_t { none, died, departed, silent, interrupted, abandoned, unreachable };

// The outcome of the meetings so far, in one word: 36 bits count the meetings decided, then 19 bits of rank,
// 8 of Failure, and the sign bit says that the last one failed. It changes by compare-and-swap only, a
// failure is never overwritten, and every rank acts on this word alone. Waiters sleep on its lower half.
struct alignas(kLine) OutcomeWord {
  std::atomic<std::uint64_t> word;
  std::atomic<std::uint32_t> sleepers;
};

// A rank's own line: the last meeting it has come to, and whether it will come to more.
struct alignas(kLine) ArrivalWord {
  std::atomic<std::uint64_t> meeting;
  std::atomic<std::uint32_t> closed;
};

// A rank's lines for the whole team: says good-bye before a clean exit, and why if it was an error.
inline constexpr std::size_t kReasonBytes = 480;
struct alignas(kLine) DepartureWord {
  std::atomic<std::uint64_t> nonce;
  std::atomic<std::uint32_t> left;
  char reason[kReasonBytes];  // written before `left`; ends with a zero
};

// How far a shard's update has come; together with the undo area beside it, what a survivor needs to finish a
// dead rank's shard. Belongs to the shard, not to the process.
struct alignas(kLine) ProgressWord {
  std::atomic<std::uint64_t> step_pass_tile;
  std::atomic<std::uint64_t> claimed_by;
};

}  // namespace xc
