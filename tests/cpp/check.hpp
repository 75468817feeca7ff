#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

// CHECK says where and what, and ends the test.
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// Runs a statement that must throw E, and gives its text.
template <class E, class F>
std::string thrown(F statement) {
  try {
    statement();
  } catch (const E& error) {
    return error.what();
  }
  std::fprintf(stderr, "nothing was thrown\n");
  std::exit(1);
}
