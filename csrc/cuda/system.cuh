#pragma once

#include <cstdint>

namespace xc {

// What a thread on a device shares with the whole system: the clock, in nanoseconds, and words that other
// devices and the host read and write. What came before a store is seen by whoever has loaded what it stored.

__device__ inline std::uint64_t system_clock() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ inline void store_to_system(std::uint32_t* word, std::uint32_t value) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline std::uint32_t load_from_system(const std::uint32_t* word) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

}  // namespace xc
