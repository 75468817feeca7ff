#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/team.hpp"
#include "engine/post.hpp"

namespace xc {

// How a collective call goes, whatever it computes. Every rank lays down its post and comes to meeting A;
// then all posts are compared, and if they differ every rank throws the same error with nothing touched.
// Otherwise each does its part of the work and comes to meeting B, after which every store of every rank is
// visible to all.
class Exchange {
 public:
  struct Call {
    Operation operation;
    std::int64_t step = 0;  // for messages
    std::uint64_t hash = 0;
    std::span<const double> doubles = {};
    std::span<const std::uint8_t> present = {};
  };

  // Bytes that it needs at the beginning of each rank's control memory.
  static std::size_t control_bytes(std::size_t doubles, std::size_t layers);

  Exchange(std::shared_ptr<Team> team, const Shared& control, std::vector<std::string> double_names,
           std::size_t layers);

  ~Exchange() { close(); }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  void collective(const Call& call, const std::function<void(std::span<const Post>)>& work);
  // Within `work`: a meeting of all ranks between two passes; whether any pass so far changed weights or
  // state.
  void meet_between_passes(std::int64_t step, bool touched);
  // Takes part with nothing but a complaint, so that all ranks raise it.
  void complain(const Call& call, const std::string& text);
  // Makes the others' waits end. Idempotent.
  void close();

  // A pass began and not all ranks are known to have ended it: what it writes may be half old, half new.
  bool unsettled() const { return unsettled_; }

  Team& team() const { return *team_; }

 private:
  Post post(int rank) const;
  void require_open() const;
  void meet_at_a(const Call& call);
  void meet(const char* where, std::int64_t step, Seconds deadline, bool touched);

  std::shared_ptr<Team> team_;
  std::vector<std::byte*> posts_;
  std::vector<std::string> double_names_;
  std::size_t layers_;
  Meeting meeting_;
  std::uint64_t sequence_ = 0;
  bool unsettled_ = false;
  bool closed_ = false;
};

}  // namespace xc
