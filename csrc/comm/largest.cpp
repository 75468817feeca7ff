#include "comm/largest.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace xc {
namespace {

constexpr int kMostDirect = 64;  // ranks

// NaN counts as larger than any number, on whichever side it is: all ranks find the same.
double larger(double a, double b) { return std::isnan(a) || a > b ? a : b; }

}  // namespace

LargestOfAll::LargestOfAll(Wire& wire, const Topology& topology, int tag, std::vector<double> numbers)
    : wire_(wire),
      topology_(topology),
      tag_(tag),
      direct_(topology.size() <= kMostDirect),
      state_(std::make_unique<State>()) {
  state_->numbers = std::move(numbers);
  begin_round();
}

LargestOfAll::~LargestOfAll() {
  if (!sending_.empty() || !receiving_.empty()) (void)state_.release();
}

void LargestOfAll::begin_round() {
  const int size = topology_.size();
  state_->sent = state_->numbers;
  state_->received.assign(direct_ ? static_cast<std::size_t>(size - 1) : 1,
                          std::vector<double>(state_->numbers.size()));
  const std::size_t bytes = state_->numbers.size() * sizeof(double);
  for (std::size_t i = 0; i < state_->received.size(); ++i) {
    const int distance = direct_ ? static_cast<int>(i) + 1 : distance_;
    const int to = (topology_.rank() + distance) % size, from = (topology_.rank() + size - distance) % size;
    receiving_.push_back({wire_.receive(state_->received[i].data(), bytes, from, tag_), from});
    sending_.push_back({wire_.send(state_->sent.data(), bytes, to, tag_), to});
  }
}

bool LargestOfAll::round_done() {
  const auto ended = [this](const Pending& one) { return wire_.done(one.transfer); };
  std::erase_if(receiving_, ended);
  std::erase_if(sending_, ended);
  return receiving_.empty() && sending_.empty();
}

bool LargestOfAll::done() {
  while (round_done()) {
    std::vector<double>& numbers = state_->numbers;
    for (const std::vector<double>& theirs : state_->received)
      for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = larger(numbers[i], theirs[i]);
    state_->received.clear();
    distance_ = direct_ ? topology_.size() : 2 * distance_;
    if (distance_ >= topology_.size()) return true;
    begin_round();
  }
  return false;
}

std::vector<int> LargestOfAll::awaited() const {
  std::vector<int> ranks;
  for (const Pending& one : receiving_) ranks.push_back(one.rank);
  for (const Pending& one : sending_)
    if (ranks.empty()) ranks.push_back(one.rank);
  return ranks;
}

}  // namespace xc
