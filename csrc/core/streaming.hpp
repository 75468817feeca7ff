#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace xc {

// Memory traffic that goes around the caches, where the processor can; elsewhere plain copies.

inline constexpr std::int64_t kLineBytes = 64;

// Returns true if the caches keep so little of so many bytes from one step to the next that weights are
// better written past them.
bool exceeds_cache(std::int64_t bytes);

// Returns true if XC_STORE in the environment fixes how steps store.
bool store_is_fixed();

// Asks for the next bytes to be brought near; never faults, wherever it points.
[[gnu::always_inline]] inline void fetch(const std::byte* from, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(from + at, 0, 2);
}

// The number of bytes that one store instruction writes past the cache.
enum class StoreWidth : std::uint8_t { none = 0, bytes16 = 16, bytes32 = 32, bytes64 = 64 };

// Returns the widest store that the tile loops of this machine may use.
StoreWidth widest_store();

// Returns the width that steps use: the widest, or XC_STORE=16, 32 or 64 in the environment if that is less.
StoreWidth usual_store();

// Throws UsageError if XC_STORE is anything else.
void check_store();

// Returns the widest store, up to `most`, for which the address is aligned; none below 16 bytes.
inline StoreWidth store_for(const void* to, StoreWidth most) {
  auto width = static_cast<std::uintptr_t>(most);
  while (width >= 16 && reinterpret_cast<std::uintptr_t>(to) % width != 0) width /= 2;
  return width < 16 ? StoreWidth::none : static_cast<StoreWidth>(width);
}

#if defined(__SSE2__)

// A wider instruction is written out, because a function for several instruction sets cannot call the
// intrinsics of one of them. Who asks for it has looked at the processor first: see widest_store().
template <std::size_t kBytes>
[[gnu::always_inline]] inline void store_past_cache(const void* from, void* to, StoreWidth width) {
  static_assert(kBytes % kLineBytes == 0);
  using Line = std::byte[kLineBytes];
  using Half = std::byte[kLineBytes / 2];
  const auto* source = static_cast<const __m128i*>(from);
  auto* target = static_cast<__m128i*>(to);
  for (std::size_t line = 0; line < kBytes / kLineBytes; ++line, source += 4, target += 4) {
    if (width == StoreWidth::bytes64) {
      asm("vmovdqa64 %1, %%zmm0\n\tvmovntdq %%zmm0, %0"
          : "=m"(*reinterpret_cast<Line*>(target))
          : "m"(*reinterpret_cast<const Line*>(source))
          : "xmm0");
    } else if (width == StoreWidth::bytes32) {
      for (int half = 0; half < 2; ++half)
        asm("vmovdqa %1, %%ymm0\n\tvmovntdq %%ymm0, %0"
            : "=m"(*reinterpret_cast<Half*>(target + 2 * half))
            : "m"(*reinterpret_cast<const Half*>(source + 2 * half))
            : "xmm0");
    } else {
      for (int part = 0; part < 4; ++part) _mm_stream_si128(target + part, _mm_load_si128(source + part));
    }
  }
}

// Makes streamed stores visible before any later store.
inline void finish_streaming() { _mm_sfence(); }

#else

template <std::size_t kBytes>
[[gnu::always_inline]] inline void store_past_cache(const void* from, void* to, StoreWidth) {
  std::memcpy(to, from, kBytes);
}

inline void finish_streaming() {}

#endif

}  // namespace xc
