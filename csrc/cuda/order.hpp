#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "comm/team.hpp"
#include "device/stream.hpp"

namespace xc {

// How the queued work of a team's ranks is ordered: see Storage. EVENTS are recorded by their rank and waited
// for by the others' streams; the hosts meet in between. The other two count announcements in words. To SPIN
// is to let a kernel of the announcing rank write them into the others' memory, and a kernel of the following
// one look at them, up to a deadline. MEMOPS, which streams do by themselves, write them and await them
// without a kernel; the deadline is kept by a thread of the host.
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

// Of each kind, collective; DeviceError on all ranks if one cannot have it.
std::unique_ptr<Order> make_event_order(Team& team);
std::unique_ptr<Order> make_spin_order(Team& team);
std::unique_ptr<Order> make_memop_order(Team& team);

// "event", "spin" or "memop".
Sync sync_from(std::string_view name);

// PeerError: the rank at a place did not bring what it announced to an end.
[[noreturn]] void raise_late(const Team& team, int place, std::uint32_t announcement);

}  // namespace xc
