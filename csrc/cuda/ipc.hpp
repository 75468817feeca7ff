#pragma once

#include <cuda_runtime.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "comm/team.hpp"
#include "cuda/check.hpp"

namespace xc {

// What a rank tells the others of something that it made on its GPU: the process, in which alone the address
// means something, and the handle by which other processes open it.
template <class Handle>
struct Ticket {
  pid_t process;
  std::uint64_t address;
  Handle handle;
};

// Collective. Every member's ticket, in the order of places; DeviceError on all ranks if one has a complaint.
template <class Handle>
std::vector<Ticket<Handle>> exchange_tickets(const Team& team, const Ticket<Handle>& mine) {
  const std::vector<std::string> all = team.all_gather({reinterpret_cast<const char*>(&mine), sizeof mine});
  std::vector<Ticket<Handle>> members(static_cast<std::size_t>(team.size()));
  for (int p = 0; p < team.size(); ++p)
    std::memcpy(&members[static_cast<std::size_t>(p)], all[static_cast<std::size_t>(team.member(p))].data(),
                sizeof mine);
  return members;
}

}  // namespace xc
