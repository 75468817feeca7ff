#include "check.hpp"
#include "engine/store_choice.hpp"

using namespace xc;

namespace {

// Feeds a choice with the times of both ways for so many walks; returns how many of them streamed.
int feed(StoreChoice& choice, int walks, double streamed, double cached) {
  int streams = 0;
  for (int i = 0; i < walks; ++i) {
    streams += choice.streams();
    choice.took((choice.streams() ? streamed : cached) * 100, 100);
  }
  return streams;
}

void the_faster_way_is_taken() {
  for (const bool usual : {false, true})
    for (const bool faster : {false, true}) {
      StoreChoice choice(usual, true, 1);
      CHECK(choice.streams() == usual);
      CHECK(feed(choice, 24, faster ? 1.0 : 2.0, faster ? 2.0 : 1.0) == 12);
      CHECK(!choice.tries() && choice.streams() == faster);
    }
}

void a_small_gain_changes_nothing() {
  StoreChoice choice(true, true, 1);
  feed(choice, 24, 1.0, 0.98);
  CHECK(!choice.tries() && choice.streams());
}

void nothing_is_tried_unless_it_shall() {
  StoreChoice choice(true, false, 1);
  CHECK(feed(choice, 100, 2.0, 1.0) == 100);
}

// The first step of each turn has the other way's caches.
void first_steps_of_a_turn_do_not_count() {
  StoreChoice choice(false, true, 2);
  for (int i = 0; i < 48; ++i) {
    const bool first = i % 8 < 2;
    choice.took(choice.streams() ? (first ? 100 : 1) : 2, 1);
  }
  CHECK(!choice.tries() && choice.streams());
}

void steps_without_elements_do_not_count() {
  StoreChoice choice(false, true, 1);
  for (int i = 0; i < 100; ++i) choice.took(1, 0);
  CHECK(choice.tries());
}

}  // namespace

int main() {
  the_faster_way_is_taken();
  a_small_gain_changes_nothing();
  nothing_is_tried_unless_it_shall();
  first_steps_of_a_turn_do_not_count();
  steps_without_elements_do_not_count();
}
