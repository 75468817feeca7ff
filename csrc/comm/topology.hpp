#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xc {

// Who is where. RANKS are processes, numbered over the whole job; each drives the same number of WORKERS, and
// worker v of rank r is number r * workers + v. A TEAM is the ranks that share memory: those of one host, or
// some of them. A rank's index in its team is its PLACE.
//
// Every worker owns one segment of the flat parameters, whose update is its rank's work. On each other team
// one rank CARRIES that segment: it sums its own team's gradients there, sends the sum to the owner, takes
// the new weights back and gives them to its team. Where teams are of one size this is the rank of the
// owner's place, so that the ranks of one place, a RAIL, talk only among themselves.
class Topology {
 public:
  // `teams` hold all ranks from 0 on, each team's in ascending order, the teams in the order of their first
  // ranks; `hosts` are those of the ranks, or none if all are on one.
  Topology(int rank, int workers, std::vector<std::vector<int>> teams, std::vector<std::string> hosts = {});
  // All `size` ranks in one team.
  static Topology one_team(int rank, int size, int workers);

  int rank() const { return rank_; }                              // this process's
  int workers() const { return workers_; }                        // of each rank
  int size() const { return static_cast<int>(team_of_.size()); }  // ranks
  int worker_count() const { return size() * workers_; }
  int team_count() const { return static_cast<int>(teams_.size()); }
  const std::vector<std::vector<int>>& teams() const { return teams_; }
  int team_of(int rank) const { return team_of_[static_cast<std::size_t>(rank)]; }
  int place_of(int rank) const { return place_of_[static_cast<std::size_t>(rank)]; }
  int team() const { return team_of(rank_); }
  int place() const { return place_of(rank_); }
  const std::vector<int>& members() const { return teams_[static_cast<std::size_t>(team())]; }
  // The ranks of other teams.
  std::vector<int> others() const;
  // The workers of a team, in ascending order.
  std::vector<int> workers_of(int team) const;

  int owner(int worker) const { return worker / workers_; }  // of its segment
  int carrier(int worker, int team) const;                   // its owner in the owner's own team
  // The segments that a rank carries, its own among them, in ascending order.
  std::vector<int> carried(int rank) const;
  bool has_equal_teams() const;
  // The ranks among which the segments that this one carries travel, in the order of teams: its rail where
  // teams are equal, otherwise all.
  std::vector<int> rail() const;

  // Whether the sum over teams of their sums is the same tree as the sum over all workers: if every team but
  // the last holds the same power of two of workers, the last no more, and all in the order of ranks.
  bool keeps_order() const;

  // "rank 3", with its host if there are several.
  std::string name_of(int rank) const;

 private:
  int rank_;
  int workers_;
  std::vector<std::vector<int>> teams_;
  std::vector<std::string> hosts_;
  std::vector<int> team_of_;  // of each rank
  std::vector<int> place_of_;
};

}  // namespace xc
