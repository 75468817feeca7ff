#include "engine/arena.hpp"

#include "rules/rule.hpp"

namespace xc {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kSkews = 16;  // different starts of X and G within a page
constexpr std::size_t kSkew = kPage / kSkews;

std::size_t round_up(std::size_t value, std::size_t grid) { return (value + grid - 1) / grid * grid; }

}  // namespace

ArenaLayout::ArenaLayout(const Plan& plan, int first_worker, int workers, const std::vector<int>& carried,
                         int slots, int sums, std::int64_t tile, std::size_t control_bytes)
    : first_worker_(static_cast<std::size_t>(first_worker)),
      workers_(static_cast<std::size_t>(workers)),
      stride_(round_up(static_cast<std::size_t>(plan.bytes), kPage) + 5 * kPage),
      slot_count_(static_cast<std::size_t>(slots) + 1) {
  const auto element = static_cast<std::size_t>(size_of(plan.master));
  undo_bytes_ = round_up(static_cast<std::size_t>(tile) * element * slot_count_, kLine);
  progress_offset_ = round_up(control_bytes, kLine);
  undo_offset_ = progress_offset_ + workers_ * sizeof(ProgressWord);
  control_bytes_ = undo_offset_ + workers_ * undo_bytes_;
  for (const int k : carried) {
    const Segment& segment = plan.segments[static_cast<std::size_t>(k)];
    const bool own = k >= first_worker && k < first_worker + workers;
    sums_offset_.push_back(round_up(control_bytes_, kLine));
    control_bytes_ = sums_offset_.back() + std::size_t{kSumSets} * static_cast<std::size_t>(sums) *
                                               (cells_of(plan, segment).size() - 1) * sizeof(double);
    shard_offset_.push_back(state_bytes_ + kPage / 2 + 2 * kLine);
    shard_bytes_.push_back(round_up(static_cast<std::size_t>(segment.count()) * element, kPage) + kPage / 4);
    state_bytes_ = round_up(shard_offset_.back() + (own ? slot_count_ : 1) * shard_bytes_.back(), kPage);
  }
}

// Where X or G number `index` of this rank starts; counted over all ranks no two neighbours start alike.
std::size_t ArenaLayout::stream(std::size_t index) const {
  return index * stride_ + (2 * first_worker_ + index) % kSkews * kSkew;
}

std::size_t ArenaLayout::master(std::size_t index, std::size_t slot) const {
  return shard_offset_[index] + slot * shard_bytes_[index];
}

std::size_t ArenaLayout::progress(std::size_t worker) const {
  return progress_offset_ + worker * sizeof(ProgressWord);
}

std::size_t ArenaLayout::undo(std::size_t worker) const { return undo_offset_ + worker * undo_bytes_; }

}  // namespace xc
