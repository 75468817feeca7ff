#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "comm/control.hpp"

namespace xc {

// MEETINGS. The ranks of a team come together at numbered meetings. A rank ARRIVES by storing the number in
// its own word. The meeting is COMPLETE when every word has reached it; anybody may find that out, and the
// first who does sets the one outcome word. Or somebody who waits finds an absent rank dead, gone or late and
// sets the word to a FAILURE. Compare-and-swap decides between the two, so all ranks see the same end. A
// failure is final.

using Seconds = std::chrono::duration<double>;

struct Limits {
  Seconds between_steps{1800};  // at meeting A: another rank may evaluate or compile meanwhile
  Seconds inside_pass{60};      // at meeting B
  Seconds warn_after{60};
};

// What a meeting asks of its surroundings while it waits.
struct Company {
  std::function<bool(int rank)> alive;
  std::function<bool(int rank)> departed;
  std::function<std::string(int rank)> farewell;  // why it departed, if it said so
  std::function<void()> interrupted;              // throws when the user wants to stop
  std::function<void(const std::string&)> warn;
  Limits limits;
  Seconds spin{20e-6};
};

class Meeting {
 public:
  Meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals, int rank, Company company);

  // Comes to the next meeting and returns when it is complete; throws PeerError when it failed. `where` names
  // it in messages, `step` goes into the error.
  void meet(const char* where, std::int64_t step, Seconds deadline);

  // Makes this and every later meeting fail for all.
  void abandon(Failure why);

  // Whether the last meeting that this rank came to failed, so that nobody went on from it.
  bool failed_here() const;

  // Tells the others that this rank comes to no further meeting.
  void close();

  const Limits& limits() const { return company_.limits; }

 private:
  struct Wait;
  bool complete() const;
  void decide(std::uint64_t next);
  void fail(Failure why, int rank);
  bool settled(std::uint64_t word) const;
  void sleep(std::uint64_t seen);
  void look_around(Wait& wait);
  void warn(Wait& wait);
  std::string awaited() const;
  [[noreturn]] void raise(std::uint64_t word, const Wait& wait) const;

  OutcomeWord& outcome_;
  std::vector<ArrivalWord*> arrivals_;
  int rank_;
  Company company_;
  std::uint64_t number_ = 0;
};

}  // namespace xc
