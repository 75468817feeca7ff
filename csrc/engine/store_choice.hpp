#pragma once

#include <cstdint>
#include <vector>

namespace xc {

// The choice to store a step's weights past the cache or not, made during the first steps: both ways are
// timed in turns, several steps each, because what a step leaves in the cache is the next one's. Neither way
// changes a bit, so each rank chooses for itself, with the gradients as its own training brings them.
class StoreChoice {
 public:
  // `usual` is how it begins, and how it stays where nothing is tried or the other way gains little; `walks`
  // is how many walks make a step.
  StoreChoice(bool usual, bool tries, int walks);

  // True if the next walk stores past the cache.
  bool streams() const;
  // The walk has taken so long for so many elements.
  void took(double seconds, std::int64_t elements);
  bool tries() const { return tries_; }

 private:
  bool other() const;
  void decide();

  bool chosen_;
  bool tries_;
  int turn_;  // walks of one turn
  int number_ = 0;
  std::vector<double> seconds_[2];  // for an element: as usual, the other way
};

}  // namespace xc
