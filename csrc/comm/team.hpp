#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/herald.hpp"
#include "comm/liveness.hpp"
#include "comm/meeting.hpp"
#include "comm/memory.hpp"
#include "comm/topology.hpp"
#include "comm/wire.hpp"
#include "core/error.hpp"

namespace xc {

// A TEAM is the set of ranks that really opened each other's memory: each opens every peer's file and reads
// back the number that the peer wrote there. It hands out shared memory, knows who is alive, and starts
// meetings. It also knows its place among the other teams, and the wire to them.

struct TeamOptions {
  Topology topology = Topology::one_team(0, 1, 1);
  std::shared_ptr<Wire> wire;      // none with one team
  std::int64_t world = 0;          // its number among those that have used this wire
  std::int64_t first_channel = 0;  // others have been used on this wire before
  RailOptions rails;
  Provider provider = Provider::memfd;
  Limits limits;
  // Gives every rank's bytes to every rank, in the order of ranks; of all teams.
  std::function<std::vector<std::string>(const std::string&)> all_gather;
  std::function<void()> interrupted;
  std::function<void(const std::string&)> warn;
};

// Every member's part of one piece of shared memory, in the order of places.
using Shared = std::vector<std::shared_ptr<Mapping>>;

// A member's own part in the children that it forks: the same memory, or a copy.
enum class Forked : std::uint8_t { share, copy };

class Team {
 public:
  explicit Team(TeamOptions options);  // collective
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  const Topology& topology() const { return options_.topology; }
  int rank() const { return topology().rank(); }
  int size() const { return static_cast<int>(members_.size()); }  // ranks of this team
  int place() const { return place_; }
  int member(int place) const { return members_[static_cast<std::size_t>(place)]; }
  int workers_per_rank() const { return topology().workers(); }
  int worker_count() const { return topology().worker_count(); }  // of all teams
  int first_worker() const { return rank() * workers_per_rank(); }
  const Limits& limits() const { return options_.limits; }
  // The wire to the other teams; null if there are none.
  Wire* wire() const { return options_.wire.get(); }
  std::int64_t channels() const { return herald_.channels(); }  // used on the wire so far
  // The rank of another team that has left this world, and why if it was an error.
  std::optional<std::pair<int, std::string>> departure_elsewhere();
  const RailOptions& rails() const { return options_.rails; }

  // Collective. Each rank brings `bytes` of its own, zeroed, and sees its team's.
  Shared share(std::size_t bytes, Forked children = Forked::share) {
    return is_local() ? share_locally(bytes) : share_files(bytes, children);
  }
  // Collective. The text of every rank of all teams; the exchange that constructors agree by.
  std::vector<std::string> all_gather(const std::string& bytes) const { return options_.all_gather(bytes); }
  // Collective. Throws the same E on every rank if any rank brings a text.
  template <class E = CommError>
  void agree(const std::string& complaint) const {
    if (const std::string text = first_complaint(complaint); !text.empty()) throw E(text);
  }

  Meeting meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals);

  // Of the member at a place.
  bool alive(int place) const;
  bool departed(int place) const;
  // Says good-bye: peers that wait for this rank stop waiting, and learn the reason if there is one.
  // Idempotent.
  void leave(const std::string& reason = {});
  // The reason with which a member left.
  std::string farewell(int place) const;
  // A forked child shares the memory but not the place in the team.
  bool own_process() const;
  void require_own_process() const;
  // UsageError there, and after leave().
  void require_member() const;

 private:
  std::string first_complaint(const std::string& mine) const;
  std::vector<std::string> team_gather(const std::string& mine) const;
  DepartureWord& departure(int place) const;
  bool is_local() const { return options_.provider == Provider::local; }
  void greet();
  void require_memory(std::size_t bytes) const;
  Shared share_files(std::size_t bytes, Forked children);
  Shared share_locally(std::size_t bytes);

  TeamOptions options_;
  std::vector<int> members_;
  int place_;
  Herald herald_;
  Beacon beacon_;
  std::vector<Watch> watches_;
  Shared departures_;
  int processors_ = 1;  // that the ranks may use together
};

}  // namespace xc
