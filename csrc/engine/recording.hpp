#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "engine/runs.hpp"

namespace xc {

// What the last step on a device looked like, and whether one like it was captured. A captured step cannot
// take other kernels when it is replayed, nor other elements, and finds all its tables in the device's
// memory; so a step like it comes before it, and what it refers to is replaced by a step unlike it.
class Recording {
 public:
  // How a step looks: its runs, and whether a judge decides.
  struct Look {
    Outline runs;
    bool judged;
    bool operator==(const Look&) const = default;
  };

  void took(Look look) {
    if (look == last_) return;
    layers_.clear();
    last_ = std::move(look);
  }

  void require_like_last(const Look& look) {
    if (look != last_)
      throw UsageError(
          "a step can be captured after one that had gradients of the same layers: take such a step first");
    layers_.clear();
  }
  void captured(std::vector<std::uint8_t> layers) { layers_ = std::move(layers); }

  // The layers that the captured step updates.
  const std::vector<std::uint8_t>& layers() const {
    if (layers_.empty())
      throw UsageError("no step was captured, or a step with gradients of other layers was taken since");
    return layers_;
  }
  void require_replayable(const Look& look) const {
    if (look != last_)
      throw UsageError(
          "what changed since the step was captured takes other kernels: take a step, and capture the next");
  }

 private:
  Look last_{};
  std::vector<std::uint8_t> layers_;
};

}  // namespace xc
