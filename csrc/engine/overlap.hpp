#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <vector>

#include "comm/control.hpp"
#include "comm/team.hpp"
#include "engine/arenas.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/rails.hpp"

namespace xc {

// OVERLAP: the reducing leg of a step begins while backward is still running. The layers are cut into BUCKETS
// from the last to the first, in the order in which backward finishes them. A rank arrives at a bucket when
// the gradients of all its workers lie there, by counting up a word of its own in shared memory; when the
// whole team has arrived, the carriers send its partial sums to the owners. A ROUND is that for all buckets,
// one for every step: what did not happen during backward happens in the step, where all gradients are there.
//
// What was sent may change before the step: a second backward, clipping by hand, dropped gradients. Such
// buckets are STALE; the ranks agree in the step on those that are so anywhere, and after the round they
// go through it again. So every rank sends and receives the same transfers, whatever happened on another.
//
// Nothing here blocks but complete(). Between two calls nothing moves but what MPI moves by itself.

struct Bucket {
  std::size_t first;   // layers
  std::size_t last;    // exclusive
  std::int64_t begin;  // flat
  std::int64_t end;
};

// Of about so many elements, the last layers first; none for 0 elements.
std::vector<Bucket> make_buckets(const Plan& plan, std::int64_t elements);

// A rank's line: buckets it has arrived at, counted over all rounds.
struct alignas(kLine) BucketWord {
  std::atomic<std::uint64_t> arrived;
};

template <class T>
class Overlap {
 public:
  // `words_offset` is where each rank's word lies in its control memory.
  Overlap(const Team& team, const Plan& plan, const Arenas<T>& arenas, std::vector<Bucket> buckets,
          std::vector<Run<T>> runs, std::int64_t tile, int tag, std::size_t words_offset,
          typename Rails<T>::Wait wait);
  ~Overlap();
  Overlap(const Overlap&) = delete;
  Overlap& operator=(const Overlap&) = delete;

  // Own worker v's gradient of a layer lies in shared memory. Moves what can be moved.
  void finished(int v, std::size_t layer);
  // That gradient is not what it was when it was finished, if it was.
  void changed(std::size_t layer);
  // Of each bucket, whether this rank knows it to be stale.
  std::span<const std::uint8_t> stale() const { return stale_; }

  // Within a step: ends the round, and sends again what is stale anywhere. `present` are the layers with a
  // gradient; only for those backward is waited for in the next round.
  void complete(std::span<const std::uint8_t> stale, std::span<const std::uint8_t> present);
  // The sum of all workers' gradients, of own segments one after the other.
  T* total() { return total_.data(); }

  // The part of own segments that was added up before the last step came.
  double early_part() const {
    return total_.empty() ? 1.0 : last_early_ / static_cast<double>(total_.size());
  }

 private:
  struct Pending {
    Wire::Transfer transfer;
    int rank;
  };
  // Transfers of one bucket.
  struct Traffic {
    std::vector<Pending> received;
    std::vector<Pending> sent;
  };

  void begin(std::vector<std::size_t> route);
  void begin_round();
  bool all_have(std::size_t bucket) const;
  void arrive();
  void advance();
  void move();
  void receive(std::size_t bucket);
  void send(std::size_t bucket);
  void settle(std::size_t bucket);
  void settle(const Slice& slice);
  bool ended(std::vector<Pending>& pending);
  bool route_ended();
  void follow_route();
  std::vector<int> awaited() const;
  Slice part_of(int segment, std::size_t bucket) const;
  void add_team(const Slice& slice, T* to);
  T* incoming(const Slice& slice, std::size_t other);

  const Topology& topology_;
  Wire& wire_;
  const Plan& plan_;
  const Arenas<T>& arenas_;
  const std::vector<Bucket> buckets_;
  const std::vector<Run<T>> runs_;
  const bool narrow_;
  const int tag_;
  const typename Rails<T>::Wait wait_;
  std::vector<BucketWord*> words_;  // of the team's ranks
  std::vector<int> own_;            // segments
  std::vector<int> for_others_;     // segments carried for other teams' owners
  std::int64_t own_begin_ = 0;
  std::vector<std::size_t> bucket_of_;  // each layer's
  TileBuffers<T> buffers_;

  // The round under way.
  std::uint64_t round_ = 0;
  bool begun_ = false;
  bool in_step_ = false;                // all gradients are there
  std::size_t arrived_ = 0;             // this rank's buckets
  std::vector<std::uint8_t> finished_;  // by own worker and layer
  std::vector<std::uint8_t> expected_;  // layers
  std::vector<std::size_t> missing_;    // of each bucket, gradients that are expected and not finished
  std::vector<std::uint8_t> stale_;
  std::exception_ptr refused_;  // by the wire, during backward

  // Buckets in the order of this pass over them; so many of them are sent and added up.
  std::vector<std::size_t> route_;
  std::size_t sent_ = 0;
  std::size_t settled_ = 0;
  std::vector<Traffic> traffic_;  // of each bucket
  double early_ = 0;              // elements added up before the step
  double last_early_ = 0;

  std::vector<T> incoming_;  // of own segments, one array after the other for each other team
  std::vector<T> outgoing_;
  std::vector<std::int64_t> outgoing_place_;  // of each of for_others_
  std::vector<T> mine_;
  std::vector<T> scratch_;
  std::vector<T> total_;
};

}  // namespace xc
