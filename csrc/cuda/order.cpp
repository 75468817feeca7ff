#include "cuda/order.hpp"

#include <string>

namespace xc {

std::unique_ptr<Order> make_order(Team& team, Sync sync) {
  if (team.size() == 1) return nullptr;
  if (sync == Sync::event) return make_event_order(team);
  return sync == Sync::spin ? make_spin_order(team) : make_memop_order(team);
}

Sync sync_from(std::string_view name) {
  if (name == "event") return Sync::event;
  if (name == "spin") return Sync::spin;
  if (name == "memop") return Sync::memop;
  throw UsageError("XC_GPU_SYNC is event, spin or memop, not " + std::string(name));
}

void raise_late(const Team& team, int place, std::uint32_t announcement) {
  const int rank = team.member(place);
  throw PeerError("rank " + std::to_string(rank) + " did not bring its work on the GPU to an end within " +
                      std::to_string(int(team.limits().inside_pass.count())) + " s (announcement " +
                      std::to_string(announcement) +
                      "); weights and state are no longer to be trusted: go back to the last checkpoint",
                  rank, 0, "late", "");
}

}  // namespace xc
