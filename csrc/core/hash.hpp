#pragma once

#include <cstdint>
#include <string_view>

namespace xc {

// FNV-1a, 64 bits: tells apart what ranks did by mistake, not what an attacker did on purpose.
constexpr std::uint64_t hash_of(std::string_view bytes, std::uint64_t seed = 0xcbf29ce484222325u) {
  for (const char c : bytes) seed = (seed ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return seed;
}

}  // namespace xc
