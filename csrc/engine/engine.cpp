#include "engine/engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>

#include "core/error.hpp"
#include "core/float_environment.hpp"
#include "device/collective_rails.hpp"
#include "device/device.hpp"
#include "device/judge.hpp"
#include "device/run_table.hpp"
#include "device/staged_wire.hpp"
#include "device/tree_rails.hpp"
#include "device/walker.hpp"
#include "engine/arenas.hpp"
#include "engine/exchange.hpp"
#include "engine/local.hpp"
#include "engine/overlap.hpp"
#include "engine/rails.hpp"
#include "engine/recording.hpp"
#include "engine/runs.hpp"
#include "engine/signature.hpp"
#include "engine/state.hpp"
#include "engine/step.hpp"
#include "engine/ways.hpp"
#include "engine/write_check.hpp"

namespace xc {
namespace {

// Bytes that one step of all workers touches.
std::int64_t touched_bytes(const Plan& plan, int slots, int workers) {
  return 2 * workers * plan.bytes + (1 + slots) * plan.length * size_of(plan.master);
}

using Agreed = Exchange::Agreed;

constexpr const char* kNeedsNccl =
    "WireOptions(order=\"nccl\") takes NCCL between the ranks: each on a GPU of its own, and XC_GPU_WIRE not "
    "mpi; leave out `order` otherwise";

// The engine for one master type.
template <class T>
class EngineOf final : public Engine {
 public:
  EngineOf(std::shared_ptr<Team> team, Plan plan, const EngineOptions& options,
           std::shared_ptr<Device> device)
      : device_(std::move(device)),
        storage_(device_ ? device_->storage(*team) : std::make_shared<HostStorage>()),
        plan_(std::move(plan)),
        runs_(plan_, options, team->worker_count()),
        own_runs_(plan_, options, 1),
        names_(names_of_step_numbers(families()[static_cast<std::size_t>(family_index(options.rule))],
                                     options.groups.size())),
        ways_(make_ways(plan_, options,
                        touched_bytes(plan_, runs_.slots(), team->size() * team->workers_per_rank()),
                        team->worker_count(), team->workers_per_rank(), !device_ && !team->wire())),
        buckets_(make_buckets(plan_, team->wire() ? options.bucket : 0)),
        arenas_(
            *team, [&](std::size_t bytes) { return storage_->share(*team, bytes); }, plan_, runs_.slots(),
            runs_.sums(), ways_.longest(), overlap_words() + sizeof(BucketWord)),
        exchange_(team, arenas_.control(), names_, plan_.layers.size() + buckets_.size()),
        rails_(make_rails()),
        overlap_(make_overlap()),
        state_(plan_, arenas_, *storage_, *team, rails_.get(), runs_.slots()),
        hands_(make_hands()),
        stepper_(plan_, arenas_, *storage_, runs_, *hands_.walker, *hands_.mover, hands_.judge.get(),
                 rails_.get(), overlap_.get(), ways_.tiles.front(), ways_.streams),
        ages_(plan_.layers.size()),
        displaced_(plan_.layers.size(), 0),
        cleared_(plan_.layers.size() * static_cast<std::size_t>(team->workers_per_rank()), 1) {}

  const Plan& plan() const override { return plan_; }
  Team& team() const override { return exchange_.team(); }
  Device* device() const override { return device_.get(); }
  std::shared_ptr<std::byte> weights(int v) const override { return arenas_.weights(v); }
  std::shared_ptr<std::byte> gradients(int v) const override { return arenas_.gradients(v); }
  std::size_t hyper_count() const override { return names_.size() - numbers_of({}).size(); }
  int slots() const override { return runs_.slots(); }
  std::int64_t updates(std::size_t layer) override {
    settle();
    return ages_[layer].updates;
  }
  bool begun(std::size_t layer) override {
    settle();
    return ages_[layer].begun;
  }
  std::int64_t most_updates() override {
    settle();
    std::int64_t most = 0;
    for (const Age& age : ages_) most = std::max(most, age.updates);
    return most;
  }
  const char* way() const override { return rails_ ? rails_->way() : "none"; }
  std::int64_t steps() const override { return steps_; }
  double last_step_seconds() const override { return last_step_.count(); }
  std::optional<bool> streaming() const override {
    return ways_.stores.goes_on() ? std::nullopt : std::optional(ways_.streaming());
  }
  std::optional<std::int64_t> tile() const override {
    return ways_.lengths.goes_on() ? std::nullopt : std::optional(ways_.tile());
  }

