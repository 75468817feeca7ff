#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/liveness.hpp"
#include "comm/meeting.hpp"
#include "comm/memory.hpp"
#include "core/error.hpp"

namespace xc {

// A TEAM is the set of ranks that really opened each other's memory: each opens every peer's file and reads
// back the number that the peer wrote there. It hands out shared memory, knows who is alive, and starts
// meetings.

struct TeamOptions {
  int rank = 0;
  int size = 1;
  int workers = 1;  // per rank; the same on every rank
  Provider provider = Provider::memfd;
  Limits limits;
  // Gives every rank's bytes to every rank, in the order of ranks.
  std::function<std::vector<std::string>(const std::string&)> all_gather;
  std::function<void()> interrupted;
  std::function<void(const std::string&)> warn;
};

// Every rank's part of one piece of shared memory, in the order of ranks.
using Shared = std::vector<std::shared_ptr<Mapping>>;

class Team {
 public:
  explicit Team(TeamOptions options);  // collective
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  int workers_per_rank() const { return options_.workers; }
  int worker_count() const { return options_.size * options_.workers; }
  int first_worker() const { return options_.rank * options_.workers; }
  const Limits& limits() const { return options_.limits; }

  // Collective. Each rank brings `bytes` of its own, zeroed, and sees all.
  Shared share(std::size_t bytes) { return is_local() ? share_locally(bytes) : share_files(bytes); }
  // Collective. Every rank's text; the exchange that constructors agree by.
  std::vector<std::string> all_gather(const std::string& bytes) const { return options_.all_gather(bytes); }
  // Collective. Throws the same E on every rank if any rank brings a text.
  template <class E = CommError>
  void agree(const std::string& complaint) const {
    if (const std::string text = first_complaint(complaint); !text.empty()) throw E(text);
  }

  Meeting meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals);

  bool alive(int rank) const;
  bool departed(int rank) const;
  // Says good-bye: peers that wait for this rank stop waiting, and learn the reason if there is one.
  // Idempotent.
  void leave(const std::string& reason = {});
  // The reason with which a rank left.
  std::string farewell(int rank) const;
  // A forked child shares the memory but not the place in the team.
  bool own_process() const;
  void require_own_process() const;
  // UsageError there, and after leave().
  void require_member() const;

 private:
  std::string first_complaint(const std::string& mine) const;
  DepartureWord& departure(int rank) const;
  bool is_local() const { return options_.provider == Provider::local; }
  void greet();
  void require_memory(std::size_t bytes) const;
  Shared share_files(std::size_t bytes);
  Shared share_locally(std::size_t bytes);

  TeamOptions options_;
  Beacon beacon_;
  std::vector<Watch> watches_;
  Shared departures_;
  int processors_ = 1;  // that the ranks may use together
};

}  // namespace xc
