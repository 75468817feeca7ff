#include "device/judge.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace xc {

DeviceJudge::DeviceJudge(Team& team, std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
                         std::shared_ptr<RunTable> runs, const Plan& plan)
    : device_(std::move(device)),
      storage_(std::move(storage)),
      runs_(std::move(runs)),
      plan_(plan),
      place_(static_cast<std::size_t>(team.place())) {
  team.agree<DeviceError>(complaint_of([&] {
    verdict_ = storage_->allocate(sizeof(DeviceVerdict));
    seen_ = device_->staging(sizeof(DeviceVerdict));
  }));
  const auto workers = static_cast<std::size_t>(team.workers_per_rank());
  for (std::size_t p = 0; p < static_cast<std::size_t>(team.size()); ++p)
    firsts_.push_back(static_cast<std::int64_t>(cell_at(plan_.segments[p * workers].begin)));
  firsts_.push_back(static_cast<std::int64_t>(cell_at(plan_.length)));
  std::int64_t most = 1;  // alike on all ranks
  for (std::size_t p = 0; p + 1 < firsts_.size(); ++p) most = std::max(most, firsts_[p + 1] - firsts_[p]);
  squares_ = storage_->share(team, static_cast<std::size_t>(most) * sizeof(double));
  std::vector<std::byte*> pointers;
  for (const auto& mapping : squares_) pointers.push_back(mapping->data());
  team.agree<DeviceError>(complaint_of([&] {
    pointers_ = stored(*storage_, pointers);
    firsts_there_ = stored(*storage_, firsts_);
    storage_->finish();
  }));
}

// Cells begin where segments do.
std::size_t DeviceJudge::cell_at(std::int64_t element) const {
  const auto found = std::lower_bound(plan_.cells.begin(), plan_.cells.end(), element);
  return static_cast<std::size_t>(found - plan_.cells.begin());
}

double* DeviceJudge::squares_from(std::int64_t begin) const {
  return reinterpret_cast<double*>(squares_[place_]->data()) +
         (static_cast<std::int64_t>(cell_at(begin)) - firsts_[place_]);
}

// Layers without a gradient leave no squares.
void DeviceJudge::begin(const Bounds& bounds, std::span<const Run<float>> runs) {
  if (!device_->captures()) runs_->begin_step();
  runs_->upload(runs, bounds);
  storage_->clear(squares_[place_]->data(),
                  static_cast<std::size_t>(firsts_[place_ + 1] - firsts_[place_]) * sizeof(double));
}

void DeviceJudge::judge() {
  runs_->changed();
  device_->judge(
      {{reinterpret_cast<const double* const*>(pointers_.get()),
        reinterpret_cast<const std::int64_t*>(firsts_there_.get()), static_cast<int>(squares_.size())},
       runs_->bounds(),
       reinterpret_cast<DeviceVerdict*>(verdict_.get())});
  storage_->copy(seen_.get(), verdict_.get(), sizeof(DeviceVerdict));
  if (!device_->captures()) storage_->mark();
}

// Nothing marks where a replay ends, so all that is queued is awaited, and the verdict tells of which step it
// is.
Verdict DeviceJudge::verdict() {
  if (runs_->replays())
    runs_->finish_replay();
  else
    storage_->await_mark();
  const auto& seen = *reinterpret_cast<const DeviceVerdict*>(seen_.get());
  if (seen.serial != runs_->serial())
    throw UsageError(
        "prepare_replay() was called, and the captured step not replayed since on the same stream: it is not "
        "counted; replay it before you go on");
  return {seen.norm, seen.skipped != 0};
}

}  // namespace xc
