#include "core/streaming.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string_view>
#include <thread>

#include "core/clones.hpp"

namespace xc {
namespace {

// As the kernel reports it; sysconf asks the processor itself and in virtual machines gets the whole
// socket's.
std::int64_t last_level_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  std::int64_t kilobytes = 0;
  return file >> kilobytes ? kilobytes << 10 : std::int64_t{32} << 20;
}

}  // namespace

StoreWidth widest_store() {
  const std::string_view clone = chosen_clone();
  if (clone == "x86-64-v4") return StoreWidth::bytes64;
  return clone == "x86-64-v3" ? StoreWidth::bytes32 : StoreWidth::bytes16;
}

StoreWidth usual_store() {
  static const StoreWidth kUsual = [] {
    const char* const asked = std::getenv("XC_STORE");
    const int bytes = asked ? std::atoi(asked) : 0;
    for (const StoreWidth width : {StoreWidth::bytes16, StoreWidth::bytes32})
      if (bytes == static_cast<int>(width)) return std::min(width, widest_store());
    return widest_store();
  }();
  return kUsual;
}

// A step reads and writes each byte once, so what a cache keeps of one step for the next is less than its
// size, and in virtual machines the kernel may report a cache that strangers share.
bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t kCache =
      std::min(last_level_cache_bytes() * 3 / 8,
               std::int64_t{std::max(1u, std::thread::hardware_concurrency())} * (std::int64_t{6} << 20));
  return bytes > kCache;
}

bool worth_trying(std::int64_t bytes) {
  static const bool kFixed = std::getenv("XC_STORE") != nullptr;
  return !kFixed && bytes >= (std::int64_t{4} << 20);
}

}  // namespace xc
