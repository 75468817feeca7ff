#pragma once

// Tile loops are compiled once per instruction set; the loader picks at start-up. CMake probes whether the
// compiler and the sanitizer in use can do this and defines XC_HAVE_CLONES. No clone may use another rounding
// than the baseline: contraction into fused multiply-add is off for the whole library, so every clone gives
// the same bits.

#ifdef XC_HAVE_CLONES
#define XC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define XC_CLONES
#endif

// A lambda inside a clone must be part of it.
#define XC_INLINE __attribute__((always_inline))

namespace xc {

// The name of the clone that the loader picks on this machine.
inline const char* chosen_clone() {
#ifdef XC_HAVE_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace xc
