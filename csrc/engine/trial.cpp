#include "engine/trial.hpp"

#include <algorithm>
#include <cstddef>

namespace xc {
namespace {

constexpr int kTurns = 3;        // of each way
constexpr int kStepsOfTurn = 4;  // the first finds the caches as another way left them, and does not count
constexpr double kGain = 0.97;   // noise alone must not decide

double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

Trial::Trial(int ways, int walks) : turn_(kStepsOfTurn * walks) {
  if (ways > 1) seconds_.resize(static_cast<std::size_t>(ways));
}

int Trial::way() const { return goes_on() ? number_ / turn_ % static_cast<int>(seconds_.size()) : chosen_; }

void Trial::took(double seconds, std::int64_t elements) {
  if (!goes_on() || elements == 0) return;
  if (number_ % turn_ >= turn_ / kStepsOfTurn)
    seconds_[static_cast<std::size_t>(way())].push_back(seconds / static_cast<double>(elements));
  if (++number_ == static_cast<int>(seconds_.size()) * kTurns * turn_) decide();
}

void Trial::decide() {
  double best = kGain * median(seconds_[0]);
  for (std::size_t way = 1; way < seconds_.size(); ++way)
    if (const double time = median(seconds_[way]); time < best) {
      best = time;
      chosen_ = static_cast<int>(way);
    }
  seconds_.clear();
}

}  // namespace xc
