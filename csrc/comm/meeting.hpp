#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "comm/control.hpp"
#include "comm/herald.hpp"

namespace xc {

// MEETINGS. The ranks of a team come together at numbered meetings. A rank ARRIVES by storing the number in
// its own word. The meeting is COMPLETE when every word has reached it; anybody may find that out, and the
// first who does sets the one outcome word. Or somebody who waits finds an absent rank dead, gone or late and
// sets the word to a FAILURE. Compare-and-swap decides between the two, so all ranks see the same end. A
// failure is final.
//
// A rank that waits for another team, at the wire, watches its own team meanwhile, and hears of failures in
// others.

using Seconds = std::chrono::duration<double>;

struct Limits {
  Seconds between_steps{1800};  // at meeting A: another rank may evaluate or compile meanwhile
  Seconds inside_pass{60};      // at meeting B
  Seconds warn_after{60};
};

// What a meeting asks of its surroundings while it waits. Members of the team go by their places.
struct Company {
  const Topology* topology;
  Herald* herald;
  std::function<bool(int place)> alive;
  std::function<bool(int place)> departed;
  std::function<std::string(int place)> farewell;  // why it departed, if it said so
  std::function<void()> interrupted;               // throws when the user wants to stop
  std::function<void(const std::string&)> warn;
  Limits limits;
  Seconds spin{20e-6};
};

// The kind of a PeerError.
const char* name_of(Failure why);

class Meeting {
 public:
  Meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals, Company company);

  // Comes to the next meeting and returns when it is complete; throws PeerError when it failed. `where` names
  // it in messages, `step` goes into the error.
  void meet(const char* where, std::int64_t step, Seconds deadline);

  // Returns when done() is true, which something of other teams is to bring about; throws PeerError when that
  // fails, or if the deadline passes. `awaited` are the ranks of other teams that it is waited for.
  void wait_until(const std::function<bool()>& done, const std::function<std::vector<int>()>& awaited,
                  const char* where, std::int64_t step, Seconds deadline);

  // Makes the next meeting fail for all because the wire refused a transfer, and throws PeerError.
  [[noreturn]] void lose(const WireError& refused, const char* where, std::int64_t step);

  // Which call this rank is in, for other teams to know which one failed.
  void set_call(std::uint64_t call) { company_.herald->set_call(channel_, call); }

  // Makes this and every later meeting fail for all.
  void abandon(Failure why);

  // Whether the last meeting that this rank came to failed, so that nobody went on from it.
  bool failed_here() const;

  // Tells the others that this rank comes to no further meeting. Idempotent.
  void close();

  const Limits& limits() const { return company_.limits; }
  std::int64_t channel() const { return channel_; }

 private:
  struct Wait;
  bool complete() const;
  bool decide(std::uint64_t next);
  void fail(std::uint64_t number, Failure why, int rank, const std::string& reason = {});
  void listen(std::uint64_t number);
  bool settled(std::uint64_t word) const;
  void sleep(std::uint64_t seen);
  void look_around(Wait& wait);
  void look_at_team();
  void mind_user(Wait& wait, const std::vector<int>& awaited);
  void warn(Wait& wait, const std::vector<int>& awaited);
  std::vector<int> absent() const;
  int rank_at(int place) const;
  std::string reason_of(std::uint64_t word) const;
  [[noreturn]] void raise(std::uint64_t word, const Wait& wait) const;

  OutcomeWord& outcome_;
  std::vector<ArrivalWord*> arrivals_;
  Company company_;
  int place_;
  std::int64_t channel_;
  std::string news_;  // the reason that came with another team's failure
  std::uint64_t number_ = 0;
};

}  // namespace xc
