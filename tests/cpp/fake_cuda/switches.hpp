#pragma once

#include <cstddef>

// Sanitizers want to be told when a thread goes on on another stack.

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace switches {

struct Leaving {
  void* stack = nullptr;
};

#if defined(__SANITIZE_THREAD__)

struct Fibre {
  void* fibre = nullptr;
};
inline Fibre present() { return {__tsan_get_current_fiber()}; }
inline Fibre make(void*, std::size_t) { return {__tsan_create_fiber(0)}; }
inline void end(Fibre& fibre) { __tsan_destroy_fiber(fibre.fibre); }
inline Leaving to(Fibre&, Fibre& next) {
  __tsan_switch_to_fiber(next.fibre, 0);
  return {};
}
inline void arrived(Fibre&, Leaving) {}
inline void began() {}

#elif defined(__SANITIZE_ADDRESS__)

struct Fibre {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
};
inline Fibre present() {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* bottom = nullptr;
  std::size_t bytes = 0;
  pthread_attr_getstack(&attributes, &bottom, &bytes);
  pthread_attr_destroy(&attributes);
  return {bottom, bytes};
}
inline Fibre make(void* bottom, std::size_t bytes) { return {bottom, bytes}; }
inline void end(Fibre&) {}
inline Leaving to(Fibre&, Fibre& next) {
  Leaving leaving;
  __sanitizer_start_switch_fiber(&leaving.stack, next.bottom, next.bytes);
  return leaving;
}
inline void arrived(Fibre&, Leaving leaving) {
  __sanitizer_finish_switch_fiber(leaving.stack, nullptr, nullptr);
}
inline void began() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

#else

struct Fibre {};
inline Fibre present() { return {}; }
inline Fibre make(void*, std::size_t) { return {}; }
inline void end(Fibre&) {}
inline Leaving to(Fibre&, Fibre&) { return {}; }
inline void arrived(Fibre&, Leaving) {}
inline void began() {}

#endif

}  // namespace switches
