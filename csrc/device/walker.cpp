#include "device/walker.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.hpp"
#include "engine/partials.hpp"

namespace xc {
namespace {

// A sum that is not yet a mean is of gradients as they are.
std::vector<Run<float>> unscaled(std::span<const Run<float>> runs) {
  std::vector<Run<float>> unscaled(runs.begin(), runs.end());
  for (Run<float>& run : unscaled) run.scale = 1.0f;
  return unscaled;
}

// Random displacements are a kernel of their own, as is whatever leaves something behind.
bool is_one_kernel(const Pass& pass, std::span<const Run<float>> runs, const Kept<float>& kept) {
  const bool random = std::any_of(
      runs.begin(), runs.end(), [](const Run<float>& run) { return run.extrapolation->random.has_value(); });
  return pass.source == Pass::Source::gradients && pass.apply && !random &&
         pass.weights != Pass::Weights::keep && !pass.sums.any() && !kept.mean;
}

bool only_leaves_squares(const Pass& pass) { return pass.judged && !pass.apply; }

// For every cell, the tree sum of the workers' numbers, as gradients are summed.
std::vector<double> tree_sums(const std::vector<std::vector<double>>& of_workers) {
  const std::size_t cells = of_workers.front().size();
  const auto workers = static_cast<int>(of_workers.size());
  std::vector<const std::byte*> parts;
  for (const auto& numbers : of_workers) parts.push_back(reinterpret_cast<const std::byte*>(numbers.data()));
  std::vector<double> sums(cells), scratch(static_cast<std::size_t>(reduce_scratch_tiles(workers)) * cells);
  add_tree(parts, static_cast<std::int64_t>(cells), sums.data(), scratch.data());
  return sums;
}

}  // namespace

// ---- cells ----

const DeviceWalker::Cut& DeviceWalker::cut_of(std::span<const Run<float>> runs, const Shard<float>& shard) {
  if (Outline outline = outline_of(runs); outline != outline_) {
    cuts_.clear();
    outline_ = std::move(outline);
  }
  const auto [found, is_new] = cuts_.try_emplace({shard.begin, shard.end});
  if (is_new) found->second = cut(runs, shard);
  return found->second;
}

DeviceWalker::Cut DeviceWalker::cut(std::span<const Run<float>> runs, const Shard<float>& shard) const {
  Cut cut;
  std::vector<std::vector<Cell>> cells;
  for (std::size_t i = 0; i < runs.size(); ++i)
    add_cells(runs[i], static_cast<std::uint32_t>(i), shard, cells, cut.batches);
  std::vector<Cell> all;
  std::vector<std::uint32_t> places;
  for (std::size_t b = 0; b < cells.size(); ++b) {
    cut.batches[b].first = all.size();
    all.insert(all.end(), cells[b].begin(), cells[b].end());
    places.insert(places.end(), cut.batches[b].places.begin(), cut.batches[b].places.end());
  }
  cut.cells = stored(*storage_, all);
  cut.places = stored(*storage_, places);
  return cut;
}

// Cells are the plan's, and shards begin where cells do. A run that is one layer knows its padding.
void DeviceWalker::add_cells(const Run<float>& run, std::uint32_t number, const Shard<float>& shard,
                             std::vector<std::vector<Cell>>& cells, std::vector<Batch>& batches) const {
  const int family = run.kernel ? run.family : -1;
  const unsigned member = run.kernel ? run.member : 0;
  auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& b) {
    return b.dtype == run.dtype && b.family == family && b.member == member;
  });
  if (batch == batches.end()) {
    batches.push_back({run.dtype, family, member, 0, {}});
    cells.emplace_back();
    batch = batches.end() - 1;
  }
  const auto index = static_cast<std::size_t>(batch - batches.begin());
  const auto begins = cells_of(plan_, {0, shard.begin, shard.end, 0});
  const bool is_layer = run.kernel && run.kernel->measures > 0;
  const auto first = std::lower_bound(begins.begin(), begins.end(), run.begin);
  for (auto at = first; at + 1 < begins.end() && *at < run.end; ++at) {
    const std::int64_t count = *(at + 1) - *at;
    const std::int64_t live = is_layer ? std::clamp<std::int64_t>(run.filters_end - *at, 0, count) : count;
    cells[index].push_back(
        {*at, number, static_cast<std::uint16_t>(count), static_cast<std::uint16_t>(live)});
    batch->places.push_back(static_cast<std::uint32_t>(at - begins.begin()));
  }
}

