#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/team.hpp"
#include "engine/post.hpp"
#include "engine/rails.hpp"

namespace xc {

// How a collective call goes, whatever it computes. Every rank lays down its post and comes to meeting A;
// then all posts are compared, and if they differ every rank throws the same error with nothing touched.
// Otherwise each does its part of the work and comes to meeting B, after which every store of every rank is
// visible to all.
//
// Meetings are those of one team. Between A and the work the teams compare what their ranks are about to do
// by one small all-reduce over the wire: hashes, which are alike as a rule. Only if they are not, more is
// sent.
class Exchange {
 public:
  struct Call {
    Operation operation;
    std::int64_t step = 0;  // for messages
    std::uint64_t hash = 0;
    std::span<const double> doubles = {};
    std::span<const std::uint8_t> present = {};
    Declarations declared = {};
  };

  // What all ranks agreed on: rank 0's doubles, and which layers any rank has a gradient for.
  struct Agreed {
    std::vector<double> doubles;
    std::vector<std::uint8_t> present;
  };

  // Bytes that it needs at the beginning of each rank's control memory.
  static std::size_t control_bytes(std::size_t doubles, std::size_t layers);

  Exchange(std::shared_ptr<Team> team, const Shared& control, std::vector<std::string> double_names,
           std::size_t layers);

  ~Exchange() { close(); }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  void collective(const Call& call, const std::function<void(const Agreed&)>& work);
  // Within `work`: a meeting of all ranks between two passes; whether any pass so far changed weights or
  // state.
  void meet_between_passes(std::int64_t step, bool touched);
  // Within `work`: returns when done() is true, for which ranks of other teams are awaited.
  void wait_for_wire(const std::function<bool()>& done, const std::function<std::vector<int>()>& awaited);
  // Takes part with nothing but a complaint, so that all ranks raise it.
  void complain(const Call& call, const std::string& text);
  // Makes the others' waits end. Idempotent.
  void close();

  // A pass began and not all ranks are known to have ended it: what it writes may be half old, half new.
  bool unsettled() const { return unsettled_; }

  Team& team() const { return *team_; }
  // The number of this exchange among those of the team, the same on all ranks.
  std::int64_t channel() const { return meeting_.channel(); }

 private:
  Post post(int place) const;
  std::vector<Post> posts() const;
  void require_open() const;
  void meet_at_a(const Call& call);
  void meet(const char* where, std::int64_t step, Seconds deadline, bool touched);
  Agreed agree(const Call& call, bool complains);
  Agreed agree_in_team(const Call& call, std::span<const Post> posts) const;
  Agreed agree_over_wire(const Call& call, const Post& mine, bool complains);
  void settle_differences(const Call& call, const Post& mine, Agreed& agreed);
  [[noreturn]] void raise_disagreement(const Post& mine) const;
  void largest_of_all(std::vector<double>& numbers, std::int64_t step);

  std::shared_ptr<Team> team_;
  std::vector<std::byte*> posts_;
  std::vector<std::string> double_names_;
  std::size_t layers_;
  Meeting meeting_;
  std::uint64_t sequence_ = 0;
  std::int64_t step_ = 0;  // of the call under way
  bool unsettled_ = false;
  bool closed_ = false;
};

// The rails of an engine or array that goes by this exchange; none with one team.
template <class T>
std::unique_ptr<Rails<T>> rails_for(Exchange& exchange, const Plan& plan, Shared memory) {
  if (!exchange.team().wire()) return nullptr;
  const auto wait = [&exchange](const auto& done, const auto& awaited) {
    exchange.wait_for_wire(done, awaited);
  };
  return std::make_unique<Rails<T>>(exchange.team(), plan, exchange.channel(), wait, std::move(memory));
}

}  // namespace xc