  void gather(int v, std::span<const Source> sources, std::span<std::uint8_t> present) override;
  void touch(int v, std::size_t layer) override {
    cleared_[static_cast<std::size_t>(v) * plan_.layers.size() + layer] = 0;
  }
  void finished(int v, std::size_t layer) override;
  void changed(int v, std::size_t layer) override;
  double early_part() const override { return overlap_ ? overlap_->early_part() : 0.0; }
  void adopt(int root_worker) override;
  void load(std::span<const Saved> layers, std::uint64_t hash) override;
  Outcome step(const Step& step) override;
  Outcome outcome() override {
    settle();
    return outcome_;
  }
  void prepare_replay(const Step& step) override;
  void declare(Declared what, std::uint64_t digest) override {
    declared_[static_cast<std::size_t>(what)] = digest;
  }
  void complain(const std::string& complaint) override;
  void begin_local() override;
  void local_step(const Step& step) override;
  void averaging_step(const Step& step) override;
  void average() override;
  std::optional<std::int64_t> local_steps() const override {
    return local_ ? std::optional(local_->steps()) : std::nullopt;
  }
  void show_master(int v) override;
  void hide_master(int v) override;
  void keep_master(int v) override {
    hidden_.erase(v);
    if (write_check_) write_check_->forget(static_cast<std::size_t>(v));
  }
  void watch_writes() override;
  std::optional<std::size_t> written(int v, std::size_t begin, std::size_t end) const override {
    if (!write_check_ || closed_ || exchange_.unsettled()) return std::nullopt;
    if (const auto shown = hidden_.find(v); shown != hidden_.end())
      return shown->second.check ? shown->second.check->written(0, begin, end) : std::nullopt;
    return write_check_->written(static_cast<std::size_t>(v), begin, end);
  }
  bool displaced(std::size_t layer) const override {
    return local_ ? local_->touched().at(layer) : displaced_.at(layer);
  }
  void collect_state(std::optional<int> only_rank) override;
  void forget_collected() override { state_.forget_collected(); }
  void read(std::size_t layer, int slot, std::int64_t from, std::int64_t to, void* out) const override {
    require_settled();
    state_.read(layer, slot, from, to, out);
  }
  std::pair<std::int64_t, std::int64_t> owned(std::size_t layer) const override {
    return state_.owned(layer);
  }
  void close() override;

 private:
  void clear_absent(std::span<const std::uint8_t> present);
  std::vector<std::uint8_t> present_here(std::span<const std::uint8_t> present) const;
  std::size_t overlap_words() const;
  std::unique_ptr<Overlap<T>> make_overlap();
  // The layers that a step updates, and for each group whether it begins their state.
  struct Counted {
    std::vector<std::uint8_t> present;
    std::vector<std::uint8_t> begins;
  };
  // Who carries out passes; the mover's are apart from steps.
  struct Hands {
    std::unique_ptr<Judge<T>> judge;  // null: the host decides
    std::unique_ptr<Walker<T>> walker;
    std::unique_ptr<Walker<T>> mover;
  };
  Hands make_hands();
  Hands hands_of_host();
  std::unique_ptr<Rails<T>> make_rails();
  // This rank's declaration of one thing, and nothing of the others.
  Declarations only(Declared what) const {
    Declarations one{};
    one[static_cast<std::size_t>(what)] = digest_in(declared_, what);
    return one;
  }
  void collective(const Exchange::Call& call, const std::function<void(const Agreed&)>& work);
  void capture(const Step& step);
  Recording::Look look_of(const std::vector<Run<T>>& runs, const Step& step) const;
  void conclude(const Step& step, std::span<const std::uint8_t> present);
  bool has_state(const Saved& layer) const;
  void settle();
  void require_settled() const;
  Outcome run(const Step& step, const LayerMarks& marks);
  LocalPhase<T>& local();
  void finish_round(std::span<const std::uint8_t> touched);
  void published();
  void published_undisplaced();
  void note_displacements(const std::vector<Run<T>>& runs, bool may_be_skipped);

