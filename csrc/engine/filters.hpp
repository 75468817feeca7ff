#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/passes.hpp"

namespace xc {

// Makes random displacements as long as the filters they displace: n |w| / |n|, where w is the filter's new
// master weights and n the random numbers of all its elements. A filter may reach over tiles and shards, so
// its norms are computed as a whole, from everybody's new weights and from the generator, by everyone who
// displaces a part of it; the lanes of the sums go by flat index, so all find the same bits.
template <class T>
class Filters {
 public:
  // `shards` are all workers' in the order of offsets.
  Filters(std::span<const Shard<T>> shards, std::int64_t tile)
      : shards_(shards), buffer_(std::size_t(tile)) {}

  // Multiplies the random numbers of `count` elements from `first`, of one run. Those of padding become zero.
  void scale(const Run<T>& run, const NoiseKey& key, std::int64_t first, std::int64_t count, T* noise);
  // New weights: what was computed is void.
  void forget() { begin_ = end_ = 0; }

 private:
  void open(std::int64_t begin, std::int64_t end, std::size_t workers);
  // Numbers that are all zero stay so.
  double ratio_to(double noise) const { return noise > 0 ? weights_ / noise : 0.0; }
  double norm_of_weights() const;
  double norm_of_noise(Noise kind, const NoiseKey& key);

  std::span<const Shard<T>> shards_;
  std::vector<T> buffer_;
  // The filter that was looked at last.
  std::int64_t begin_ = 0;
  std::int64_t end_ = 0;
  double weights_ = 0;
  std::vector<double> ratios_;  // per worker; negative: not yet computed
};

}  // namespace xc
