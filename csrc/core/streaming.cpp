#include "core/streaming.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string_view>

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

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

StoreWidth widest_store() {
  const std::string_view clone = chosen_clone();
  if (clone == "x86-64-v4") return StoreWidth::bytes64;
  return clone == "x86-64-v3" ? StoreWidth::bytes32 : StoreWidth::bytes16;
}

Streaming usual_streaming() {
  static const Streaming kUsual = [] {
    Streaming usual{widest_store(), is_intel()};
    if (const char* store = std::getenv("XC_STORE"))
      usual.store = std::min(static_cast<StoreWidth>(std::atoi(store)), widest_store());
    if (const char* fetch = std::getenv("XC_FETCH")) usual.fetches_tiles = std::string_view(fetch) == "tile";
    return usual;
  }();
  return kUsual;
}

bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t kCache = last_level_cache_bytes();
  return bytes > kCache;
}

}  // namespace xc