// ---- tables and scratch in the device's memory ----

template <class V>
const V* DeviceWalker::upload(Table& table, std::span<const V> values) {
  return reinterpret_cast<const V*>(upload(table, std::as_bytes(values)));
}

const std::byte* DeviceWalker::upload(Table& table, std::span<const std::byte> content) {
  if (table.memory && std::equal(content.begin(), content.end(), table.content.begin(), table.content.end()))
    return table.memory.get();
  if (content.size() > table.capacity) {
    table.memory = storage_->allocate(content.size());
    table.capacity = content.size();
  }
  table.content.assign(content.begin(), content.end());
  storage_->copy(table.memory.get(), table.content.data(), content.size());
  return table.memory.get();
}

// Whatever later steps put in its place, a replay finds this memory.
void DeviceWalker::keep_for_replays(const Cut& cut) {
  kept_ = runs_->captured();
  kept_.insert(kept_.end(), {cut.cells, cut.places, sources_.memory, own_.memory, targets_.memory,
                             numbers_.memory, mean_, factor_});
}

template <class V>
V* DeviceWalker::scratch(std::shared_ptr<std::byte>& memory, std::size_t& size, std::size_t count) {
  if (count > size) {
    memory = storage_->allocate(count * sizeof(V));
    size = count;
  }
  return reinterpret_cast<V*>(memory.get());
}

DeviceWorkers DeviceWalker::upload(const Workers& workers) {
  std::vector<std::uint32_t> numbers = workers.numbers;
  for (std::size_t k = numbers.size(); k < workers.targets.size(); ++k)
    numbers.push_back(static_cast<std::uint32_t>(k));
  return {upload(sources_, std::span(workers.sources)),
          upload(own_, std::span(workers.own)),
          upload(targets_, std::span<std::byte* const>(workers.targets)),
          upload(numbers_, std::span<const std::uint32_t>(numbers)),
          static_cast<int>(workers.sources.size()),
          static_cast<int>(workers.targets.size())};
}

// Padding may hold anything that was published into it; what nobody keeps waits in scratch.
DeviceShard DeviceWalker::arrays_of(const Shard<float>& shard, const Pass& pass, const Kept<float>& kept) {
  const auto count = static_cast<std::size_t>(shard.end - shard.begin);
  DeviceShard seen{shard.begin, shard.w, {}, kept.mean, kept.factor, kept.received};
  std::copy(std::begin(shard.slots), std::end(shard.slots), seen.slots);
  if (!seen.mean && pass.source != Pass::Source::none) seen.mean = scratch<float>(mean_, mean_size_, count);
  if (!seen.factor && pass.factor) seen.factor = scratch<float>(factor_, factor_size_, count);
  return seen;
}

// ---- passes ----

void DeviceWalker::queue(KernelFn kernel, const Launch& launch) const {
  if (launch.cell_count > 0) device_->launch(kernel, launch);
}

const RuleKernels& DeviceWalker::rule_of(const Batch& batch) const {
  return device_->kernels().rules[static_cast<std::size_t>(batch.family)][batch.member];
}

void DeviceWalker::walk(const Pass& pass, const Workers& workers, std::span<const Run<float>> runs,
                        const Shard<float>& shard, const Kept<float>& kept) {
  if (shard.begin == shard.end || runs.empty()) return;
  const Cut& cut = cut_of(runs, shard);
  Launch launch{};
  if (pass.source == Pass::Source::partial)
    runs_->upload(unscaled(runs));
  else if (!pass.judged)
    runs_->upload(runs);
  launch.runs = runs_->runs();
  if (pass.judged && pass.apply) launch.obeyed = judge_->verdict_memory();
  if (device_->captures())
    keep_for_replays(cut);
  else if (pass.apply)
    runs_->prepare_capture();
  launch.workers = upload(workers);
  const bool fused = is_one_kernel(pass, runs, kept);
  launch.shard = arrays_of(shard, fused || only_leaves_squares(pass) ? Pass{} : pass, kept);
  for (const Batch& batch : cut.batches) {
    launch.cells = reinterpret_cast<const Cell*>(cut.cells.get()) + batch.first;
    launch.cell_count = static_cast<std::int64_t>(batch.places.size());
    if (only_leaves_squares(pass))
      leave_squares(cut, batch, launch);
    else if (fused)
      take_step(batch, launch);
    else
      run_parts(pass, batch, launch, kept);
  }
}

