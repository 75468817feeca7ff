#include "engine/write_check.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace xc {
namespace {

// The finaliser of splitmix64: every bit of the result depends on every bit of `x`.
std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A position below `count`, from the upper bits of a product instead of a division.
std::int64_t position(std::uint64_t random, std::int64_t count) {
  const std::uint64_t upper = random >> 32, wide = static_cast<std::uint64_t>(count);
  if (wide >> 32) return static_cast<std::int64_t>(random % wide);
  return static_cast<std::int64_t>((upper * wide) >> 32);
}

std::uint64_t bits_at(const std::byte* at, std::int64_t size) {
  std::uint64_t bits = 0;
  if (size == 4)
    std::memcpy(&bits, at, 4);
  else if (size == 2)
    std::memcpy(&bits, at, 2);
  else
    std::memcpy(&bits, at, 8);
  return bits;
}

}  // namespace

WriteCheck::WriteCheck(const Plan& plan, std::vector<const std::byte*> weights, std::uint64_t records)
    : plan_(plan), weights_(std::move(weights)), copies_(weights_.size()), records_(records) {}

WriteCheck::Samples WriteCheck::samples_of(std::size_t worker, std::size_t layer) const {
  const Layer& l = plan_.layers[layer];
  if (l.count == 0) return {};
  const std::byte* const at = weights_[worker] + l.byte_begin;
  const std::int64_t size = size_of(l.spec.dtype);
  const std::uint64_t first = mixed((records_ << 32) + 2 * layer), second = mixed(first);
  return {bits_at(at, size), bits_at(at + (l.count - 1) * size, size),
          bits_at(at + position(first, l.count) * size, size),
          bits_at(at + position(second, l.count) * size, size)};
}

void WriteCheck::record() {
  ++records_;
  for (std::size_t w = 0; w < weights_.size(); ++w) {
    copies_[w].resize(plan_.layers.size());
    for (std::size_t i = 0; i < plan_.layers.size(); ++i) copies_[w][i] = samples_of(w, i);
  }
}

std::optional<std::size_t> WriteCheck::written(std::size_t worker, std::size_t begin, std::size_t end) const {
  const std::vector<Samples>& copies = copies_[worker];
  for (std::size_t i = begin; i < std::min(end, copies.size()); ++i)
    if (copies[i] != samples_of(worker, i)) return i;
  return std::nullopt;
}

}  // namespace xc