  std::shared_ptr<Device> device_;
  std::shared_ptr<Storage> storage_;
  Plan plan_;
  RunMaker<T> runs_;
  RunMaker<T> own_runs_;  // of one worker alone
  std::vector<std::string> names_;
  Ways ways_;
  std::vector<Bucket> buckets_;  // if sums travel during backward
  Arenas<T> arenas_;
  Exchange exchange_;
  std::unique_ptr<Rails<T>> rails_;      // with several teams
  std::unique_ptr<Overlap<T>> overlap_;  // with buckets
  State<T> state_;
  Hands hands_;
  Stepper<T> stepper_;
  std::optional<LocalPhase<T>> local_;
  std::vector<Age> ages_;                // per layer
  std::vector<std::uint8_t> displaced_;  // per layer: outside the local phase, X may differ from w
  std::optional<WriteCheck> write_check_;
  Declarations declared_{};
  Outcome outcome_;                   // of the last step,
  std::optional<Counted> undecided_;  // unless it updated these layers or was skipped, and nobody asked
  Recording recording_;
  std::vector<std::uint8_t> cleared_;  // per own worker and layer: its gradient is known to be zeros
  struct Hidden {
    std::shared_ptr<std::byte> weights;
    std::optional<WriteCheck> check;  // of the master weights that are shown in their place
  };
  std::map<int, Hidden> hidden_;  // X of workers that show the master weights
  std::uint64_t shows_ = 0;
  std::int64_t steps_ = 0;
  std::chrono::duration<double> last_step_{0};
  bool closed_ = false;
};

void require_bytes_of(const Layer& layer, std::int64_t bytes) {
  const std::int64_t wanted = layer.count * size_of(layer.spec.dtype);
  if (bytes == Engine::kAbsent || bytes == wanted) return;
  throw UsageError("the gradient of parameter '" + layer.spec.name + "' has " + std::to_string(bytes) +
                   " bytes, and the parameter has " + std::to_string(wanted));
}

template <class T>
void EngineOf<T>::gather(int v, std::span<const Source> sources, std::span<std::uint8_t> present) {
  for (std::size_t i = 0; i < plan_.layers.size(); ++i) require_bytes_of(plan_.layers[i], sources[i].bytes);
  std::byte* const mine = gradients(v).get();
  std::vector<Copy> copies;
  for (std::size_t i = 0; i < plan_.layers.size(); ++i) {
    const auto [from, bytes] = sources[i];
    std::byte* const to = mine + plan_.layers[i].byte_begin;
    present[i] = bytes != kAbsent;
    if (bytes == kAbsent) continue;
    touch(v, i);
    if (from == to || bytes == 0) continue;
    copies.push_back({from, to, bytes});
    changed(v, i);
  }
  storage_->copy_all(copies);
}

template <class T>
typename EngineOf<T>::Hands EngineOf<T>::hands_of_host() {
  const int workers = team().worker_count();
  return {nullptr, std::make_unique<TileWalker<T>>(ways_.longest(), workers, &ways_),
          std::make_unique<TileWalker<T>>(ways_.tiles.front(), workers, nullptr)};
}

// Sums that come over the wire are the host's to decide by.
template <>
EngineOf<float>::Hands EngineOf<float>::make_hands() {
  if (!device_) return hands_of_host();
  const auto runs = std::make_shared<RunTable>(device_, storage_);
  auto judge = rails_ ? nullptr : std::make_unique<DeviceJudge>(team(), device_, storage_, runs, plan_);
  auto walker = std::make_unique<DeviceWalker>(device_, storage_, plan_, runs, judge.get());
  return {std::move(judge), std::move(walker), std::make_unique<DeviceWalker>(device_, storage_, plan_)};
}

template <>
EngineOf<double>::Hands EngineOf<double>::make_hands() {
  return hands_of_host();
}

template <>
std::unique_ptr<Rails<float>> EngineOf<float>::make_rails() {
  if (!device_ || !team().wire()) return rails_for<float>(exchange_, plan_, arenas_.memory());
  const auto wait = [this](const auto& done, const auto& awaited) { exchange_.wait_for_wire(done, awaited); };
  const DeviceRails::Site site{team(), plan_, exchange_.channel(), wait, arenas_.memory(), storage_};
  auto wire = device_->wire(team());
  if (team().rails().order == RailOptions::Order::nccl) {
    if (!wire) throw UsageError(kNeedsNccl);
    return std::make_unique<CollectiveRails>(site, std::move(wire));
  }
  if (wire) return std::make_unique<TreeRails>(site, device_, std::move(wire));
  return std::make_unique<TreeRails>(
      site, device_, std::make_unique<StagedWire>(team(), storage_, exchange_.channel(), wait));
}

template <>
std::unique_ptr<Rails<double>> EngineOf<double>::make_rails() {
  return rails_for<double>(exchange_, plan_, arenas_.memory());
}

// What this rank has queued before the call comes before what others do in it, and the other way round after.
template <class T>
void EngineOf<T>::collective(const Exchange::Call& call, const std::function<void(const Agreed&)>& work) {
  storage_->announce();
  exchange_.collective(call, [&](const Agreed& agreed) {
    storage_->follow();
    work(agreed);
    storage_->announce();
  });
  storage_->follow();
}

// Each rank's word lies behind its posts.
template <class T>
std::size_t EngineOf<T>::overlap_words() const {
  const std::size_t posts = Exchange::control_bytes(names_.size(), plan_.layers.size() + buckets_.size());
  return (posts + kLine - 1) / kLine * kLine;
}

template <class T>
std::unique_ptr<Overlap<T>> EngineOf<T>::make_overlap() {
  if (buckets_.empty()) return nullptr;
  return std::make_unique<Overlap<T>>(
      team(), plan_, arenas_, buckets_, runs_.plain(), ways_.tiles.front(),
      tag_of(exchange_.channel(), Tag::overlapped), overlap_words(),
      [this](const auto& done, const auto& awaited) { exchange_.wait_for_wire(done, awaited); });
}

template <class T>
void EngineOf<T>::finished(int v, std::size_t layer) {
  touch(v, layer);
  if (overlap_ && !closed_) overlap_->finished(v, layer);
}

template <class T>
void EngineOf<T>::changed(int, std::size_t layer) {
  if (overlap_) overlap_->changed(layer);
}

template <class T>
void EngineOf<T>::adopt(int root_worker) {
  collective({Operation::adopt, steps_, std::uint64_t(root_worker), {}, {}, only(Declared::kept_writes)},
             [&](const Agreed&) {
               const auto runs = runs_.plain();
               const Topology& topology = team().topology();
               const int from = topology.team_of(topology.owner(root_worker));
               if (from == topology.team()) stepper_.load({{arenas_.target_of(root_worker)}, {}, {}}, runs);
               stepper_.spread_from(from);
               stepper_.publish(runs);
             });
  stepper_.forget();
  if (local_) local_->begin_round();
  hidden_.clear();
  published_undisplaced();
}

template <class T>
void EngineOf<T>::load(std::span<const Saved> layers, std::uint64_t hash) {
  collective({Operation::load, steps_, hash, {}, {}, only(Declared::assigned_state)}, [&](const Agreed&) {
    settle();
    for (std::size_t i = 0; i < layers.size(); ++i) {
      if (layers[i].weights) state_.write(i, 0, layers[i].weights);
      for (std::size_t s = 0; s < layers[i].slots.size(); ++s)
        state_.write(i, static_cast<int>(s) + 1, layers[i].slots[s]);
    }
    stepper_.spread_from_owners();
    stepper_.publish(runs_.plain());
  });
  storage_->finish();  // a checkpoint may lie in pinned memory
  stepper_.forget();
  local_.reset();
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (layers[i].updates >= 0) ages_[i] = {layers[i].updates, layers[i].updates > 0 && has_state(layers[i])};
  published_undisplaced();
}

template <class T>
bool EngineOf<T>::has_state(const Saved& layer) const {
  return runs_.slots() == 0 ||
         std::ranges::any_of(layer.slots, [](const void* slot) { return slot != nullptr; });
}

template <class T>
void EngineOf<T>::watch_writes() {
  if (device_) return;
  std::vector<const std::byte*> all;
  for (int v = 0; v < team().workers_per_rank(); ++v) all.push_back(weights(v).get());
  write_check_.emplace(plan_, std::move(all));
  write_check_->record();
}

// Every X of this rank holds what the engine has put there. Other ranks write into it during a collective
// call, so this comes after its end.
template <class T>
void EngineOf<T>::published() {
  if (write_check_) write_check_->record();
}

template <class T>
void EngineOf<T>::published_undisplaced() {
  std::fill(displaced_.begin(), displaced_.end(), 0);
  published();
}

// Layers outside all runs keep their X. If the step may be skipped, a layer that was displaced may still be.
template <class T>
void EngineOf<T>::note_displacements(const std::vector<Run<T>>& runs, bool may_be_skipped) {
  for (const Run<T>& run : runs) {
    const bool displaces = run.extrapolation && run.extrapolation->direction != Direction::none;
    for (std::size_t i = run.layer; i < plan_.layers.size() && plan_.layers[i].begin < run.end; ++i)
      displaced_[i] = displaces || (may_be_skipped && displaced_[i]);
  }
}

// What a worker has no gradient for counts as zeros if another has one. Zeros stay zeros, so they are written
// once.
template <class T>
void EngineOf<T>::clear_absent(std::span<const std::uint8_t> present) {
  const std::size_t layers = plan_.layers.size();
  for (std::size_t i = 0; i < present.size(); ++i) {
    const Layer& layer = plan_.layers[i % layers];
    const int v = static_cast<int>(i / layers);
    if (!present[i] && !cleared_[i]) {
      storage_->clear(gradients(v).get() + layer.byte_begin,
                      static_cast<std::size_t>(layer.count * size_of(layer.spec.dtype)));
      changed(v, i % layers);
    }
    cleared_[i] = !present[i];
  }
}

template <class T>
std::vector<std::uint8_t> EngineOf<T>::present_here(std::span<const std::uint8_t> present) const {
  std::vector<std::uint8_t> any(plan_.layers.size(), 0);
  for (std::size_t i = 0; i < present.size(); ++i) any[i % any.size()] |= present[i];
  return any;
}

template <class T>
Engine::Outcome EngineOf<T>::step(const Step& step) {
  if (device_ && !step.fused) throw UsageError("unfused steps are taken on the CPU only");
  if (rails_ && !step.fused) throw UsageError("an unfused step works inside one team");
  if (device_ && device_->captures()) {
    capture(step);
    return {};
  }
  const auto start = std::chrono::steady_clock::now();
  clear_absent(step.present);
  auto here = present_here(step.present);
  if (overlap_) here.insert(here.end(), overlap_->stale().begin(), overlap_->stale().end());
  std::vector<std::uint8_t> present, stale;
  collective({Operation::step, steps_ + 1, step.fused, numbers_of(step), here, declared_},
             [&](const Agreed& agreed) {
               const auto layers = agreed.present.begin() + std::ptrdiff_t(plan_.layers.size());
               present.assign(agreed.present.begin(), layers);
               stale.assign(layers, agreed.present.end());
               Step settled = step_of(agreed.doubles);
               settled.fused = step.fused;
               settled.revise = step.revise;
               settled.revise_rule = step.revise_rule;
               settle();
               outcome_ = run(settled, {present, ages_, stale});
               if (device_) recording_.took(look_of(stepper_.runs(), step));
             });
  stepper_.read_sums(step, {present, ages_}, outcome_);
  if (!outcome_.skipped) note_displacements(stepper_.runs(), stepper_.judges(step));
  conclude(step, present);
  published();
  last_step_ = std::chrono::steady_clock::now() - start;
  return outcome_;
}

// Counts a step of these layers, now or when its outcome is known.
template <class T>
void EngineOf<T>::conclude(const Step& step, std::span<const std::uint8_t> present) {
  auto begins = runs_.begins(step);
  if (stepper_.judges(step))
    undecided_ = {{present.begin(), present.end()}, std::move(begins)};
  else if (!outcome_.skipped)
    runs_.add_updates(ages_, present, begins);
  ++steps_;
}

template <class T>
void EngineOf<T>::settle() {
  if (!undecided_) return;
  const auto layers = std::exchange(undecided_, std::nullopt);
  const auto [norm, skipped] = hands_.judge->verdict();
  outcome_ = {norm, skipped};
  if (!skipped) runs_.add_updates(ages_, layers->present, layers->begins);
}

template <class T>
Recording::Look EngineOf<T>::look_of(const std::vector<Run<T>>& runs, const Step& step) const {
  return {outline_of<T>(runs), stepper_.judges(step)};
}

// Nothing happens yet, so nothing is counted, and no rank is met.
template <class T>
void EngineOf<T>::capture(const Step& step) {
  if (team().topology().size() > 1 || arenas_.own_shards().size() > 1)
    throw UsageError("a step can be captured by one rank alone, with one worker");
  const auto numbers = numbers_of(step);
  const Step settled = step_of(numbers);
  auto present = present_here(step.present);
  recording_.require_like_last(look_of(runs_.for_step(settled, present, ages_), settled));
  for (std::size_t i = 0; i < cleared_.size(); ++i)
    if (!step.present[i] && !cleared_[i])
      throw UsageError("a gradient was dropped since the last step: take a step before one is captured");
  stepper_.run(settled, {present, ages_}, [](bool) {});
  recording_.captured(std::move(present));
}

template <class T>
void EngineOf<T>::prepare_replay(const Step& step) {
  const auto& layers = recording_.layers();
  settle();
  const auto runs = runs_.for_step(step_of(numbers_of(step)), layers, ages_);
  recording_.require_replayable(look_of(runs, step));
  hands_.walker->prepare_replay(runs, bounds_of(step));
  outcome_ = {};
  note_displacements(runs, stepper_.judges(step));
  conclude(step, layers);
}

template <class T>
Engine::Outcome EngineOf<T>::run(const Step& step, const LayerMarks& marks) {
  const auto meet = [&](bool touched) {
    storage_->announce();
    exchange_.meet_between_passes(steps_ + 1, touched);
    storage_->follow();
  };
  if (step.fused) return stepper_.run(step, marks, meet);
  stepper_.run_unfused(step, marks);
  return {};
}

// All ranks announce equally often, whatever becomes of the call.
template <class T>
void EngineOf<T>::complain(const std::string& complaint) {
  storage_->announce();
  exchange_.complain({Operation::step, steps_ + 1}, complaint);
}

// All agree before memory is made, so that a rank that complains about its own step is heard.
template <class T>
void EngineOf<T>::begin_local() {
  if (overlap_) throw UsageError("local steps have no sums to send during backward");
  if (device_) throw UsageError("local steps are taken on the CPU only, not on " + device_->name());
  collective({Operation::begin_local, steps_ + 1}, [](const Agreed&) {});
  local_.emplace(team(), plan_, arenas_, own_runs_, rails_.get(), ways_.tiles.front(), ways_.streams);
  collective({Operation::begin_local, steps_ + 1}, [&](const Agreed&) { local_->begin(ages_); });
  for (int v = 0; v < team().workers_per_rank(); ++v) stepper_.publish_to(weights(v).get(), runs_.plain());
  published_undisplaced();
}

template <class T>
LocalPhase<T>& EngineOf<T>::local() {
  if (!local_) throw UsageError("local steps begin with begin_local()");
  return *local_;
}

template <class T>
void EngineOf<T>::local_step(const Step& step) {
  const auto start = std::chrono::steady_clock::now();
  team().require_own_process();
  const FloatEnvironment environment;
  local().step(step);
  outcome_ = {};
  ++steps_;
  published();
  last_step_ = std::chrono::steady_clock::now() - start;
}

// The posts come before the step, so that an error of one rank leaves all as they were.
template <class T>
void EngineOf<T>::averaging_step(const Step& step) {
  const auto start = std::chrono::steady_clock::now();
  Step counted = step;
  counted.local_steps = local().steps() + 1;
  auto touched = present_here(step.present);
  for (std::size_t i = 0; i < touched.size(); ++i) touched[i] |= local_->touched()[i];
  collective({Operation::local_step, steps_ + 1, 0, numbers_of(counted), touched, declared_},
             [&](const Agreed& agreed) {
               local_->step(step);
               exchange_.meet_between_passes(steps_ + 1, false);
               finish_round(agreed.present);
             });
  ++steps_;
  published();
  last_step_ = std::chrono::steady_clock::now() - start;
}

template <class T>
void EngineOf<T>::average() {
  const std::vector<double> no_hyper(hyper_count(), 0.0);
  Step none;
  none.hyper = no_hyper;
  none.local_steps = local().steps();
  collective({Operation::average, steps_, 0, numbers_of(none), local_->touched()},
             [&](const Agreed& agreed) { finish_round(agreed.present); });
  published();
}

template <class T>
void EngineOf<T>::finish_round(std::span<const std::uint8_t> touched) {
  local_->average(touched);
  runs_.add_updates(ages_, touched, local_->begins(), local_->steps());
  local_->begin_round();
}

template <class T>
void EngineOf<T>::require_settled() const {
  team().require_own_process();
  if (exchange_.unsettled())
    throw UsageError(
        "a rank was lost in the middle of a step, so the master weights are part old and part new; go "
        "back to the last checkpoint");
}

template <class T>
void EngineOf<T>::show_master(int v) {
  require_settled();
  std::byte* x = weights(v).get();
  const auto bytes = static_cast<std::size_t>(plan_.bytes);
  const auto hidden = hidden_.emplace(v, Hidden{storage_->allocate(bytes), {}}).first;
  storage_->copy(hidden->second.weights.get(), x, bytes);
  stepper_.publish_to(x, runs_.plain());
  if (!write_check_) return;
  hidden->second.check.emplace(plan_, std::vector<const std::byte*>{x}, ++shows_);
  hidden->second.check->record();
}

template <class T>
void EngineOf<T>::hide_master(int v) {
  team().require_own_process();
  const auto found = hidden_.find(v);
  if (found == hidden_.end() || plan_.bytes == 0) return;
  storage_->copy(weights(v).get(), found->second.weights.get(), static_cast<std::size_t>(plan_.bytes));
  hidden_.erase(found);
}

template <class T>
void EngineOf<T>::collect_state(std::optional<int> only_rank) {
  if (!rails_) return;
  require_settled();
  const std::uint64_t wanted = only_rank ? std::uint64_t(*only_rank) + 1 : 0;
  collective({Operation::collect_state, steps_, wanted}, [&](const Agreed&) { state_.collect(only_rank); });
}

template <class T>
void EngineOf<T>::close() {
  if (closed_ || !team().own_process()) return;
  closed_ = true;
  hidden_.clear();
  if (!exchange_.unsettled())
    for (int v = 0; v < team().workers_per_rank(); ++v) stepper_.publish_to(weights(v).get(), runs_.plain());
  storage_->finish();
  exchange_.close();
}

void check_arguments(std::span<const LayerSpec> layers, const EngineOptions& options, const Topology& teams) {
  if (family_index(options.rule) < 0) throw UsageError("there is no rule '" + options.rule + "'");
  if (teams.team_count() > 1 && families()[std::size_t(family_index(options.rule))].compares_workers)
    throw UsageError(
        "rule '" + options.rule +
        "' compares all workers' gradients element by element, which must lie in one team; between "
        "hosts take another rule");
  if (extrapolation_index(options.extrapolation.name) < 0)
    throw UsageError("there is no extrapolation '" + options.extrapolation.name + "'");
  if (options.tile && *options.tile < 1) throw UsageError("tile must be at least one element");
  for (const LayerSpec& layer : layers)
    if (layer.group < 0 || layer.group >= static_cast<int>(options.groups.size()))
      throw UsageError("'" + layer.name + "' belongs to a group that does not exist");
}

// What a device's kernels do not have.
void check_device(const Device& device, const EngineOptions& options, const Plan& plan, bool narrow) {
  const std::string on = " on " + device.name() + "; take the CPU for it";
  const int family = family_index(options.rule);
  for (const GroupSpec& group : options.groups) {
    const unsigned member = families()[std::size_t(family)].member(group.flags, group.hyper);
    if (!device.kernels().rules.at(std::size_t(family)).at(member).apply)
      throw UsageError("rule '" + options.rule + "' has no kernels" + on);
  }
  if (plan.master == DType::f64) throw UsageError("float64 parameters have no kernels" + on);
  if (kExtrapolations[std::size_t(extrapolation_index(options.extrapolation.name))].per_filter)
    throw UsageError("extrapolation '" + options.extrapolation.name + "' has no kernels" + on);
  if (options.bucket > 0) throw UsageError("sums that travel during backward have no kernels" + on);
  if (narrow) throw UsageError("sums that travel as bfloat16 have no kernels" + on);
}

// NCCL's sums are of memory on GPUs, in blocks of which every rank of a rail has one.
void check_order(const Device* device, const Team& team) {
  if (!team.wire() || team.rails().order == RailOptions::Order::tree) return;
  if (!device)
    throw UsageError(
        "WireOptions(order=\"nccl\") is for parameters on GPUs, and these are not: leave out `order`");
  if (!team.topology().has_equal_teams())
    throw UsageError(
        "WireOptions(order=\"nccl\") takes teams of one size: start equally many ranks on every host, or "
        "leave out `order`");
}

// A rule that projects needs the sums of every filter.
CellCuts cuts_for(const EngineOptions& options) {
  const FamilyInfo& family = families()[static_cast<std::size_t>(family_index(options.rule))];
  return family.projects ? CellCuts::filters : CellCuts::layers;
}

// Weights and gradients of one worker: less than is needed, but known before the plan, whose own tables would
// not fit at an absurd size.
std::size_t bytes_of(std::span<const LayerSpec> layers) {
  std::size_t bytes = 0;
  for (const LayerSpec& layer : layers)
    bytes += 2 * static_cast<std::size_t>(element_count(layer.shape) * size_of(layer.dtype));
  return bytes;
}

}  // namespace

std::unique_ptr<Engine> Engine::create(std::shared_ptr<Team> team, std::span<const LayerSpec> layers,
                                       const EngineOptions& asked, std::shared_ptr<Device> device) {
  EngineOptions options = asked;
  Plan plan;
  std::size_t least = 0;
  team->agree<UsageError>(complaint_of([&] {
    check_store();
    if (const auto tile = asked_tile()) options.tile = tile;
    check_arguments(layers, options, team->topology());
    least = bytes_of(layers);
  }));
  team->agree(complaint_of([&] { require_obtainable(least); }));
  team->agree<UsageError>(complaint_of([&] {
    plan = make_plan(layers, team->worker_count(), cuts_for(options));
    if (device) check_device(*device, options, plan, team->wire() && team->rails().narrow);
    check_order(device.get(), *team);
  }));
  require_same_signature(*team, full_signature(plan, options, *team));
  if (plan.master == DType::f64)
    return std::make_unique<EngineOf<double>>(std::move(team), std::move(plan), options, std::move(device));
  return std::make_unique<EngineOf<float>>(std::move(team), std::move(plan), options, std::move(device));
}

}  // namespace xc
