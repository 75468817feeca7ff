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

XC_HOST_DEVICE bool is_even(const void* at, std::size_t size) {
  return reinterpret_cast<std::uintptr_t>(at) % size == 0;
}

// One thread's part of a piece.
XC_HOST_DEVICE void copy_piece(const CopyBatch& batch, std::int64_t piece, int thread) {
  using Sixteen = Pack<float, kMasterPack>;
  const int number = copy_of(batch, piece);
  const Copy& copy = batch.at[number];
  const std::int64_t begin = (piece - batch.first_piece[number]) * kCopyPiece;
  const std::int64_t end = begin + kCopyPiece < copy.bytes ? begin + kCopyPiece : copy.bytes;
  std::int64_t odd = begin;  // from here on byte by byte
  if (is_even(copy.from, sizeof(Sixteen)) && is_even(copy.to, sizeof(Sixteen))) {
    copy_as<Sixteen>(copy, begin, end, thread);
    odd = end - (end - begin) % static_cast<std::int64_t>(sizeof(Sixteen));
  }
  copy_as<std::byte>(copy, odd, end, thread);
}

}  // namespace xc
