#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace xc {

// What carries bytes between ranks that do not share memory. Nothing blocks: a transfer is begun, and done()
// says later whether it has ended. Nothing moves unless somebody asks: MPI makes progress only inside its
// calls. Transfers between two ranks with the same tag arrive in the order in which they were begun. What
// cannot be begun fails when it is asked for, like what cannot be ended: with a WireError.
struct WireError : std::runtime_error {
  WireError(const std::string& text, int rank) : std::runtime_error(text), rank(rank) {}
  int rank;  // that the transfer was with
};

class Wire {
 public:
  using Transfer = std::uint64_t;

  virtual ~Wire() = default;
  virtual Transfer send(const void* from, std::size_t bytes, int rank, int tag) = 0;
  virtual Transfer receive(void* to, std::size_t bytes, int rank, int tag) = 0;
  // True once for each transfer; it is forgotten then.
  virtual bool done(Transfer transfer) = 0;
  // Moves what is under way.
  virtual void progress() = 0;
  // True if nothing can be begun any more: the program has ended the library below.
  virtual bool ended() const { return false; }

  // A word to another rank outside of all order, which needs no answer.
  static constexpr std::size_t kNoticeBytes = 576;
  virtual void notify(int rank, const void* bytes) = 0;
  // Whether such a word was waiting, which is copied to `bytes` then.
  virtual bool notice(void* bytes) = 0;
};

// How sums between teams are cut for the wire.
struct RailOptions {
  std::int64_t chunk = 0;  // elements of a segment; 0: as many as suit the buffers
  int window = 2;          // chunks that a leg may be behind the one before it
  bool narrow = false;     // partial sums travel as bfloat16
  // From all to all, or by halves where teams are equal and a power of two; or what takes less time, given
  // seconds for a message to travel and for a rank to begin it, and bytes per second.
  enum class Way { automatic, direct, halving } way = Way::automatic;
  double latency = 20e-6;
  double overhead = 1e-6;
  double bandwidth = 1e9;
  // Of additions: that of the engine's tree, or any that NCCL takes.
  enum class Order { tree, nccl } order = Order::tree;
};

}  // namespace xc
