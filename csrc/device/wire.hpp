#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace xc {

// What goes between teams, on device memory. Nobody waits on the host: what a wire is given queues up on a
// stream of the wire's own, so that it runs beside what the caller has on the stream in use. Where one needs
// the other, the wire's stream is forked from the caller's, or joined to it. So a failure cannot be told
// where it happens; check() tells of it later.
struct Transfer {
  int rank;  // the other side
  std::byte* at;
  std::int64_t bytes;
};

class DeviceWire {
 public:
  virtual ~DeviceWire() = default;
  // What the wire is given from now on comes after all that is on the stream in use.
  virtual void fork() = 0;
  // What is queued on the stream in use from now on comes after all that the wire was given.
  virtual void join() = 0;
  // Queues one group of transfers: all ranks' groups correspond, in the same order. Returns without waiting
  // for them.
  virtual void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) = 0;
  // Throws CommError, with the wire's own words, if a transfer is known to have failed.
  virtual void check() = 0;
  // Ends what is under way; everything later throws. Idempotent.
  virtual void abort(const std::string& reason) = 0;
};

// A wire that can take sums as well, in an order of its own, among the ranks of a rail. Every rank brings a
// block of so many elements for each rank, one after the other in the order of teams.
class CollectiveWire : public DeviceWire {
 public:
  // A rank's own block becomes the sum of all ranks' blocks for it; what becomes of the others is open.
  virtual void reduce_scatter(float* blocks, std::int64_t elements) = 0;
  // Every block becomes that of its rank.
  virtual void all_gather(float* blocks, std::int64_t elements) = 0;
};

}  // namespace xc
