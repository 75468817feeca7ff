#include "core/streaming.hpp"

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include "core/clones.hpp"
#include "core/environment.hpp"
#include "core/error.hpp"

namespace xc {
namespace {

// As the kernel reports it; sysconf asks the processor itself and in virtual machines gets the whole
// socket's.
std::int64_t last_level_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  std::int64_t kilobytes = 0;
  return file >> kilobytes ? kilobytes << 10 : std::int64_t{32} << 20;
}

std::optional<StoreWidth> asked_store() {
  const auto bytes = number_in_environment("XC_STORE");
  if (!bytes) return std::nullopt;
  if (*bytes != 16 && *bytes != 32 && *bytes != 64)
    throw UsageError("XC_STORE is " + std::to_string(*bytes) + "; it takes 16, 32 or 64 bytes");
  return static_cast<StoreWidth>(*bytes);
}

}  // namespace

StoreWidth widest_store() {
  const std::string_view clone = chosen_clone();
  if (clone == "x86-64-v4") return StoreWidth::bytes64;
  return clone == "x86-64-v3" ? StoreWidth::bytes32 : StoreWidth::bytes16;
}

StoreWidth usual_store() {
  static const StoreWidth kUsual = std::min(asked_store().value_or(widest_store()), widest_store());
  return kUsual;
}

void check_store() { asked_store(); }

// A step reads and writes each byte once, so what a cache keeps of one step for the next is less than its
// size, and in virtual machines the kernel may report a cache that strangers share.
bool exceeds_cache(std::int64_t bytes) {
  static const std::int64_t kCache =
      std::min(last_level_cache_bytes() * 3 / 8,
               std::int64_t{std::max(1u, std::thread::hardware_concurrency())} * (std::int64_t{6} << 20));
  return bytes > kCache;
}

bool store_is_fixed() {
  static const bool kFixed = asked_store().has_value();
  return kFixed;
}

}  // namespace xc
