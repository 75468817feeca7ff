#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "comm/memory.hpp"

namespace xc {

// Memory of a GPU that other processes have opened must not be freed before they have closed it, and an
// engine ends at each rank when that rank likes. So a word in the ranks' shared memory counts who has closed;
// what nobody needs here any more waits until the count is full, and is looked at whenever something else is
// let go of. What still waits when the process ends goes with the process.

// An other rank has closed what this word counts for.
void count_closed(const Mapping& word);

// Frees now, or when `others` have closed.
void free_when_closed(std::shared_ptr<Mapping> word, std::uint32_t others, std::function<void()> free);

}  // namespace xc
