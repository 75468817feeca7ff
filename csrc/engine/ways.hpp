#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/engine.hpp"
#include "engine/plan.hpp"
#include "engine/trial.hpp"

namespace xc {

// The ways in which steps walk: whether they store the weights past the cache and, with what was found best,
// how long their tiles are. Steps that consist of loops of their own have no tiles, and never try them.
struct Ways {
  bool streams;                     // as usual
  Trial stores;                     // as usual, the other way
  std::vector<std::int64_t> tiles;  // the usual length first
  Trial lengths;

  bool streaming() const { return streams != (stores.way() == 1); }
  std::int64_t tile() const { return tiles[static_cast<std::size_t>(lengths.way())]; }
  std::int64_t longest() const;
};

// Returns the usual ways of steps that touch so many bytes of so many workers, and those to try, if they may,
// in their first steps of so many walks each. Options and the environment may fix it.
Ways make_ways(const Plan& plan, const EngineOptions& options, std::int64_t bytes, int workers, int walks,
               bool may_try);

// Returns the length of tiles that XC_TILE fixes. Throws UsageError if it is no number.
std::optional<std::int64_t> asked_tile();

}  // namespace xc
