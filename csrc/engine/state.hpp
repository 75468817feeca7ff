#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "comm/team.hpp"
#include "engine/arenas.hpp"
#include "engine/plan.hpp"
#include "engine/rails.hpp"
#include "engine/storage.hpp"

namespace xc {

// The master weights and the rule's state, layer by layer, as checkpoints have them. Shards hold them in
// pieces; those of other teams must be collected before they can be read.
template <class T>
class State {
 public:
  State(const Plan& plan, const Arenas<T>& arenas, Storage& storage, const Team& team, Rails<T>* rails,
        int slots)
      : plan_(plan),
        arenas_(arenas),
        storage_(storage),
        team_(team),
        rails_(rails),
        slots_(static_cast<std::size_t>(slots)) {}

  // Takes this rank's parts of a layer: slot 0 is w. Null stands for zeros.
  void write(std::size_t layer, int slot, const void* from) const;
  // Collective, of all teams: every slot of theirs, to all ranks or to one.
  void collect(std::optional<int> only_rank);
  void forget_collected() { collected_.clear(); }
  void read(std::size_t layer, int slot, std::int64_t from, std::int64_t to, void* out) const;
  // The part of a layer that this rank updates.
  std::pair<std::int64_t, std::int64_t> owned(std::size_t layer) const;

 private:
  std::vector<T> own_slot(std::size_t slot) const;

  const Plan& plan_;
  const Arenas<T>& arenas_;
  Storage& storage_;
  const Team& team_;
  Rails<T>* rails_;
  std::size_t slots_;
  std::vector<std::vector<T>> collected_;  // each slot as all teams have it
};

}  // namespace xc
