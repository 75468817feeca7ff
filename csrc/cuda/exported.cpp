#include "cuda/exported.hpp"

#include <atomic>
#include <list>
#include <mutex>
#include <utility>

namespace xc {
namespace {

std::atomic_ref<std::uint32_t> count_in(const Mapping& word) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(word.data()));
}

struct Waiting {
  std::shared_ptr<Mapping> word;
  std::uint32_t others;
  std::function<void()> free;
  bool is_over() const { return count_in(*word).load() >= others; }
};

std::mutex mutex;
std::list<Waiting>& waiting() {
  static auto* const list = new std::list<Waiting>;  // outlives what is let go of at the very end
  return *list;
}

}  // namespace

void count_closed(const Mapping& word) { count_in(word).fetch_add(1); }

void free_when_closed(std::shared_ptr<Mapping> word, std::uint32_t others, std::function<void()> free) {
  const std::lock_guard lock(mutex);
  waiting().push_back({std::move(word), others, std::move(free)});
  waiting().remove_if([](const Waiting& one) {
    if (!one.is_over()) return false;
    one.free();
    return true;
  });
}

}  // namespace xc
