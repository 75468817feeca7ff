#include "check.hpp"
#include "comm/topology.hpp"

using namespace xc;

namespace {

using Teams = std::vector<std::vector<int>>;
using Numbers = std::vector<int>;

void check_carriers(int workers, const Teams& teams) {
  int size = 0;
  for (const auto& team : teams) size += static_cast<int>(team.size());
  for (int rank = 0; rank < size; ++rank) {
    const Topology topology(rank, workers, teams);
    CHECK(topology.size() == size && topology.worker_count() == size * workers);
    CHECK(topology.members()[static_cast<std::size_t>(topology.place())] == rank);
    for (int k = 0; k < topology.worker_count(); ++k)
      CHECK(topology.carrier(k, topology.team_of(k / workers)) == topology.owner(k));
  }
}

// In every team each segment has one carrier, and the carriers' own lists say the same.
void check_every_segment_is_carried_once(int workers, const Teams& teams) {
  const Topology topology(0, workers, teams);
  for (int team = 0; team < topology.team_count(); ++team) {
    std::vector<int> carried(static_cast<std::size_t>(topology.worker_count()), 0);
    for (const int rank : teams[static_cast<std::size_t>(team)])
      for (const int k : topology.carried(rank)) {
        CHECK(topology.carrier(k, team) == rank);
        ++carried[static_cast<std::size_t>(k)];
      }
    for (const int times : carried) CHECK(times == 1);
  }
}

void equal_teams_carry_along_rails() {
  const Topology topology(1, 2, {{0, 1}, {2, 3}});
  CHECK(topology.team() == 0 && topology.place() == 1 && topology.others() == Numbers({2, 3}));
  CHECK(topology.workers_of(1) == Numbers({4, 5, 6, 7}));
  CHECK(topology.carried(1) == Numbers({2, 3, 6, 7}) && topology.carried(2) == Numbers({0, 1, 4, 5}));
  CHECK(topology.carrier(7, 0) == 1 && topology.carrier(0, 1) == 2);
  CHECK(topology.has_equal_teams() && topology.rail() == Numbers({1, 3}));
  CHECK(Topology(2, 1, {{0, 3}, {1, 2}}).rail() == Numbers({3, 2}));
}

void a_small_team_carries_more_for_each_rank() {
  const Topology topology(3, 1, {{0, 1, 2}, {3}});
  CHECK(topology.carried(3) == Numbers({0, 1, 2, 3}));
  CHECK(topology.carried(0) == Numbers({0, 3}) && topology.carried(2) == Numbers({2}));
  CHECK(!topology.has_equal_teams() && topology.rail() == Numbers({0, 1, 2, 3}));
}

void one_team_carries_its_own_alone() {
  const Topology topology = Topology::one_team(2, 4, 3);
  CHECK(topology.team_count() == 1 && topology.others().empty() && topology.keeps_order());
  CHECK(topology.carried(2) == Numbers({6, 7, 8}));
}

bool keeps_order(int workers, Teams teams) { return Topology(0, workers, std::move(teams)).keeps_order(); }

void powers_of_two_in_the_order_of_ranks_keep_the_order() {
  CHECK(keeps_order(1, {{0}, {1}, {2}}) && keeps_order(1, {{0, 1}, {2, 3}}) && keeps_order(4, {{0}, {1}}));
  CHECK(keeps_order(1, {{0, 1}, {2}}) && keeps_order(1, {{0, 1, 2, 3}, {4, 5, 6}}));
  CHECK(keeps_order(1, {{0, 1, 2}}));  // of one team
}

void other_teams_do_not_keep_the_order() {
  CHECK(!keeps_order(1, {{0, 1, 2}, {3}}) &&
        !keeps_order(1, {{0}, {1, 2}}));  // 3 is no power; the last is larger
  CHECK(!keeps_order(3, {{0}, {1}}) && !keeps_order(1, {{0, 2}, {1, 3}}));
  CHECK(!keeps_order(1, {{0, 1}, {2}, {3, 4}}));  // a smaller one that is not the last
}

void hosts_are_named_where_there_are_several() {
  const Teams teams = {{0}, {1}};
  CHECK(Topology(0, 1, teams, {"a", "a"}).name_of(1) == "rank 1");
  CHECK(Topology(0, 1, teams, {"a", "b"}).name_of(1) == "rank 1 on b");
}

}  // namespace

int main() {
  for (const int workers : {1, 2, 3})
    for (const Teams& teams : {Teams{{0}}, Teams{{0, 1}, {2, 3}}, Teams{{0, 1, 2}, {3}},
                               Teams{{0}, {1, 2, 3}}, Teams{{0, 2}, {1, 3}}, Teams{{0, 4}, {1}, {2, 3}}}) {
      check_carriers(workers, teams);
      check_every_segment_is_carried_once(workers, teams);
    }
  equal_teams_carry_along_rails();
  a_small_team_carries_more_for_each_rank();
  one_team_carries_its_own_alone();
  powers_of_two_in_the_order_of_ranks_keep_the_order();
  other_teams_do_not_keep_the_order();
  hosts_are_named_where_there_are_several();
}
