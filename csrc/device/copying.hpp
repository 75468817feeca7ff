#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/host_device.hpp"
#include "device/bodies.hpp"
#include "engine/storage.hpp"

namespace xc {

// Many copies by one launch: a piece of one of them for a block of kCopyThreads threads, 16 bytes for a
// thread at a time where both ends allow.

inline constexpr int kCopyThreads = 256;
inline constexpr std::int64_t kCopyPiece = std::int64_t{64} << 10;  // bytes

// As many as a launch can be given.
inline constexpr int kCopiesInBatch = 120;
struct CopyBatch {
  Copy at[kCopiesInBatch];
  std::int64_t first_piece[kCopiesInBatch + 1];  // of each, and the number of all
  int count;
};
static_assert(sizeof(CopyBatch) <= 4096);

constexpr std::int64_t pieces_of(std::int64_t bytes) { return (bytes + kCopyPiece - 1) / kCopyPiece; }

// Calls launch(batch) until all copies have been launched.
template <class Fn>
void in_batches(std::span<const Copy> copies, Fn launch) {
  while (!copies.empty()) {
    const std::size_t count = std::min<std::size_t>(copies.size(), kCopiesInBatch);
    CopyBatch batch;
    std::copy_n(copies.begin(), count, batch.at);
    batch.count = static_cast<int>(count);
    batch.first_piece[0] = 0;
    for (std::size_t i = 0; i < count; ++i)
      batch.first_piece[i + 1] = batch.first_piece[i] + pieces_of(copies[i].bytes);
    launch(batch);
    copies = copies.subspan(count);
  }
}

XC_HOST_DEVICE std::int64_t pieces_of(const CopyBatch& batch) { return batch.first_piece[batch.count]; }

// Which copy a piece is of.
XC_HOST_DEVICE int copy_of(const CopyBatch& batch, std::int64_t piece) {
  int low = 0, high = batch.count;  // the first begins with the piece or before it, the last after it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_piece[middle] <= piece ? low : high) = middle;
  }
  return low;
}

template <class V>
XC_HOST_DEVICE void copy_as(const Copy& copy, std::int64_t begin, std::int64_t end, int thread) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(V));
  for (std::int64_t at = begin + thread * kSize; at + kSize <= end; at += kCopyThreads * kSize)
    store(copy.to + at, load<V>(copy.from + at));
}

// The widest loads that both ends of the copy allow, and single bytes for the rest. `low` has the bits of
// both addresses.
XC_HOST_DEVICE void copy_range(const Copy& copy, std::int64_t begin, std::int64_t end, int thread) {
  using Sixteen = Pack<float, kMasterPack>;
  const auto low = reinterpret_cast<std::uintptr_t>(copy.from) | reinterpret_cast<std::uintptr_t>(copy.to);
  const std::int64_t odd = end - end % static_cast<std::int64_t>(sizeof(Sixteen));
  if (low % sizeof(Sixteen) == 0)
    copy_as<Sixteen>(copy, begin, odd, thread);
  else if (low % sizeof(std::uint64_t) == 0)
    copy_as<std::uint64_t>(copy, begin, odd, thread);
  else if (low % sizeof(std::uint32_t) == 0)
    copy_as<std::uint32_t>(copy, begin, odd, thread);
  else if (low % sizeof(std::uint16_t) == 0)
    copy_as<std::uint16_t>(copy, begin, odd, thread);
  else
    copy_as<std::byte>(copy, begin, odd, thread);
  copy_as<std::byte>(copy, odd, end, thread);
}

// One thread's part of a piece.
XC_HOST_DEVICE void copy_piece(const CopyBatch& batch, std::int64_t piece, int thread) {
  const int number = copy_of(batch, piece);
  const Copy& copy = batch.at[number];
  const std::int64_t begin = (piece - batch.first_piece[number]) * kCopyPiece;
  copy_range(copy, begin, begin + kCopyPiece < copy.bytes ? begin + kCopyPiece : copy.bytes, thread);
}

}  // namespace xc
