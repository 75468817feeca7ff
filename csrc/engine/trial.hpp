#pragma once

#include <cstdint>
#include <vector>

namespace xc {

// A choice between several ways to walk, made during the first steps: they are timed in turns, several steps
// each, because what a step leaves in the cache is the next one's. No way changes a bit, so each rank chooses
// for itself, with the gradients as its own training brings them.
class Trial {
 public:
  // Way 0 is the usual one, which stays where nothing is tried or another gains little; `walks` is how many
  // walks make a step.
  Trial(int ways, int walks);

  // The way that the next walk takes.
  int way() const;
  // The walk has taken so long for so many elements.
  void took(double seconds, std::int64_t elements);
  bool goes_on() const { return !seconds_.empty(); }

 private:
  void decide();

  int chosen_ = 0;
  int turn_;  // walks of one turn
  int number_ = 0;
  std::vector<std::vector<double>> seconds_;  // for an element, by way; empty: nothing is tried any more
};

}  // namespace xc
