#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "comm/team.hpp"
#include "engine/plan.hpp"

namespace xc {

// RAILS carry a step between teams. For every segment, each team's carrier sends its team's partial sum to
// the owner (the REDUCING leg), which adds the partial sums of all teams as a tree, in the order of teams;
// the owner sends back what follows, the new weights, to the carriers (the GATHERING leg). A team so sends
// every element of others' segments once, and of its own once to every other team: with M equal teams and N
// elements 2 (M - 1) / M N in all, however many ranks it has.
//
// Segments are cut into chunks. A chunk is the same slice of every segment, so that all ranks work on every
// chunk, and several are under way at once: while one is summed, others travel. Nothing travels by itself, so
// the rails ask the wire to move between any two slices.

// Tags of transfers, a few for each channel; they are used again after many channels.
enum class Tag { agreement, partial, gathered, numbers, partial_numbers, overlapped };
inline int tag_of(std::int64_t channel, Tag tag) {
  constexpr int kChannels = 4000, kTags = 8;
  return static_cast<int>(channel % kChannels) * kTags + static_cast<int>(tag);
}

// A slice of one segment.
struct Slice {
  int segment;
  std::int64_t begin;  // flat
  std::int64_t end;
  std::int64_t count() const { return end - begin; }
};

template <class T>
class Rails {
 public:
  // What stands around the legs, slice by slice.
  struct Work {
    std::function<void(const Slice&, T* to)> partial;          // the team's sum
    std::function<void(const Slice&, const T* total)> settle;  // of an own segment: all teams' sum is there
    std::function<void(const Slice&)> publish;                 // what was gathered is there
  };
  // Where segment k's array lies that the gathering leg sends or receives; one function for each such array.
  using Array = std::function<T*(int segment)>;
  // Returns when done() is true, for which other ranks are awaited.
  using Wait = std::function<void(const std::function<bool()>& done,
                                  const std::function<std::vector<int>()>& awaited)>;

  // `memory` is where arrays lie that the wire may still write to when something failed.
  Rails(const Team& team, const Plan& plan, std::int64_t channel, Wait wait, Shared memory);
  virtual ~Rails();
  Rails(const Rails&) = delete;
  Rails& operator=(const Rails&) = delete;

  // The reducing leg alone.
  void reduce(const Work& work) { run(work, {}, -1); }
  // Both legs, each chunk's settling between them.
  void reduce_and_gather(const Work& work, const std::vector<Array>& arrays) { run(work, arrays, -1); }
  // The gathering leg alone: from the owners, or from the carriers of one team.
  void gather(const Work& work, const std::vector<Array>& arrays, int from_team = -1) {
    run(work, arrays, from_team);
  }
  // Brings the owners' arrays to every rank, or to one, as one array as long as the plan.
  void collect(const Array& own, std::vector<T>& to, std::optional<int> only_rank = {});
  // Everybody's copy of the arrays of numbers that belong to segments becomes the owner's.
  void share(const std::function<std::span<double>(int segment)>& numbers);
  // The same, the owner's being the tree sum over the teams' first.
  void add_up(const std::function<std::span<double>(int segment)>& numbers);
  // How sums go: by halves, or from all to all; on devices perhaps as NCCL takes them.
  virtual const char* way() const { return halving_ ? "halving" : "direct"; }
  // Whether a transfer may be under way for ever, and with it the use of the arrays that it was given.
  bool broken() const { return broken_; }
  // numbers[i] becomes the largest of all ranks' i-th.
  void largest_of_all(std::vector<double>& numbers);

 protected:
  // Into chunks of about so many elements of the longest segment.
  void cut(std::int64_t wanted, std::int64_t longest);
  Slice slice_of(int segment, std::int64_t chunk) const;
  int source(int segment, int from_team) const;
  std::vector<int> carriers(int segment, int except_team) const;
  const Topology& topology() const { return topology_; }
  const Plan& plan() const { return plan_; }
  const std::vector<int>& carried() const { return carried_; }
  std::int64_t chunk() const { return chunk_; }
  std::int64_t chunks() const { return chunks_; }
  void never_halve() { halving_ = false; }

 private:
  struct Pending {
    Wire::Transfer transfer;
    int rank;
  };
  // A chunk on its way: its transfers, and the buffers of its partial sums.
  struct Flight {
    std::vector<Pending> partials;  // to receive
    std::vector<Pending> gathered;  // to receive
    std::vector<Pending> sent;
    std::vector<T> outgoing;
    std::vector<T> incoming;
  };

  virtual void run(const Work& work, const std::vector<Array>& arrays, int from_team);
  void run_in_chunks(const Work& work, const std::vector<Array>& arrays, int from_team);

  static bool can_halve(const Topology& topology);
  bool should_halve(const RailOptions& options) const;
  void run_by_halves(const Work& work, const std::vector<Array>& arrays);
  void reduce_by_halves(std::int64_t chunk, const std::vector<int>& order, const Work& work);
  void gather_by_doubles(std::int64_t chunk, const std::vector<int>& order, const Array& array);
  void swap(int round, const T* from, T* to, std::int64_t count, bool narrow);
  int partner(int round) const;
  std::vector<int> order_of_halves() const;

  void begin_chunk(std::int64_t chunk, const Work& work, const std::vector<Array>& arrays, int from_team);
  void settle_chunk(std::int64_t chunk, const Work& work, const std::vector<Array>& arrays, int from_team);
  void publish_chunk(std::int64_t chunk, const Work& work, int from_team);
  void receive_partials(const Slice& slice, Flight& flight, std::size_t number);
  void send_partial(const Slice& slice, Flight& flight, std::size_t number, const Work& work);
  void settle(const Slice& slice, Flight& flight, std::size_t number, const Work& work);
  void send(const void* from, std::int64_t bytes, int rank, Tag tag, std::vector<Pending>& sent);
  void receive(void* to, std::int64_t bytes, int rank, Tag tag, std::vector<Pending>& received);
  void finish(std::vector<Pending>& pending);
  void wait(const std::function<bool()>& done, const std::function<std::vector<int>()>& awaited);

  Flight& flight(std::int64_t chunk) { return flights_[static_cast<std::size_t>(chunk) % flights_.size()]; }
  std::int64_t wire_bytes(std::int64_t count) const;

  const Topology& topology_;
  Wire& wire_;
  const Plan& plan_;
  bool narrow_;
  int window_;
  std::int64_t channel_;
  Wait wait_;
  Shared memory_;
  bool broken_ = false;       // a wait has failed
  std::vector<int> own_;      // segments
  std::vector<int> carried_;  // own and others'
  std::int64_t chunk_;
  std::int64_t chunks_;
  std::vector<Flight> flights_;
  std::vector<T> sums_;     // own team's partial sum, the total, and what wide copies of narrow sums take
  std::vector<T> scratch_;  // of the tree
  bool halving_;
  std::vector<T> halves_;  // of all carried segments a chunk, and what a partner sends of it
  std::vector<T> others_;
};

// Deletes what the wire may write to, but not where a transfer failed, for it may still write then.
struct KeepAfterFailure {
  template <class P>
  void operator()(P* at) const {
    if (std::uncaught_exceptions() == 0) delete at;
  }
};

// Numbers as bfloat16 in the first half of their own bytes, and back; double stays double.
void shorten(float* numbers, std::int64_t count);
void lengthen(float* numbers, std::int64_t count);
inline void shorten(double*, std::int64_t) {}
inline void lengthen(double*, std::int64_t) {}

}  // namespace xc
