#pragma once

#include <memory>
#include <string_view>

#include "comm/team.hpp"
#include "device/stream.hpp"

namespace xc {

// How the queued work of a team's ranks is ordered: see Storage. EVENTS are recorded by its rank and waited
// for by the others' streams; the hosts meet in between. FLAGS are words in the ranks' memory that a kernel
// of the announcing rank writes and a kernel of the following one looks at, up to a deadline. (A stream could
// wait for such a word itself, but without a deadline: a rank that dies would hang it for ever.)
enum class Sync { event, spin };

class Order {
 public:
  virtual ~Order() = default;
  virtual void announce(Stream stream) = 0;
  virtual void follow(Stream stream) = 0;
  // Throws PeerError if a follower gave up.
  virtual void check() {}
};

// Collective. Ranks that are alone need none.
std::unique_ptr<Order> make_order(Team& team, Sync sync);

// "event" or "spin".
Sync sync_from(std::string_view name);

}  // namespace xc
