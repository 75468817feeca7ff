#include "engine/store_choice.hpp"

#include <algorithm>

namespace xc {
namespace {

constexpr int kTurns = 3;        // of each way
constexpr int kStepsOfTurn = 4;  // the first finds the caches as the other way left them, and does not count
constexpr double kGain = 0.97;   // noise alone must not decide

double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

StoreChoice::StoreChoice(bool usual, bool tries, int walks)
    : chosen_(usual), tries_(tries), turn_(kStepsOfTurn * walks) {}

bool StoreChoice::other() const { return tries_ && number_ / turn_ % 2 == 1; }

bool StoreChoice::streams() const { return chosen_ != other(); }

void StoreChoice::took(double seconds, std::int64_t elements) {
  if (!tries_ || elements == 0) return;
  if (number_ % turn_ >= turn_ / kStepsOfTurn)
    seconds_[other()].push_back(seconds / static_cast<double>(elements));
  if (++number_ == 2 * kTurns * turn_) decide();
}

void StoreChoice::decide() {
  if (median(seconds_[1]) < kGain * median(seconds_[0])) chosen_ = !chosen_;
  tries_ = false;
  for (auto& seconds : seconds_) seconds = {};
}

}  // namespace xc
