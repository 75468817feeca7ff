#include "core/streaming.hpp"

#include <fstream>

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

bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t kCache = last_level_cache_bytes();
  return bytes > kCache;
}

}  // namespace xc