void DeviceWalker::take_step(const Batch& batch, const Launch& launch) const {
  const auto& steps = rule_of(batch).step[element_place(batch.dtype)];
  const auto place = static_cast<std::size_t>(unrolled_place(launch.workers.source_count));
  queue(steps[place] ? steps[place] : steps[kUnrolledCount - 1], launch);
}

// Where the judge finds them. Nothing else is made of the mean: the last pass reduces again.
void DeviceWalker::leave_squares(const Cut& cut, const Batch& batch, Launch& launch) const {
  const ElementKernels& element = device_->kernels().element[element_place(batch.dtype)];
  launch.places = reinterpret_cast<const std::uint32_t*>(cut.places.get()) + batch.first;
  launch.sums = judge_->squares_from(launch.shard.begin);
  queue(element.squares[std::size_t(unrolled_place(launch.workers.source_count))], launch);
}

void DeviceWalker::run_parts(const Pass& pass, const Batch& batch, Launch& launch, const Kept<float>& kept) {
  const DeviceKernels& kernels = device_->kernels();
  const ElementKernels& element = kernels.element[element_place(batch.dtype)];
  if (pass.source == Pass::Source::received)
    queue(kernels.take, launch);
  else if (pass.source != Pass::Source::none)
    queue(element.reduce[std::size_t(unrolled_place(launch.workers.source_count))], launch);
  if (pass.sums.any())
    measure(pass, batch, launch, kept);
  else if (pass.clip)
    queue(kernels.clip, launch);
  if (pass.apply) queue(rule_of(batch).apply, launch);
  if (pass.factor && rule_of(batch).factor) queue(rule_of(batch).factor, launch);
  if (pass.weights != Pass::Weights::keep) queue(element.publish, launch);
}

// The sums of a pass, in the order of its stages.
void DeviceWalker::measure(const Pass& pass, const Batch& batch, Launch& launch, const Kept<float>& kept) {
  const DeviceKernels& kernels = device_->kernels();
  const ElementKernels& element = kernels.element[element_place(batch.dtype)];
  const auto give = [&](CellSums& to, const std::vector<std::vector<double>>& sums) {
    for (std::size_t q = 0; q < sums.size(); ++q) to.take(q, batch.places, sums[q]);
  };
  if (pass.sums.mean) give(*kept.mean_squares, sums(kernels.mean_squares, 1, launch));
  if (pass.sums.workers) {
    const auto each = sums(element.worker_squares, launch.workers.source_count, launch);
    kept.worker_squares->take(0, batch.places, tree_sums(each));
  }
  if (pass.clip) queue(kernels.clip, launch);
  if (pass.sums.measure >= 0) {
    const RuleKernels& rule = rule_of(batch);
    if (const KernelFn kernel = rule.measure[pass.sums.measure])
      give(*kept.measured, sums(kernel, rule.sums[pass.sums.measure], launch));
  }
  if (pass.sums.own_squares)
    give(*kept.own_squares, sums(element.own_squares, launch.workers.source_count, launch));
}

// Waits for a summing kernel: for each of its sums a number for every cell.
std::vector<std::vector<double>> DeviceWalker::sums(KernelFn kernel, int count, Launch& launch) {
  if (device_->captures())
    throw UsageError(
        "a step whose sums the host adds up cannot be captured: rules with trust ratios, gains and noise "
        "need them");
  const auto cells = static_cast<std::size_t>(launch.cell_count), sums = static_cast<std::size_t>(count);
  launch.sums = scratch<double>(sums_, sums_size_, sums * cells);
  launch.sum_stride = launch.cell_count;
  queue(kernel, launch);
  std::vector<std::vector<double>> numbers(sums, std::vector<double>(cells));
  for (std::size_t q = 0; q < sums; ++q)
    storage_->copy(numbers[q].data(), launch.sums + q * cells, cells * sizeof(double));
  storage_->finish();
  return numbers;
}

}  // namespace xc
