#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/team.hpp"
#include "engine/plan.hpp"
#include "engine/post.hpp"

namespace xc {

class Device;

// New hyper-parameters from hyper-parameters and sums.
using Revise = std::function<std::vector<double>(std::span<const double>, std::span<const double>)>;

// When statistics of the gradients are taken.
enum class Observe { nothing, before, along };

// One group of layers: its flags are fixed, its hyper-parameters may change every step. A group that
// maximizes takes the negative of every worker's gradient wherever it reads one.
struct GroupSpec {
  unsigned flags = 0;
  std::vector<double> hyper;
  bool maximize = false;
};

// What displaces the weights, beside each group's inner rate.
struct ExtrapolationOptions {
  std::string name;
  bool scaled = true;      // gradients in units of the rule's steps
  bool clipped = true;     // gradients as the step's norm clips them
  std::uint64_t seed = 0;  // of random displacements
};

struct EngineOptions {
  std::string rule;
  ExtrapolationOptions extrapolation;
  std::vector<GroupSpec> groups;
  std::optional<std::int64_t> tile;  // elements; by default what suits, found out in the first steps
  std::optional<bool>
      streaming;  // publish past the cache; by default when a step moves more than the cache holds
  std::int64_t bucket =
      0;                // elements whose partial sums go to other teams during backward; 0: all in the step
  std::string version;  // of the library, part of the signature
};

// Data-parallel training of one set of parameters. Every worker has its own weights X and gradients G; the
// master weights w and the rule's state exist once, cut into shards. A call of step() takes the mean of all
// workers' gradients, applies the rule, and stores each worker's next, displaced weights into its X, in one
// pass over memory.
//
// All members marked collective must be called by every rank of the team in the same order. Reading the
// master weights is not collective: they are stable while this rank is outside a collective call.
class Engine {
 public:
  virtual ~Engine() = default;

  // Collective. Throws the same MismatchError on every rank when layers or options differ.
  // Everything lies in the device's memory and runs there; without one, in the host's.
  static std::unique_ptr<Engine> create(std::shared_ptr<Team> team, std::span<const LayerSpec> layers,
                                        const EngineOptions& options,
                                        std::shared_ptr<Device> device = nullptr);

  virtual const Plan& plan() const = 0;
  virtual Team& team() const = 0;
  virtual Device* device() const = 0;  // null: the host

  // Memory of this rank's worker v, kept alive by whoever holds it.
  virtual std::shared_ptr<std::byte> weights(int v) const = 0;
  virtual std::shared_ptr<std::byte> gradients(int v) const = 0;

  // Where a layer's gradient lies: its elements, laid out as the layer's strides say. kAbsent bytes stand for
  // no gradient.
  struct Source {
    const std::byte* address;
    std::int64_t bytes;
  };
  static constexpr std::int64_t kAbsent = -1;
  // Copies gradients from elsewhere into worker v's G, one source per layer. A gradient that lies in its
  // place in G already stays; no source may overlap another place in G. Marks in `present` which layers have
  // a gradient. Throws UsageError, before it copies anything, if a source has another number of bytes than
  // its layer.
  virtual void gather(int v, std::span<const Source> sources, std::span<std::uint8_t> present) = 0;

  // Says that somebody else has written a gradient into G.
  virtual void touch(int v, std::size_t layer) = 0;

  // With EngineOptions::bucket, while backward is running: worker v's gradient of a layer lies in G, and its
  // sum may go to other teams. Nothing blocks. If it is written or dropped after that and before the step,
  // changed() must say so.
  virtual void finished(int v, std::size_t layer) = 0;
  virtual void changed(int v, std::size_t layer) = 0;
  // The part of this rank's segments whose sums were complete when the last step began.
  virtual double early_part() const = 0;

  // Collective. Takes the root worker's X as the master weights and publishes them to all; the rule's state
  // stays.
  virtual void adopt(int root_worker) = 0;

  // One layer of a checkpoint: arrays of the master type in the order of memory, of w and of the rule's
  // slots. A null array stands for zeros, null weights for those that are there. Negative updates leave slots
  // and updates as they are.
  struct Saved {
    const void* weights;
    std::vector<const void*> slots;
    std::int64_t updates;
  };
  // Collective. Takes weights and state from a checkpoint that every rank has, and publishes the weights to
  // all. Ranks whose `hash` of it differs make all throw MismatchError.
  virtual void load(std::span<const Saved> layers, std::uint64_t hash) = 0;

  // How many numbers Step::hyper has.
  virtual std::size_t hyper_count() const = 0;

