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

// Whether so many bytes are more than the last-level cache that this processor shares.
bool exceeds_cache(std::int64_t bytes);

// Asks for the next bytes to be brought near; never faults, wherever it points.
[[gnu::always_inline]] inline void fetch(const std::byte* from, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(from + at, 0, 2);
}

#if defined(__SSE2__)

inline bool is_streamable(const void* to) {
  return reinterpret_cast<std::uintptr_t>(to) % sizeof(__m128i) == 0;
}

template <std::size_t kBytes>
[[gnu::always_inline]] inline void store_past_cache(const void* from, void* to) {
  const auto* source = static_cast<const __m128i*>(from);
  auto* target = static_cast<__m128i*>(to);
  for (std::size_t i = 0; i < kBytes / sizeof(__m128i); ++i)
    _mm_stream_si128(target + i, _mm_load_si128(source + i));
}

// Makes streamed stores visible before any later store.
inline void finish_streaming() { _mm_sfence(); }

#else

inline bool is_streamable(const void*) { return true; }

template <std::size_t kBytes>
[[gnu::always_inline]] inline void store_past_cache(const void* from, void* to) {
  std::memcpy(to, from, kBytes);
}

inline void finish_streaming() {}

#endif

}  // namespace xc
