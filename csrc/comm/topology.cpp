#include "comm/topology.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

namespace xc {

Topology::Topology(int rank, int workers, std::vector<std::vector<int>> teams, std::vector<std::string> hosts)
    : rank_(rank), workers_(workers), teams_(std::move(teams)), hosts_(std::move(hosts)) {
  std::size_t size = 0;
  for (const auto& team : teams_) size += team.size();
  team_of_.resize(size);
  place_of_.resize(size);
  for (std::size_t t = 0; t < teams_.size(); ++t)
    for (std::size_t p = 0; p < teams_[t].size(); ++p) {
      team_of_.at(static_cast<std::size_t>(teams_[t][p])) = static_cast<int>(t);
      place_of_[static_cast<std::size_t>(teams_[t][p])] = static_cast<int>(p);
    }
  const auto all_alike = [this](const std::string& host) { return host == hosts_.front(); };
  if (std::all_of(hosts_.begin(), hosts_.end(), all_alike)) hosts_.clear();
}

Topology Topology::one_team(int rank, int size, int workers) {
  std::vector<int> all(static_cast<std::size_t>(size));
  std::iota(all.begin(), all.end(), 0);
  return {rank, workers, {std::move(all)}};
}

std::vector<int> Topology::others() const {
  std::vector<int> ranks;
  for (int r = 0; r < size(); ++r)
    if (team_of(r) != team()) ranks.push_back(r);
  return ranks;
}

std::vector<int> Topology::workers_of(int team) const {
  std::vector<int> numbers;
  for (const int rank : teams_[static_cast<std::size_t>(team)])
    for (int v = 0; v < workers_; ++v) numbers.push_back(rank * workers_ + v);
  return numbers;
}

int Topology::carrier(int worker, int team) const {
  const int rank = owner(worker);
  if (team_of(rank) == team) return rank;
  const auto& ranks = teams_[static_cast<std::size_t>(team)];
  return ranks[static_cast<std::size_t>(place_of(rank)) % ranks.size()];
}

std::vector<int> Topology::carried(int rank) const {
  const int team = team_of(rank);
  std::vector<int> segments;
  for (int k = 0; k < worker_count(); ++k)
    if (carrier(k, team) == rank) segments.push_back(k);
  return segments;
}

bool Topology::has_equal_teams() const {
  const auto as_large = [this](const auto& team) { return team.size() == teams_.front().size(); };
  return std::all_of(teams_.begin(), teams_.end(), as_large);
}

std::vector<int> Topology::rail() const {
  std::vector<int> ranks;
  for (const auto& team : teams_)
    if (has_equal_teams())
      ranks.push_back(team[static_cast<std::size_t>(place())]);
    else
      ranks.insert(ranks.end(), team.begin(), team.end());
  return ranks;
}

bool Topology::keeps_order() const {
  if (team_count() == 1) return true;
  const std::size_t ranks = teams_[0].size();
  if (!std::has_single_bit(ranks * static_cast<std::size_t>(workers_))) return false;
  int next = 0;
  for (const auto& team : teams_) {
    const bool last = &team == &teams_.back();
    const auto end = next + static_cast<int>(team.size());
    if (team.size() > ranks || (team.size() < ranks && !last)) return false;
    if (team.front() != next || team.back() != end - 1) return false;
    next = end;
  }
  return true;
}

std::string Topology::name_of(int rank) const {
  const std::string name = "rank " + std::to_string(rank);
  return hosts_.empty() ? name : name + " on " + hosts_[static_cast<std::size_t>(rank)];
}

}  // namespace xc
