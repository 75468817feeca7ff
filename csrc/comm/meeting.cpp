#include "comm/meeting.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <exception>
#include <thread>

#include "core/error.hpp"

namespace xc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kNumberMask = (std::uint64_t{1} << 36) - 1;
constexpr std::uint64_t kFailed = std::uint64_t{1} << 63;
constexpr long kSliceNanoseconds = 20'000'000;
constexpr Seconds kPatient{2e-3};  // of waiting for another team, before this rank naps in between
constexpr std::chrono::microseconds kNap{50};

std::uint64_t number_of(std::uint64_t word) { return word & kNumberMask; }
int rank_of(std::uint64_t word) { return static_cast<int>((word >> 36) & 0x7ffff); }
Failure failure_of(std::uint64_t word) { return static_cast<Failure>((word >> 55) & 0xff); }

std::uint64_t failure_word(std::uint64_t number, Failure why, int rank) {
  return kFailed | (static_cast<std::uint64_t>(why) << 55) | (static_cast<std::uint64_t>(rank) << 36) |
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
    case Failure::unreachable:
      return " cannot be reached any more: its host or the network between is gone";
    case Failure::none:
      break;
  }
  return " failed";
}

}  // namespace

const char* name_of(Failure why) {
  static constexpr const char* kNames[] = {"none",        "died",      "left",       "silent",
                                           "interrupted", "abandoned", "unreachable"};
  return kNames[static_cast<std::size_t>(why)];
}

struct Meeting::Wait {
  const char* where;
  std::int64_t step;
  Seconds deadline;
  Clock::time_point since = Clock::now();
  bool warned = false;
  Seconds waited() const { return Clock::now() - since; }
};

Meeting::Meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals, Company company)
    : outcome_(outcome),
      arrivals_(std::move(arrivals)),
      company_(std::move(company)),
      place_(company_.topology->place()),
      channel_(company_.herald->open_channel()) {}

int Meeting::rank_at(int place) const {
  return company_.topology->members()[static_cast<std::size_t>(place)];
}

bool Meeting::complete() const {
  for (const ArrivalWord* arrival : arrivals_)
    if (arrival->meeting.load() < number_) return false;
  return true;
}

