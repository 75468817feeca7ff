#include "device/host.hpp"

#include <algorithm>

#include "device/copying.hpp"
#include "device/judging.hpp"
#include "device/tables.hpp"

namespace xc {
namespace {

struct HostLauncher {
  template <class Body>
  static void launch(const Launch& at, Stream) {
    if (at.obeyed && at.obeyed->skipped) return;
    for (std::int64_t c = 0; c < at.cell_count; ++c)
      for (int thread = 0; thread * Body::kPack < at.cells[c].count; ++thread)
        Body{}(at, at.cells[c], thread);
  }

  template <class Body>
  static void sum(const Launch& at, Stream) {
    std::vector<double> terms(std::size_t{Body::kSums} * kCellElements);
    for (std::int64_t c = 0; c < at.cell_count; ++c)
      for (int round = 0; round < Body::rounds(at); ++round) {
        const Cell& cell = at.cells[c];
        for (int thread = 0; thread * Body::kPack < cell.count; ++thread)
          Body{}(at, cell, thread, round, terms.data());
        for (int q = 0; q < Body::kSums; ++q)
          sum_at(at, round * Body::kSums + q, c) = sum_of(terms.data(), q, cell.count);
      }
  }

  static void copy(const CopyBatch& batch, Stream) {
    for (std::int64_t piece = 0; piece < pieces_of(batch); ++piece)
      for (int thread = 0; thread < kCopyThreads; ++thread) copy_piece(batch, piece, thread);
  }

  static void judge(const Judgement& at, Stream) {
    double lanes[kNormLanes];
    for (int lane = 0; lane < kNormLanes; ++lane) lanes[lane] = lane_of(at.squares, lane);
    const DeviceVerdict verdict = verdict_on(*at.bounds, sum_of_lanes<kNormLanes>(lanes));
    for (int run = 0; run < at.bounds->run_count; ++run) clip(at, verdict, run);
    *at.verdict = verdict;
  }

  static double sum_of(const double* terms, int sum, int count) {
    double lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane_of(terms, sum, lane, count);
    return sum_of_lanes(lanes);
  }
};

DeviceKernels host_kernels() {
  using Own = Tables<HostLauncher>;
  DeviceKernels kernels{{Own::element<float>(), Own::element<Bf16>(), Own::element<F16>()},
                        &HostLauncher::launch<TakeBody>,
                        &HostLauncher::launch<ClipBody>,
                        &HostLauncher::sum<MeanSquaresBody>,
                        &HostLauncher::copy,
                        &HostLauncher::judge,
                        {}};
  Own::add_steps<float>(kernels.rules);
  Own::add_steps<Bf16>(kernels.rules);
  Own::add_steps<F16>(kernels.rules);
  Own::add_rules(kernels.rules);
  return kernels;
}

// Memory of one engine; what is copied goes through the device's queue.
class DeviceOfHostStorage final : public Storage {
 public:
  explicit DeviceOfHostStorage(HostDevice& device) : device_(device) {}
  Shared share(Team& team, std::size_t bytes) override { return memory_.share(team, bytes); }
  std::shared_ptr<std::byte> allocate(std::size_t bytes) override { return device_.staging(bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override {
    device_.queue([=, this] { memory_.copy(to, from, bytes); });
  }
  void copy_all(std::span<const Copy> copies) override {
    in_batches(copies, [&](const CopyBatch& batch) {
      device_.queue([=, this] { device_.kernels().copy(batch, nullptr); });
    });
  }
  void clear(void* at, std::size_t bytes) override {
    device_.queue([=, this] { memory_.clear(at, bytes); });
  }
  void finish() override {}
  void mark() override {}
  void await_mark() override {}
  void announce() override { device_.count_announcement(); }
  void follow() override {}

 private:
  HostDevice& device_;
  HostStorage memory_;
};

}  // namespace

Device::Place HostDevice::place() const { return {1, 0}; }  // DLPack's CPU

const DeviceKernels& HostDevice::kernels() const {
  static const DeviceKernels kernels = host_kernels();
  return kernels;
}

std::shared_ptr<Storage> HostDevice::storage(Team&) { return std::make_shared<DeviceOfHostStorage>(*this); }

// On a page, as a device's allocations are aligned.
std::shared_ptr<std::byte> HostDevice::staging(std::size_t bytes) {
  const auto mapping = std::make_shared<Mapping>(std::max(bytes, std::size_t{1}));
  return {mapping, mapping->data()};
}

void HostDevice::launch(KernelFn kernel, const Launch& launch) {
  queue([=] { kernel(launch, nullptr); });
}

void HostDevice::judge(const Judgement& at) {
  queue([=, this] { kernels().judge(at, nullptr); });
}

void HostDevice::queue(std::function<void()> work) {
  if (captures_)
    recorded_.push_back(std::move(work));
  else
    work();
}

void HostDevice::begin_capture() {
  recorded_.clear();
  captures_ = true;
}

void HostDevice::replay() {
  for (const auto& work : recorded_) work();
}

}  // namespace xc
