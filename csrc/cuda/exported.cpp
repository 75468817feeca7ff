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
  std::shared_ptr<void> made;
  bool is_over() const { return count_in(*word).load() >= others; }
};

std::mutex mutex;
std::list<Waiting>& waiting() {
  static auto* const list = new std::list<Waiting>;  // outlives what is let go of at the very end
  return *list;
}

void let_go_of_what_is_closed() {
  const std::lock_guard lock(mutex);
  waiting().remove_if([](const Waiting& one) { return one.is_over(); });
}

}  // namespace

Export::Export(Team& team) : others_(static_cast<std::uint32_t>(team.size() - 1)) {
  const Shared words = team.share(sizeof(std::uint32_t));
  let_go_of_what_is_closed();  // all have let go of earlier exports that failed
  word_ = words[static_cast<std::size_t>(team.place())];
  for (const auto& word : words)
    opened_.push_back(word == word_ ? nullptr : std::shared_ptr<void>(nullptr, [word](void*) {
      count_in(*word).fetch_add(1);
    }));
}

std::shared_ptr<void> Export::keep(std::shared_ptr<void> made) const {
  return {made.get(), [made, word = word_, others = others_](void*) mutable {
            {
              const std::lock_guard lock(mutex);
              waiting().push_back({std::move(word), others, std::move(made)});
            }
            let_go_of_what_is_closed();
          }};
}

}  // namespace xc
