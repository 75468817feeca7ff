#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "comm/team.hpp"
#include "engine/plan.hpp"

namespace xc {

// Where a rank's memory holds what. There are three mappings, each with the parts of all workers that the
// rank drives: the VIEWS mapping (weights X and gradients G, which live as long as any tensor that looks at
// them), the STATE mapping (master weights W, rule slots S) and the CONTROL mapping (control words and posts,
// sums for norms, the undo area with its progress words). With a device the first two are its memory; the
// third is always the host's. With several teams the master weights of segments that it only carries for
// another team's workers lie there, too, and the sums of their cells.
//
// Each X and G starts a little further than a multiple of the page size, so that the many streams of one tile
// do not all fall into the same sets of the cache.

// Passes that sum take two sets of arrays in turn: a fast rank writes the next one while a slow one still
// reads the last. A set begins with the statistics of the gradients, then come those that a rule measures.
inline constexpr int kSumSets = 2;
inline constexpr int kStatistics = 2;

class ArenaLayout {
 public:
  // Of a rank that drives `workers` workers from `first_worker` on and carries these segments; `slots` arrays
  // of state, `sums` per set.
  ArenaLayout(const Plan& plan, int first_worker, int workers, const std::vector<int>& carried, int slots,
              int sums, std::int64_t tile, std::size_t control_bytes);

  std::size_t views_bytes() const { return 2 * workers_ * stride_; }
  std::size_t weights(std::size_t worker) const { return stream(2 * worker); }
  std::size_t gradients(std::size_t worker) const { return stream(2 * worker + 1); }

  std::size_t control_bytes() const { return control_bytes_; }
  std::size_t state_bytes() const { return state_bytes_; }
  // Of the carried segment number `index`. Slot 0 is W itself, slots 1.. are the rule's, of own segments
  // only.
  std::size_t master(std::size_t index, std::size_t slot) const;
  std::size_t sums(std::size_t index) const { return sums_offset_[index]; }
  std::size_t progress(std::size_t worker) const;
  std::size_t undo(std::size_t worker) const;

 private:
  std::size_t stream(std::size_t index) const;

  std::size_t first_worker_;
  std::size_t workers_;
  std::size_t stride_;
  std::size_t slot_count_;
  std::size_t undo_bytes_;
  std::size_t progress_offset_;
  std::size_t undo_offset_;
  std::size_t control_bytes_ = 0;
  std::size_t state_bytes_ = 0;
  std::vector<std::size_t> sums_offset_;
  std::vector<std::size_t> shard_offset_;
  std::vector<std::size_t> shard_bytes_;
};

}  // namespace xc
