#include "engine/storage.hpp"

#include <cstring>

namespace xc {

void Storage::copy_all(std::span<const Copy> copies) {
  for (const Copy& each : copies) copy(each.to, each.from, static_cast<std::size_t>(each.bytes));
}

Shared HostStorage::share(Team& team, std::size_t bytes) { return team.share(bytes, Forked::copy); }

std::shared_ptr<std::byte> HostStorage::allocate(std::size_t bytes) {
  return {new std::byte[bytes], std::default_delete<std::byte[]>()};
}

void HostStorage::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void HostStorage::clear(void* at, std::size_t bytes) {
  if (bytes > 0) std::memset(at, 0, bytes);
}

}  // namespace xc
