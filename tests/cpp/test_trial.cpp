#include <vector>

#include "check.hpp"
#include "engine/trial.hpp"

using namespace xc;

namespace {

// Gives a trial the times of its ways for so many walks; returns how often each was taken.
std::vector<int> feed(Trial& trial, int walks, const std::vector<double>& seconds) {
  std::vector<int> taken(seconds.size());
  for (int i = 0; i < walks; ++i) {
    const auto way = static_cast<std::size_t>(trial.way());
    ++taken[way];
    trial.took(seconds[way] * 100, 100);
  }
  return taken;
}

void the_fastest_way_is_taken() {
  for (std::size_t ways : {2, 3})
    for (std::size_t fastest = 0; fastest < ways; ++fastest) {
      std::vector<double> seconds(ways, 2.0);
      seconds[fastest] = 1.0;
      Trial trial(static_cast<int>(ways), 1);
      CHECK(trial.way() == 0);
      CHECK(feed(trial, 12 * static_cast<int>(ways), seconds) == std::vector<int>(ways, 12));
      CHECK(!trial.goes_on() && trial.way() == static_cast<int>(fastest));
    }
}

void a_small_gain_changes_nothing() {
  Trial trial(3, 1);
  feed(trial, 36, {1.0, 0.98, 0.975});
  CHECK(!trial.goes_on() && trial.way() == 0);
}

void one_way_is_not_tried() {
  Trial trial(1, 1);
  CHECK(!trial.goes_on());
  CHECK(feed(trial, 100, {1.0}) == std::vector<int>{100});
}

// The first step of each turn has the other way's caches.
void first_steps_of_a_turn_do_not_count() {
  Trial trial(2, 2);
  for (int i = 0; i < 48; ++i) {
    const bool first = i % 8 < 2;
    trial.took(trial.way() == 1 ? (first ? 100 : 1) : 2, 1);
  }
  CHECK(!trial.goes_on() && trial.way() == 1);
}

void steps_without_elements_do_not_count() {
  Trial trial(2, 1);
  for (int i = 0; i < 100; ++i) trial.took(1, 0);
  CHECK(trial.goes_on());
}

}  // namespace

int main() {
  the_fastest_way_is_taken();
  a_small_gain_changes_nothing();
  one_way_is_not_tried();
  first_steps_of_a_turn_do_not_count();
  steps_without_elements_do_not_count();
}
