#include "engine/ways.hpp"

#include <algorithm>
#include <cstddef>

#include "core/environment.hpp"
#include "core/streaming.hpp"

namespace xc {
namespace {

constexpr std::int64_t kWorthTrying = std::int64_t{4} << 20;  // bytes

// The streams of a tile of few workers stay in the nearest cache; those of many leave it in any case, and
// lose less with longer runs of each.
std::vector<std::int64_t> usual_lengths(int workers) {
  constexpr int kMany = 8;
  return workers < kMany ? std::vector<std::int64_t>{512, 1024, 2048}
                         : std::vector<std::int64_t>{1024, 512, 2048};
}

// No tile is longer than the longest shard, and none is tried twice.
std::vector<std::int64_t> useful(const Plan& plan, std::vector<std::int64_t> lengths) {
  std::int64_t longest = 1;
  for (const Segment& segment : plan.segments) longest = std::max(longest, segment.count());
  std::vector<std::int64_t> tiles;
  for (const std::int64_t length : lengths)
    if (const std::int64_t tile = std::min(length, longest);
        std::find(tiles.begin(), tiles.end(), tile) == tiles.end())
      tiles.push_back(tile);
  return tiles;
}

}  // namespace

std::int64_t Ways::longest() const { return *std::max_element(tiles.begin(), tiles.end()); }

Ways make_ways(const Plan& plan, const EngineOptions& options, std::int64_t bytes, int workers, int walks,
               bool may_try) {
  const bool tries = may_try && bytes >= kWorthTrying;
  std::vector<std::int64_t> lengths = usual_lengths(workers);
  if (options.tile || !tries) lengths = {options.tile.value_or(lengths.front())};
  const std::vector<std::int64_t> tiles = useful(plan, lengths);
  return {.streams = options.streaming.value_or(exceeds_cache(bytes)),
          .stores = Trial(tries && !options.streaming && !store_is_fixed() ? 2 : 1, walks),
          .tiles = tiles,
          .lengths = Trial(static_cast<int>(tiles.size()), walks)};
}

std::optional<std::int64_t> asked_tile() { return number_in_environment("XC_TILE"); }

}  // namespace xc
