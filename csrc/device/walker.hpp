#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "device/device.hpp"
#include "device/judge.hpp"
#include "device/run_table.hpp"
#include "engine/passes.hpp"
#include "engine/plan.hpp"
#include "engine/runs.hpp"

namespace xc {

// Carries out passes by a device's kernels. A pass that reduces, applies and publishes is one kernel. Any
// other is one kernel for each of its parts, between which the mean gradient waits in the device's memory;
// sums come back to the host, cell by cell, so what follows from them is decided there, as on the CPU; but
// for the norm of a step that is judged, which stays on the device.
class DeviceWalker final : public Walker<float> {
 public:
  // A judge, of steps that it judges, shares its runs.
  DeviceWalker(std::shared_ptr<Device> device, std::shared_ptr<Storage> storage, const Plan& plan,
               std::shared_ptr<RunTable> runs, const DeviceJudge* judge)
      : device_(std::move(device)),
        storage_(std::move(storage)),
        runs_(std::move(runs)),
        judge_(judge),
        plan_(plan) {}
  // Without one.
  DeviceWalker(const std::shared_ptr<Device>& device, const std::shared_ptr<Storage>& storage,
               const Plan& plan)
      : DeviceWalker(device, storage, plan, std::make_shared<RunTable>(device, storage), nullptr) {}

  void walk(const Pass& pass, const Workers& workers, std::span<const Run<float>> runs,
            const Shard<float>& shard, const Kept<float>& kept) override;
  void prepare_replay(std::span<const Run<float>> runs, const Bounds& bounds) override {
    runs_->stage(runs, bounds);
  }

 private:
  // Cells that one launch takes: of one element type and one rule.
  struct Batch {
    DType dtype;
    int family;
    unsigned member;
    std::size_t first;                  // of its cells among all of the shard
    std::vector<std::uint32_t> places;  // of its cells among the plan's in the shard
  };
  // What is known of a shard as long as its runs begin and end where they do.
  struct Cut {
    std::vector<Batch> batches;
    std::shared_ptr<std::byte> cells;
    std::shared_ptr<std::byte> places;
  };
  // A table in the device's memory, written again when it changes.
  struct Table {
    std::vector<std::byte> content;
    std::shared_ptr<std::byte> memory;
    std::size_t capacity = 0;
  };

  const Cut& cut_of(std::span<const Run<float>> runs, const Shard<float>& shard);
  Cut cut(std::span<const Run<float>> runs, const Shard<float>& shard) const;
  void add_cells(const Run<float>& run, std::uint32_t number, const Shard<float>& shard,
                 std::vector<std::vector<Cell>>& cells, std::vector<Batch>& batches) const;
  template <class V>
  const V* upload(Table& table, std::span<const V> values);
  const std::byte* upload(Table& table, std::span<const std::byte> content);
  void keep_for_replays(const Cut& cut);
  template <class V>
  V* scratch(std::shared_ptr<std::byte>& memory, std::size_t& size, std::size_t count);
  DeviceWorkers upload(const Workers& workers);
  DeviceShard arrays_of(const Shard<float>& shard, const Pass& pass, const Kept<float>& kept);
  void run_parts(const Pass& pass, const Batch& batch, Launch& launch, const Kept<float>& kept);
  void measure(const Pass& pass, const Batch& batch, Launch& launch, const Kept<float>& kept);
  void leave_squares(const Cut& cut, const Batch& batch, Launch& launch) const;
  void take_step(const Batch& batch, const Launch& launch) const;
  std::vector<std::vector<double>> sums(KernelFn kernel, int count, Launch& launch);
  void queue(KernelFn kernel, const Launch& launch) const;
  const RuleKernels& rule_of(const Batch& batch) const;

  std::shared_ptr<Device> device_;
  std::shared_ptr<Storage> storage_;
  std::shared_ptr<RunTable> runs_;
  const DeviceJudge* judge_;
  const Plan& plan_;
  Outline outline_;  // of the runs that cuts_ are for
  std::map<std::pair<std::int64_t, std::int64_t>, Cut> cuts_;
  Table sources_, own_, targets_, numbers_;
  std::shared_ptr<std::byte> mean_, factor_, sums_;
  std::vector<std::shared_ptr<std::byte>> kept_;  // that captures refer to
  std::size_t mean_size_ = 0, factor_size_ = 0, sums_size_ = 0;
};

}  // namespace xc