// Moves the outcome from "the last meeting is decided" to `next`, if nobody else has, and wakes those who
// sleep.
bool Meeting::decide(std::uint64_t next) {
  std::uint64_t expected = number_of(next) - 1;
  if (!outcome_.word.compare_exchange_strong(expected, next)) return false;
  if (outcome_.sleepers.load() > 0)
    syscall(SYS_futex, lower_half(outcome_.word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  return true;
}

// The one who decides tells the other teams.
void Meeting::fail(std::uint64_t number, Failure why, int rank, const std::string& reason) {
  if (decide(failure_word(number, why, rank))) company_.herald->tell(channel_, why, rank, reason);
}

// Another team's failure becomes this one's. It need not be told again.
void Meeting::listen(std::uint64_t number) {
  const auto news = company_.herald->heard(channel_);
  if (!news) return;
  news_ = news->reason;
  decide(failure_word(number, news->why, news->about));
}

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

std::vector<int> Meeting::absent() const {
  std::vector<int> ranks;
  for (std::size_t p = 0; p < arrivals_.size(); ++p)
    if (arrivals_[p]->meeting.load() < number_) ranks.push_back(rank_at(static_cast<int>(p)));
  return ranks;
}

// Once per slice: is an absent rank dead or gone, is it time to warn or to give up, does the user want to
// stop?
void Meeting::look_around(Wait& wait) {
  for (int p = 0; p < static_cast<int>(arrivals_.size()); ++p) {
    const ArrivalWord& arrival = *arrivals_[static_cast<std::size_t>(p)];
    if (arrival.meeting.load() >= number_) continue;
    const bool departed = arrival.closed.load() != 0 || company_.departed(p);
    const bool dead = !company_.alive(p);
    if (arrival.meeting.load() >= number_) continue;  // came between the two looks
    if (departed) fail(number_, Failure::departed, rank_at(p), company_.farewell(p));
    if (dead) fail(number_, Failure::died, rank_at(p));
    if (wait.waited() > wait.deadline) fail(number_, Failure::silent, rank_at(p));
  }
  listen(number_);
  mind_user(wait, absent());
}

// The same while nobody of the team is waited for: whoever is gone will miss at the next meeting.
void Meeting::look_at_team() {
  for (int p = 0; p < static_cast<int>(arrivals_.size()); ++p) {
    if (arrivals_[static_cast<std::size_t>(p)]->closed.load() != 0 || company_.departed(p))
      fail(number_ + 1, Failure::departed, rank_at(p), company_.farewell(p));
    if (!company_.alive(p)) fail(number_ + 1, Failure::died, rank_at(p));
  }
}

void Meeting::mind_user(Wait& wait, const std::vector<int>& awaited) {
  try {
    if (!wait.warned && wait.waited() > company_.limits.warn_after) warn(wait, awaited);
    company_.interrupted();
  } catch (...) {
    abandon(Failure::interrupted);  // even if this meeting is complete by now: this rank does not go on
    throw;
  }
}

void Meeting::warn(Wait& wait, const std::vector<int>& awaited) {
  wait.warned = true;
  std::string ranks;
  for (const int rank : awaited) ranks += (ranks.empty() ? "" : ", ") + company_.topology->name_of(rank);
  company_.warn("rank " + std::to_string(rank_at(place_)) + " has waited " + plain(wait.waited()) + " at " +
                wait.where + " of step " + std::to_string(wait.step) + " for " + ranks);
}

// What a rank that departed has said: in its team's memory, or in the news from another.
std::string Meeting::reason_of(std::uint64_t word) const {
  if (failure_of(word) != Failure::departed) return {};
  const Topology& topology = *company_.topology;
  const int rank = rank_of(word);
  return topology.team_of(rank) == topology.team() ? company_.farewell(topology.place_of(rank)) : news_;
}

void Meeting::raise(std::uint64_t word, const Wait& wait) const {
  company_.herald->hush(channel_);
  const int rank = rank_of(word);
  const std::string reason = reason_of(word);
  std::string text = company_.topology->name_of(rank) +
                     (reason.empty() ? words_for(failure_of(word)) : " ended with " + reason) +
                     "; noticed at " + wait.where + " of step " + std::to_string(wait.step);
  if (failure_of(word) == Failure::silent) text += " after " + plain(wait.deadline);
  throw PeerError(text + ". This engine takes no further steps.", rank, wait.step, name_of(failure_of(word)),
                  reason);
}

void Meeting::meet(const char* where, std::int64_t step, Seconds deadline) {
  ++number_;
  arrivals_[static_cast<std::size_t>(place_)]->meeting.store(number_);
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

// Asking is what moves the wire, so it goes on all the time, but gives way to others: soon to whoever may
// want this processor, later to sleep.
void Meeting::wait_until(const std::function<bool()>& done, const std::function<std::vector<int>()>& awaited,
                         const char* where, std::int64_t step, Seconds deadline) {
  Wait wait{where, step, deadline};
  Seconds next_look = Seconds(kSliceNanoseconds * 1e-9);
  const auto is_done = [&] {
    try {
      return done();
    } catch (const WireError& refused) {
      lose(refused, where, step);
    }
  };
  while (!is_done()) {
    const Seconds waited = wait.waited();
    if (waited > kPatient)
      std::this_thread::sleep_for(kNap);
    else if (waited > company_.spin)
      std::this_thread::yield();
    if (waited < next_look) continue;
    next_look = waited + Seconds(kSliceNanoseconds * 1e-9);
    look_at_team();
    listen(number_ + 1);
    if (waited > deadline && !is_done()) fail(number_ + 1, Failure::silent, awaited().front());
    if (const std::uint64_t word = outcome_.word.load(); word & kFailed) raise(word, wait);
    mind_user(wait, awaited());
  }
}

void Meeting::lose(const WireError& refused, const char* where, std::int64_t step) {
  company_.warn(refused.what());
  fail(number_ + 1, Failure::unreachable, refused.rank);
  raise(outcome_.word.load(), Wait{where, step, {}});
}

bool Meeting::failed_here() const {
  const std::uint64_t word = outcome_.word.load();
  return word & kFailed && number_of(word) <= number_;
}

void Meeting::close() {
  if (arrivals_[static_cast<std::size_t>(place_)]->closed.exchange(1) != 0) return;
  company_.herald->tell(channel_, Failure::departed, rank_at(place_));
}

void Meeting::abandon(Failure why) {
  for (std::uint64_t word = outcome_.word.load(); !(word & kFailed); word = outcome_.word.load())
    fail(number_of(word) + 1, why, rank_at(place_));
}

}  // namespace xc