  struct Step {
    // Per group, the rule's hyper-parameters and then the inner learning rate.
    std::span<const double> hyper;
    // Per worker of this rank and layer, whether there is a gradient. A layer without one on all workers is
    // left alone; without one on some, theirs count as zeros.
    std::span<const std::uint8_t> present;
    // Unfused steps, which only benchmarks take, have neither clipping nor skipping.
    bool fused = true;
    // Every gradient counts for this part of itself: micro-batches that were added up, times a loss scale.
    double divisor = 1;
    // The mean gradient is scaled down to this norm if it is longer, and so is what displaces the weights; 0:
    // as long as it is.
    double max_norm = 0;
    // With a mean gradient that is not finite the step changes nothing on any rank.
    bool skip_nonfinite = false;
    // Whether statistics of the gradients are taken: in a pass before the one that applies them, or along in
    // that pass.
    Observe observe = Observe::nothing;
    // With Observe::before, gets the hyper-parameters that all ranks agreed on and the statistics: for each
    // group two sums of squares, the mean gradient's and that of all workers' gradients together. Returns the
    // hyper-parameters that the step shall take.
    Revise revise = {};
    // What `revise` goes by beside them, which must be alike on all ranks: how many micro-batches each
    // gradient is of, the scale (0: not set) and the progress of AdaScale, and how inner rates follow.
    std::array<double, 4> gain = {};
    // Of an averaging: how many local steps it ends.
    std::int64_t local_steps = 0;
    // Gets the same for a rule that revises, with the sum that each group's layers measured, and zero.
    Revise revise_rule = {};
    bool wants_norm() const { return max_norm > 0 || skip_nonfinite; }
  };
  struct Outcome {
    std::optional<double> norm = {};  // of the mean gradient, unclipped, if the step wanted it
    bool skipped = false;
    std::vector<double> statistics = {};  // if the step observed them, as `revise` gets them
  };
  // Collective. A device may decide by the norm itself; what it has decided is in outcome() only.
  virtual Outcome step(const Step& step) = 0;
  // Of the last step; waits for a device that has decided.
  virtual Outcome outcome() = 0;
  // With a device: a step that was taken while the device captured is repeated whenever the capture is
  // replayed. Before each replay this gives it the numbers of the next step, whose gradients are of the same
  // layers, and counts that step.
  virtual void prepare_replay(const Step& step) = 0;
  // With every step from now on the ranks compare this digest; if it differs all throw MismatchError.
  virtual void declare(Declared what, std::uint64_t digest) = 0;
  // Collective: this rank's part of a step whose arguments are wrong; all ranks throw `complaint`.
  virtual void complain(const std::string& complaint) = 0;

  // Collective. From here on every worker takes local steps, from the master weights and the state as they
  // are, until load() ends that. Between averagings X is a worker's own weights; the master weights and the
  // state are those of the last averaging.
  virtual void begin_local() = 0;
  // Not collective: every worker of this rank applies the rule to its own gradient, weights and state.
  virtual void local_step(const Step& step) = 0;
  // Collective: a local step, then the mean of all workers' weights goes to all.
  virtual void averaging_step(const Step& step) = 0;
  // Collective: the same without a step.
  virtual void average() = 0;
  // Since the last averaging; none outside the local phase.
  virtual std::optional<std::int64_t> local_steps() const = 0;

  // Between show_master and hide_master worker v's X holds w itself; hide_master restores it bit for bit.
  virtual void show_master(int v) = 0;
  virtual void hide_master(int v) = 0;
  // Forgets what hide_master would restore: what X holds now stays.
  virtual void keep_master(int v) = 0;
  // From now on copies some elements of X after each publish, so that written() can tell whether somebody
  // else has changed one since; never on a device.
  virtual void watch_writes() = 0;
  // Returns the first layer of worker v's X that was seen to be written by somebody else, also since it shows
  // the master weights. Returns none while X is to be adopted.
  virtual std::optional<std::size_t> written(int v, std::size_t begin = 0,
                                             std::size_t end = SIZE_MAX) const = 0;
  // Returns true if X of this layer may differ from w in the parameter's type on some worker of this rank.
  virtual bool displaced(std::size_t layer) const = 0;
  // Collective, with several teams: brings the other teams' part of the state to all ranks, or to one, for
  // read() to find until it is forgotten. With one team nothing is missing and nothing is done.
  virtual void collect_state(std::optional<int> only_rank) = 0;
  virtual void forget_collected() = 0;
  // Copies a layer's elements from, ..., to - 1 into `out`, an array of the master type: of w (slot 0) or of
  // the rule's slots (1, 2, 3).
  virtual void read(std::size_t layer, int slot, std::int64_t from, std::int64_t to, void* out) const = 0;
  virtual int slots() const = 0;
  // The part of a layer that this rank updates, in elements from the layer's first.
  virtual std::pair<std::int64_t, std::int64_t> owned(std::size_t layer) const = 0;
  // These wait for the last outcome.
  virtual std::int64_t updates(std::size_t layer) = 0;
  virtual bool begun(std::size_t layer) = 0;  // whether a step has put something into its slots
  virtual std::int64_t most_updates() = 0;    // of any layer

  // How sums travel between teams: "direct", "halving" or "nccl"; "none" with one team.
  virtual const char* way() const = 0;
  virtual std::int64_t steps() const = 0;
  virtual double last_step_seconds() const = 0;
  // True if steps publish past the cache; nothing as long as both ways are tried.
  virtual std::optional<bool> streaming() const = 0;
  // Elements that go through all stages together; nothing as long as several lengths are tried.
  virtual std::optional<std::int64_t> tile() const = 0;
  // Leaves w in every X of this rank and ends its part in the engine. Not collective, idempotent.
  virtual void close() = 0;
};

}  // namespace xc
