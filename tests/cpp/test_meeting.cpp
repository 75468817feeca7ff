#include <csignal>
#include <thread>

#include "check.hpp"
#include "core/error.hpp"
#include "ranks.hpp"

using namespace xc;

namespace {

struct Page {
  OutcomeWord outcome;
  ArrivalWord arrival;
};

// A team with one page of control words in each rank, and a meeting over them.
struct Fixture {
  Fixture(const Ranks& ranks, int rank, Limits limits, Provider provider = Provider::memfd)
      : team(options(ranks, rank, limits, provider)), pages(team.share(sizeof(Page))), meeting(make()) {}
  static TeamOptions options(const Ranks& ranks, int rank, Limits limits, Provider provider) {
    TeamOptions options = ranks.options(rank);
    options.limits = limits;
    options.provider = provider;
    return options;
  }
  Page& page(int rank) { return *reinterpret_cast<Page*>(pages[static_cast<std::size_t>(rank)]->data()); }
  Meeting make() {
    std::vector<ArrivalWord*> arrivals;
    for (int r = 0; r < team.size(); ++r) arrivals.push_back(&page(r).arrival);
    return team.meeting(page(0).outcome, arrivals);
  }
  Team team;
  Shared pages;
  Meeting meeting;
};

constexpr Limits kPatient{Seconds(20), Seconds(20), Seconds(20)};
constexpr Limits kShort{Seconds(0.3), Seconds(0.3), Seconds(20)};

void many_meetings_keep_step(int size, Provider provider) {
  const Ranks ranks(size);
  ranks.run_well([&](int rank) {
    Fixture f(ranks, rank, kPatient, provider);
    for (int i = 0; i < 2000; ++i) f.meeting.meet("meeting A", i, Seconds(20));
  });
}

// Whoever kills rank 1: the others get the same error, soon.
void a_dead_rank_is_named_by_all() {
  const Ranks ranks(3);
  const auto states = ranks.run([&](int rank) {
    Fixture f(ranks, rank, kPatient);
    f.meeting.meet("meeting A", 1, Seconds(20));
    if (rank == 1) raise(SIGKILL);
    const auto since = std::chrono::steady_clock::now();
    const std::string text = thrown<PeerError>([&] { f.meeting.meet("meeting B", 1, Seconds(20)); });
    CHECK(text.find("rank 1 died") == 0);
    CHECK(text.find("meeting B of step 1") != std::string::npos);
    CHECK(std::chrono::steady_clock::now() - since < std::chrono::seconds(5));
    thrown<PeerError>([&] { f.meeting.meet("meeting A", 2, Seconds(20)); });  // a failure is final
  });
  CHECK(states[0] == 0 && states[2] == 0 && WIFSIGNALED(states[1]));
}

void a_late_rank_meets_the_failure_that_it_caused() {
  const Ranks ranks(2);
  ranks.run_well([&](int rank) {
    Fixture f(ranks, rank, kShort);
    if (rank == 1) std::this_thread::sleep_for(Seconds(1));
    const std::string text = thrown<PeerError>([&] { f.meeting.meet("meeting A", 7, Seconds(0.3)); });
    CHECK(text.find("rank 1 did not come in time") == 0);
  });
}

void a_rank_that_leaves_is_named() {
  const Ranks ranks(2);
  ranks.run_well([&](int rank) {
    Fixture f(ranks, rank, kPatient);
    if (rank == 1) return f.team.leave();
    CHECK(thrown<PeerError>([&] { f.meeting.meet("meeting A", 1, Seconds(20)); }).find("rank 1 left") == 0);
    while (f.team.alive(1)) std::this_thread::sleep_for(Seconds(0.01));  // until its process is gone
  });
}

void an_abandoned_meeting_fails_for_all() {
  const Ranks ranks(2);
  ranks.run_well([&](int rank) {
    Fixture f(ranks, rank, kPatient);
    if (rank == 0) f.meeting.abandon(Failure::abandoned);
    CHECK(thrown<PeerError>([&] { f.meeting.meet("meeting A", 1, Seconds(20)); }).find("rank 0 gave up") ==
          0);
  });
}

void a_forked_child_is_refused_and_does_not_hold_the_lock() {
  const Ranks ranks(2);
  ranks.run_well([&](int rank) {
    Fixture f(ranks, rank, kPatient);
    if (rank == 0) {
      const pid_t child = fork();
      if (child == 0) {
        thrown<UsageError>([&] { f.team.require_own_process(); });
        _exit(0);
      }
      int state = 0;
      waitpid(child, &state, 0);
      CHECK(state == 0);
    }
    f.meeting.meet("meeting A", 1, Seconds(20));
    CHECK(f.team.alive(1 - rank));
    f.meeting.meet("meeting B", 1, Seconds(20));
  });
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3, 4}) many_meetings_keep_step(size, Provider::memfd);
  many_meetings_keep_step(2, Provider::posix);
  a_dead_rank_is_named_by_all();
  a_late_rank_meets_the_failure_that_it_caused();
  a_rank_that_leaves_is_named();
  an_abandoned_meeting_fails_for_all();
  a_forked_child_is_refused_and_does_not_hold_the_lock();
}
