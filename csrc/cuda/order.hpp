#pragma once

#include <memory>
#include <string_view>

#include "comm/team.hpp"
#include "device/stream.hpp"

namespace xc {

// How the queued work of a team's ranks is ordered: see Storage. An EVENT is recorded by its rank and waited
// for by the others' streams; the hosts meet in between. FLAGS are words in the ranks' memory that a kernel
// of the announcing rank writes and a kernel of the following one looks at, up to a deadline. MEMOPS are the
// same words, written and awaited by the stream itself, without a kernel.
enum class Sync { event, spin, memop };

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

// "event", "spin" or "memop".
Sync sync_from(std::string_view name);

}  // namespace xc
