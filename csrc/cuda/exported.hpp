#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/team.hpp"

namespace xc {

// Memory and events of a GPU that other processes have opened must not go before they have closed them, and
// an engine ends at each rank when that rank likes. So a word in the ranks' shared memory counts who has
// closed; what nobody needs here any more waits until the count is full, and is looked at whenever something
// else is exported or let go of. What still waits when the process ends goes with the process.
//
// An EXPORT is one such word for each rank. A rank counts once in every other's word, when it lets go of what
// stands for it, whether it ever opened anything or failed before.
class Export {
 public:
  explicit Export(Team& team);  // collective

  // Holds what this rank made; it goes when the returned owner has gone and the others have closed it.
  std::shared_ptr<void> keep(std::shared_ptr<void> made) const;
  // To be held as long as what another member made is open here.
  const std::shared_ptr<void>& opened(std::size_t place) const { return opened_[place]; }

 private:
  std::shared_ptr<Mapping> word_;
  std::uint32_t others_;
  std::vector<std::shared_ptr<void>> opened_;
};

}  // namespace xc
