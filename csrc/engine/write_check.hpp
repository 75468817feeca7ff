#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/plan.hpp"

namespace xc {

// Notices most of the writes into published weights for which torch counts no version: those through `.data`
// or through NumPy. After each publish it copies four elements of every layer of every worker of this rank:
// the first, the last, and two whose positions change with each record. Before the next step it compares the
// copies with the weights, bit for bit. A write that changes a fraction f of a layer's elements, at random
// positions, is noticed with a probability of 1 - (1 - f)^4 for that layer and step.
class WriteCheck {
 public:
  // The host's memory that holds each worker's weights, and outlives this object. Objects with different
  // `records` look at different elements.
  WriteCheck(const Plan& plan, std::vector<const std::byte*> weights, std::uint64_t records = 0);

  // Copies anew from the weights of all workers.
  void record();
  // Compares nothing of this worker until the next record.
  void forget(std::size_t worker) { copies_[worker].clear(); }
  // Returns the first layer, of those from `begin` on, of which a copied element has changed.
  std::optional<std::size_t> written(std::size_t worker, std::size_t begin = 0,
                                     std::size_t end = SIZE_MAX) const;

 private:
  static constexpr std::size_t kSamples = 4;
  using Samples = std::array<std::uint64_t, kSamples>;

  Samples samples_of(std::size_t worker, std::size_t layer) const;

  const Plan& plan_;
  std::vector<const std::byte*> weights_;
  std::vector<std::vector<Samples>> copies_;  // per worker and layer; empty after forget()
  std::uint64_t records_;
};

}  // namespace xc
