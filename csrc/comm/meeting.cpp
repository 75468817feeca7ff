#include "comm/meeting.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cstdio>

#include "core/error.hpp"

namespace xc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kNumberMask = (std::uint64_t{1} << 40) - 1;
constexpr std::uint64_t kFailed = std::uint64_t{1} << 63;
constexpr long kSliceNanoseconds = 20'000'000;

std::uint64_t number_of(std::uint64_t word) { return word & kNumberMask; }
int rank_of(std::uint64_t word) { return static_cast<int>((word >> 40) & 0x7fff); }
Failure failure_of(std::uint64_t word) { return static_cast<Failure>((word >> 55) & 0xff); }

std::uint64_t failure_word(std::uint64_t number, Failure why, int rank) {
  return kFailed | (static_cast<std::uint64_t>(why) << 55) | (static_cast<std::uint64_t>(rank) << 40) |
         number;
}

// The futex of the outcome: the lower half of its word, shared between processes.
std::uint32_t* lower_half(std::atomic<std::uint64_t>& word) {
  static_assert(std::endian::native == std::endian::little);
  return reinterpret_cast<std::uint32_t*>(&word);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::string plain(Seconds seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds.count());
  return text;
}

const char* name_of(Failure why) {
  static constexpr const char* kNames[] = {"none", "died", "left", "silent", "interrupted", "abandoned"};
  return kNames[static_cast<std::size_t>(why)];
}

const char* words_for(Failure why) {
  switch (why) {
    case Failure::died:
      return " died (killed, out of memory, or crashed)";
    case Failure::departed:
      return " left: it closed its world or ended its program";
    case Failure::silent:
      return " did not come in time; it is stopped, busy elsewhere, or has skipped a call";
    case Failure::interrupted:
      return " was interrupted";
    case Failure::abandoned:
      return " gave up after an error of its own";
    case Failure::none:
      break;
  }
  return " failed";
}

}  // namespace

struct Meeting::Wait {
  const char* where;
  std::int64_t step;
  Seconds deadline;
  Clock::time_point since = Clock::now();
  bool warned = false;
  Seconds waited() const { return Clock::now() - since; }
};

Meeting::Meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals, int rank, Company company)
    : outcome_(outcome), arrivals_(std::move(arrivals)), rank_(rank), company_(std::move(company)) {}

bool Meeting::complete() const {
  for (const ArrivalWord* arrival : arrivals_)
    if (arrival->meeting.load() < number_) return false;
  return true;
}

// Moves the outcome from "the last meeting is decided" to `next`, if nobody else has, and wakes those who
// sleep.
void Meeting::decide(std::uint64_t next) {
  std::uint64_t expected = number_of(next) - 1;
  if (!outcome_.word.compare_exchange_strong(expected, next)) return;
  if (outcome_.sleepers.load() == 0) return;
  syscall(SYS_futex, lower_half(outcome_.word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Meeting::fail(Failure why, int rank) { decide(failure_word(number_, why, rank)); }

// A failure that was decided at a later meeting leaves this one complete.
bool Meeting::settled(std::uint64_t word) const { return number_of(word) >= number_; }

void Meeting::sleep(std::uint64_t seen) {
  const timespec slice = {0, kSliceNanoseconds};
  outcome_.sleepers.fetch_add(1);
  if (outcome_.word.load() == seen)
    syscall(SYS_futex, lower_half(outcome_.word), FUTEX_WAIT, static_cast<std::uint32_t>(seen), &slice,
            nullptr, 0);
  outcome_.sleepers.fetch_sub(1);
}

std::string Meeting::awaited() const {
  std::string ranks;
  for (std::size_t r = 0; r < arrivals_.size(); ++r)
    if (arrivals_[r]->meeting.load() < number_) ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  return ranks;
}

// Once per slice: is an absent rank dead or gone, is it time to warn or to give up, does the user want to
// stop?
void Meeting::look_around(Wait& wait) {
  for (int r = 0; r < static_cast<int>(arrivals_.size()); ++r) {
    const ArrivalWord& arrival = *arrivals_[static_cast<std::size_t>(r)];
    if (arrival.meeting.load() >= number_) continue;
    const bool departed = arrival.closed.load() != 0 || company_.departed(r);
    const bool dead = !company_.alive(r);
    if (arrival.meeting.load() >= number_) continue;  // came between the two looks
    if (departed) fail(Failure::departed, r);
    if (dead) fail(Failure::died, r);
    if (wait.waited() > wait.deadline) fail(Failure::silent, r);
  }
  try {
    if (!wait.warned && wait.waited() > company_.limits.warn_after) warn(wait);
    company_.interrupted();
  } catch (...) {
    abandon(Failure::interrupted);  // even if this meeting is complete by now: this rank does not go on
    throw;
  }
}

void Meeting::warn(Wait& wait) {
  wait.warned = true;
  company_.warn("rank " + std::to_string(rank_) + " has waited " + plain(wait.waited()) + " at " +
                wait.where + " of step " + std::to_string(wait.step) + " for rank " + awaited());
}

void Meeting::raise(std::uint64_t word, const Wait& wait) const {
  const int rank = rank_of(word);
  const std::string reason = failure_of(word) == Failure::departed ? company_.farewell(rank) : "";
  std::string text = "rank " + std::to_string(rank) +
                     (reason.empty() ? words_for(failure_of(word)) : " ended with " + reason) +
                     "; noticed at " + wait.where + " of step " + std::to_string(wait.step);
  if (failure_of(word) == Failure::silent) text += " after " + plain(wait.deadline);
  throw PeerError(text + ". This engine takes no further steps.", rank, wait.step, name_of(failure_of(word)),
                  reason);
}

void Meeting::meet(const char* where, std::int64_t step, Seconds deadline) {
  ++number_;
  arrivals_[static_cast<std::size_t>(rank_)]->meeting.store(number_);
  if (complete()) decide(number_);
  Wait wait{where, step, deadline};
  for (bool spinning = true;;) {
    const std::uint64_t word = outcome_.word.load();
    if (word & kFailed && number_of(word) <= number_) raise(word, wait);
    if (settled(word)) return;
    if (spinning) {
      for (int i = 0; i < 32; ++i) relax();
      spinning = wait.waited() < company_.spin;
      continue;
    }
    sleep(word);
    if (complete()) decide(number_);  // the last to arrive may have died before it could say so
    look_around(wait);
  }
}

bool Meeting::failed_here() const {
  const std::uint64_t word = outcome_.word.load();
  return word & kFailed && number_of(word) <= number_;
}

void Meeting::close() { arrivals_[static_cast<std::size_t>(rank_)]->closed.store(1); }

void Meeting::abandon(Failure why) {
  for (std::uint64_t word = outcome_.word.load(); !(word & kFailed); word = outcome_.word.load())
    decide(failure_word(number_of(word) + 1, why, rank_));
}

}  // namespace xc
