#pragma once

#include <memory>
#include <vector>

#include "comm/topology.hpp"
#include "comm/wire.hpp"

namespace xc {

// The largest of all ranks' numbers, place by place, over the wire; an all-reduce that does not block. Few
// ranks tell each other directly, so that each knows whom it waits for; many in a logarithmic number of
// rounds, in which each tells what it knows to the one 1, 2, 4, ... ranks further on (all-reduce by
// dissemination: Hensgen, Finkel and Manber 1988; the largest may be counted twice).
//
// It is made of transfers with a tag of its own, and not of MPI's collectives: one that a rank never joins
// would stand in the way of all later ones.
class LargestOfAll {
 public:
  // Begins. `numbers` are this rank's, as many as every other's.
  LargestOfAll(Wire& wire, const Topology& topology, int tag, std::vector<double> numbers);
  ~LargestOfAll();
  LargestOfAll(const LargestOfAll&) = delete;
  LargestOfAll& operator=(const LargestOfAll&) = delete;

  bool done();                       // moves it on
  std::vector<int> awaited() const;  // ranks that have not been heard
  const std::vector<double>& numbers() const { return state_->numbers; }

 private:
  struct Pending {
    Wire::Transfer transfer;
    int rank;
  };
  // What the wire reads and writes; it outlives this object if transfers never end.
  struct State {
    std::vector<double> numbers;
    std::vector<double> sent;
    std::vector<std::vector<double>> received;
  };
  void begin_round();
  bool round_done();

  Wire& wire_;
  const Topology& topology_;
  int tag_;
  int distance_ = 1;  // of a round, or all ranks at once
  bool direct_;
  std::unique_ptr<State> state_;
  std::vector<Pending> sending_;
  std::vector<Pending> receiving_;
};

}  // namespace xc
