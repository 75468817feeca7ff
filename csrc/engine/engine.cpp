#include "engine/engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <optional>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "engine/arena.hpp"
#include "engine/exchange.hpp"
#include "engine/passes.hpp"

namespace xc {
namespace {

std::vector<std::string> full_signature(const Plan& plan, const EngineOptions& options, const Team& team) {
  std::vector<std::string> lines = {"extrapcomm " + options.version,
                                    std::to_string(team.workers_per_rank()) + " workers per rank",
                                    "rule " + options.rule, "extrapolation " + options.extrapolation,
                                    std::to_string(options.groups.size()) + " parameter groups"};
  for (std::size_t g = 0; g < options.groups.size(); ++g)
    lines.push_back("flags of group " + std::to_string(g) + ": " + std::to_string(options.groups[g].flags));
  for (std::string& line : signature_of(plan)) lines.push_back(std::move(line));
  return lines;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

std::string line_at(const std::string& text, std::size_t position) {
  const std::size_t begin = position == 0 ? 0 : text.rfind('\n', position - 1) + 1;
  const std::string line = text.substr(begin, text.find('\n', begin) - begin);
  return line.empty() ? "nothing more" : line;
}

// Hashes first, so that the usual case moves few bytes; the texts only to name the first line that differs.
void require_same_signature(const Team& team, const std::vector<std::string>& lines) {
  const std::string mine = joined(lines);
  const auto hashes = team.all_gather(std::to_string(hash_of(mine)));
  if (std::equal(hashes.begin() + 1, hashes.end(), hashes.begin())) return;
  const auto texts = team.all_gather(mine);
  for (std::size_t r = 1; r < texts.size(); ++r) {
    const auto [a, b] = std::mismatch(texts[0].begin(), texts[0].end(), texts[r].begin(), texts[r].end());
    if (a == texts[0].end() && b == texts[r].end()) continue;
    const auto position = static_cast<std::size_t>(a - texts[0].begin());
    throw MismatchError("the ranks build different engines: rank 0 has [" + line_at(texts[0], position) + "], rank " +
                        std::to_string(r) + " has [" + line_at(texts[r], position) + "]");
  }
}

std::vector<std::string> hyper_names(const FamilyInfo& family, std::size_t groups) {
  std::vector<std::string> names;
  for (std::size_t g = 0; g < groups; ++g) {
    const std::string of_group = " of parameter group " + std::to_string(g);
    for (const Parameter& parameter : family.parameters) names.push_back(std::string(parameter.name) + of_group);
    names.push_back("inner_lr" + of_group);
  }
  return names;
}

// A rule's member for each group, and the number of slots that the hungriest one needs.
struct Members {
  int family;
  std::vector<unsigned> of_group;
  int slots = 0;
};

template <class T>
Members choose_members(const EngineOptions& options) {
  Members members{family_index(options.rule), {}};
  for (const GroupSpec& group : options.groups) {
    const unsigned member =
        families()[static_cast<std::size_t>(members.family)].member(group.flags, group.hyper);
    members.of_group.push_back(member);
    members.slots = std::max(members.slots, rule_kernel<T>(members.family, member).slots);
  }
  return members;
}

// The engine for one master type.
template <class T>
class EngineOf final : public Engine {
 public:
  EngineOf(std::shared_ptr<Team> team, Plan plan, const EngineOptions& options)
      : plan_(std::move(plan)),
        members_(choose_members<T>(options)),
        extrapolation_(extrapolation_index(options.extrapolation)),
        parameters_(families()[static_cast<std::size_t>(members_.family)].parameters.size()),
        names_(hyper_names(families()[static_cast<std::size_t>(members_.family)], options.groups.size())),
        control_bytes_(Exchange::control_bytes(names_.size(), plan_.layers.size())),
        layout_(layout_of(*team, team->rank(), options.tile)),
        views_(team->share(layout_.views_bytes())),
        state_(team->share(layout_.state_bytes())),
        exchange_(team, state_, names_, plan_.layers.size()),
        buffers_(options.tile, team->worker_count()),
        updates_(plan_.layers.size(), 0),
        cleared_(plan_.layers.size() * static_cast<std::size_t>(team->workers_per_rank()), 1) {
    locate(options.tile);
  }

  const Plan& plan() const override { return plan_; }
  Team& team() const override { return exchange_.team(); }
  std::shared_ptr<std::byte> weights(int v) const override { return view(layout_.weights(std::size_t(v))); }
  std::shared_ptr<std::byte> gradients(int v) const override { return view(layout_.gradients(std::size_t(v))); }
  std::int64_t steps() const override { return steps_; }
  double last_step_seconds() const override { return last_step_.count(); }

  void gather(int v, std::span<const std::uintptr_t> addresses, std::span<std::uint8_t> present) override;
  void adopt(int root_worker) override;
  void step(const Step& step) override;
  void complain(const std::string& complaint) override;
  void show_master(int v) override;
  void hide_master(int v) override;
  void read(std::size_t layer, int slot, void* out) const override;
  void close() override;

 private:
  ArenaLayout layout_of(const Team& team, int rank, std::int64_t tile) const {
    return ArenaLayout(plan_, rank * team.workers_per_rank(), team.workers_per_rank(), members_.slots, tile,
                       control_bytes_);
  }
  std::shared_ptr<std::byte> view(std::size_t offset) const {
    const auto& mine = views_[static_cast<std::size_t>(team().rank())];
    return {mine, mine->data() + offset};
  }
  std::span<const Shard<T>> own_shards() const {
    return std::span(shards_).subspan(static_cast<std::size_t>(team().first_worker()),
                                      static_cast<std::size_t>(team().workers_per_rank()));
  }
  void locate(std::int64_t tile);
  void clear_absent(std::span<const std::uint8_t> present);
  std::vector<std::uint8_t> present_here(std::span<const std::uint8_t> present) const;
  void publish_master(std::byte* x);
  std::vector<Run<T>> plain_runs() const;
  Run<T> plain_run(const Layer& layer) const;
  bool extends(const Run<T>& run, const Layer& last, const Layer& layer) const;
  std::vector<Run<T>> step_runs(std::span<const double> hyper, std::span<const std::uint8_t> present,
                                bool fused) const;
  void set_rule(Run<T>& run, std::span<const double> hyper, const Layer& layer, bool fused) const;
  void run_passes(std::span<const Run<T>> runs, bool fused);

  Plan plan_;
  Members members_;
  int extrapolation_;
  std::size_t parameters_;
  std::vector<std::string> names_;
  std::size_t control_bytes_;
  ArenaLayout layout_;
  Shared views_;
  Shared state_;
  Exchange exchange_;
  TileBuffers<T> buffers_;
  std::vector<std::int64_t> updates_;   // per layer
  std::vector<std::uint8_t> cleared_;   // per own worker and layer: its gradient is known to be zeros
  Workers workers_;
  std::vector<Shard<T>> shards_;        // of all workers
  std::vector<T> waiting_;              // the reduced gradient between unfused passes
  std::map<int, std::vector<std::byte>> hidden_;  // X of workers that show the master weights
  std::int64_t steps_ = 0;
  std::chrono::duration<double> last_step_{0};
  bool closed_ = false;
};

// Finds every worker's arrays in the mappings of all ranks.
template <class T>
void EngineOf<T>::locate(std::int64_t tile) {
  for (int r = 0; r < team().size(); ++r) {
    const ArenaLayout layout = layout_of(team(), r, tile);
    std::byte* views = views_[static_cast<std::size_t>(r)]->data();
    std::byte* state = state_[static_cast<std::size_t>(r)]->data();
    for (std::size_t v = 0; v < static_cast<std::size_t>(team().workers_per_rank()); ++v) {
      const Segment& segment = plan_.segments[shards_.size()];
      Shard<T> shard{segment.begin, segment.end, reinterpret_cast<T*>(state + layout.master(v, 0)), {}};
      for (int s = 0; s < members_.slots; ++s)
        shard.slots[s] = reinterpret_cast<T*>(state + layout.master(v, static_cast<std::size_t>(s) + 1));
      shards_.push_back(shard);
      workers_.sources.push_back(views + layout.gradients(v));
      workers_.targets.push_back(views + layout.weights(v));
    }
  }
  workers_.own = workers_.sources;
}

template <class T>
Run<T> EngineOf<T>::plain_run(const Layer& layer) const {
  Run<T> run{};
  run.begin = layer.begin;
  run.end = layer.end;
  run.byte_begin = layer.byte_begin;
  run.element_size = size_of(layer.spec.dtype);
  run.scale = T(1);
  run.reduce = reduce_kernel<T>(layer.spec.dtype);
  run.publish = publish_kernel<T>(layer.spec.dtype, 0);
  run.displace = displace_kernel<T>(layer.spec.dtype);
  return run;
}

template <class T>
std::vector<Run<T>> EngineOf<T>::plain_runs() const {
  std::vector<Run<T>> runs;
  for (const Layer& layer : plan_.layers) runs.push_back(plain_run(layer));
  return runs;
}

template <class T>
void EngineOf<T>::gather(int v, std::span<const std::uintptr_t> addresses, std::span<std::uint8_t> present) {
  std::byte* const mine = gradients(v).get();
  for (std::size_t i = 0; i < plan_.layers.size(); ++i) {
    const Layer& layer = plan_.layers[i];
    const auto* from = reinterpret_cast<const std::byte*>(addresses[i]);
    std::byte* const to = mine + layer.byte_begin;
    present[i] = from != nullptr;
    if (from && from != to) std::memcpy(to, from, static_cast<std::size_t>(layer.count * size_of(layer.spec.dtype)));
  }
}

// The master weights are read as a sum over one source, the root's X.
template <class T>
void EngineOf<T>::adopt(int root_worker) {
  exchange_.collective({Operation::adopt, steps_, std::uint64_t(root_worker)}, [&](std::span<const Post>) {
    const Workers root{{workers_.targets[static_cast<std::size_t>(root_worker)]}, {}, {}};
    Pass<T> load = sum_pass<T>();
    load.pop_back();
    const auto runs = plain_runs();
    for (const Shard<T>& shard : own_shards()) {
      walk<T>(load, root, runs, shard, buffers_, shard.w);
      walk<T>(publish_pass<T>(), {{}, workers_.own, workers_.targets}, runs, shard, buffers_);
      for (int s = 0; s < members_.slots; ++s) std::fill_n(shard.slots[s], shard.end - shard.begin, T(0));
    }
  });
  std::fill(updates_.begin(), updates_.end(), 0);
}

// What a worker has no gradient for counts as zeros if another has one. Zeros stay zeros, so they are written once.
template <class T>
void EngineOf<T>::clear_absent(std::span<const std::uint8_t> present) {
  const std::size_t layers = plan_.layers.size();
  for (std::size_t i = 0; i < present.size(); ++i) {
    const Layer& layer = plan_.layers[i % layers];
    if (!present[i] && !cleared_[i])
      std::memset(gradients(static_cast<int>(i / layers)).get() + layer.byte_begin, 0,
                  static_cast<std::size_t>(layer.count * size_of(layer.spec.dtype)));
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
void EngineOf<T>::set_rule(Run<T>& run, std::span<const double> hyper, const Layer& layer, bool fused) const {
  const auto group = static_cast<std::size_t>(layer.spec.group);
  const auto own = hyper.subspan(group * (parameters_ + 1), parameters_ + 1);
  const RuleKernel<T>& kernel = rule_kernel<T>(members_.family, members_.of_group[group]);
  kernel.prepare(own.first(parameters_), updates_[static_cast<std::size_t>(&layer - plan_.layers.data())],
                 run.scalars);
  run.apply = kernel.apply;
  run.scale = T(1.0 / static_cast<double>(team().worker_count()));
  run.inner = T(own.back());
  const bool displaced = fused && run.inner != T(0);
  run.publish = publish_kernel<T>(layer.spec.dtype, displaced ? extrapolation_ : 0);
}

template <class T>
bool EngineOf<T>::extends(const Run<T>& run, const Layer& last, const Layer& layer) const {
  const auto updates = [&](const Layer& l) { return updates_[static_cast<std::size_t>(&l - plan_.layers.data())]; };
  return run.end == layer.begin && last.spec.group == layer.spec.group && last.spec.dtype == layer.spec.dtype &&
         updates(last) == updates(layer);
}

// Neighbouring layers that are treated alike make one run; most models are one run per group.
template <class T>
std::vector<Run<T>> EngineOf<T>::step_runs(std::span<const double> hyper, std::span<const std::uint8_t> present,
                                           bool fused) const {
  std::vector<Run<T>> runs;
  const Layer* last = nullptr;
  for (std::size_t i = 0; i < plan_.layers.size(); ++i) {
    const Layer& layer = plan_.layers[i];
    if (!present[i]) continue;
    if (last && extends(runs.back(), *last, layer)) {
      runs.back().end = layer.end;
    } else {
      runs.push_back(plain_run(layer));
      set_rule(runs.back(), hyper, layer, fused);
    }
    last = &layer;
  }
  return runs;
}

template <class T>
void EngineOf<T>::run_passes(std::span<const Run<T>> runs, bool fused) {
  static const auto kFused = step_passes<T>(true), kUnfused = step_passes<T>(false);
  if (!fused) waiting_.resize(static_cast<std::size_t>(own_shards().back().end - own_shards().front().begin));
  for (const Pass<T>& pass : fused ? kFused : kUnfused)
    for (const Shard<T>& shard : own_shards())
      walk<T>(pass, workers_, runs, shard, buffers_,
              fused ? nullptr : waiting_.data() + (shard.begin - own_shards().front().begin));
}

template <class T>
void EngineOf<T>::step(const Step& step) {
  const auto start = std::chrono::steady_clock::now();
  clear_absent(step.present);
  const auto here = present_here(step.present);
  std::vector<std::uint8_t> present(here.size(), 0);
  exchange_.collective({Operation::step, steps_ + 1, step.fused, step.hyper, here}, [&](std::span<const Post> posts) {
    for (const Post& post : posts)
      for (std::size_t i = 0; i < present.size(); ++i) present[i] |= post.present()[i];
    run_passes(step_runs(posts[0].doubles(), present, step.fused), step.fused);
  });
  for (std::size_t i = 0; i < present.size(); ++i) updates_[i] += present[i];
  ++steps_;
  last_step_ = std::chrono::steady_clock::now() - start;
}

template <class T>
void EngineOf<T>::complain(const std::string& complaint) {
  exchange_.complain({Operation::step, steps_ + 1}, complaint);
}

template <class T>
void EngineOf<T>::publish_master(std::byte* x) {
  const auto runs = plain_runs();
  for (const Shard<T>& shard : shards_) walk<T>(publish_pass<T>(), {{}, {x}, {x}}, runs, shard, buffers_);
}

template <class T>
void EngineOf<T>::show_master(int v) {
  std::byte* x = weights(v).get();
  hidden_.emplace(v, std::vector<std::byte>(x, x + plan_.bytes));
  publish_master(x);
}

template <class T>
void EngineOf<T>::hide_master(int v) {
  const auto found = hidden_.find(v);
  if (found == hidden_.end()) return;
  std::memcpy(weights(v).get(), found->second.data(), found->second.size());
  hidden_.erase(found);
}

template <class T>
void EngineOf<T>::read(std::size_t layer, int slot, void* out) const {
  const std::int64_t begin = plan_.layers[layer].begin, end = begin + plan_.layers[layer].count;
  for (const Shard<T>& shard : shards_) {
    const std::int64_t first = std::max(begin, shard.begin), last = std::min(end, shard.end);
    if (first >= last) continue;
    const T* from = slot == 0 ? shard.w : shard.slots[slot - 1];
    std::copy_n(from + (first - shard.begin), last - first, static_cast<T*>(out) + (first - begin));
  }
}

template <class T>
void EngineOf<T>::close() {
  if (closed_) return;
  closed_ = true;
  hidden_.clear();
  for (int v = 0; v < team().workers_per_rank(); ++v) publish_master(weights(v).get());
  exchange_.close();
}

// What this rank finds wrong with its own arguments.
std::string complaint_about(std::span<const LayerSpec> layers, const EngineOptions& options) {
  if (family_index(options.rule) < 0) return "there is no rule '" + options.rule + "'";
  if (extrapolation_index(options.extrapolation) < 0)
    return "there is no extrapolation '" + options.extrapolation + "'";
  if (options.tile < 1) return "tile must be at least one element";
  for (const LayerSpec& layer : layers)
    if (layer.group < 0 || layer.group >= static_cast<int>(options.groups.size()))
      return "'" + layer.name + "' belongs to a group that does not exist";
  return {};
}

}  // namespace

std::unique_ptr<Engine> Engine::create(std::shared_ptr<Team> team, std::span<const LayerSpec> layers,
                                       const EngineOptions& options) {
  if (const std::string complaint = complaint_about(layers, options); !complaint.empty()) throw UsageError(complaint);
  Plan plan = make_plan(layers, team->worker_count());
  require_same_signature(*team, full_signature(plan, options, *team));
  if (plan.master == DType::f64) return std::make_unique<EngineOf<double>>(std::move(team), std::move(plan), options);
  return std::make_unique<EngineOf<float>>(std::move(team), std::move(plan), options);
}

}  // namespace xc
