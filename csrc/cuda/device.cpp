#include "cuda/device.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/current.hpp"
#include "cuda/event.hpp"
#include "cuda/lane.hpp"
#include "cuda/memory.hpp"
#include "cuda/order.hpp"
#include "cuda/tables.hpp"
#include "device/copying.hpp"
#include "nccl/communicator.hpp"
#include "nccl/memory.hpp"
#include "nccl/wire.hpp"

namespace xc {
namespace {

DeviceKernels cuda_kernels() {
  DeviceKernels kernels = cuda_element_kernels();
  add_cuda_steps_f32(kernels.rules);
  add_cuda_steps_bf16(kernels.rules);
  add_cuda_steps_f16(kernels.rules);
  add_cuda_rules(kernels.rules);
  return kernels;
}

std::string wanted(const char* variable) {
  const char* const value = std::getenv(variable);
  return value ? value : "";
}

// Collective: does what all ranks do together, each on its GPU; DeviceError on all if one cannot turn to it.
template <class Work>
auto together(const Team& team, int index, Work work) {
  std::optional<Current> current;
  team.agree<DeviceError>(complaint_of([&] { current.emplace(index); }));
  return work();
}

// Collective, of all ranks.
std::shared_ptr<NcclCommunicator> connect_by_nccl(const Team& team, std::vector<int> members) {
  const auto patience = std::chrono::duration_cast<std::chrono::milliseconds>(team.limits().inside_pass);
  return std::make_shared<NcclCommunicator>(
      NcclOptions{.library = wanted("XC_NCCL"),
                  .rank = team.rank(),
                  .size = team.topology().size(),
                  .members = std::move(members),
                  .all_gather = [&team](const std::string& text) { return team.all_gather(text); },
                  .patience = patience});
}

// Collective. Throws the same error on every rank unless all have one of these values of a variable.
std::string agreed_choice(const Team& team, const char* variable, std::initializer_list<const char*> values) {
  const std::string mine = wanted(variable);
  const bool is_known = std::find(values.begin(), values.end(), mine) != values.end();
  team.agree<UsageError>(is_known ? "" : std::string(variable) + " cannot be " + mine + "; see docs/gpu.md");
  const std::vector<std::string> all = team.all_gather(mine);
  if (std::adjacent_find(all.begin(), all.end(), std::not_equal_to<>()) != all.end())
    throw MismatchError(std::string("the ranks have different values of ") + variable);
  return mine;
}

// Memory that NCCL lets peers reach; where it does not, all ranks learn why.
Shared share_by_nccl(Team& team, std::shared_ptr<NcclCommunicator>& communicator, std::size_t bytes) {
  if (team.topology().team_count() > 1)
    throw UsageError("XC_GPU_MEMORY=nccl is for ranks of one team; take ipc between hosts");
  if (!communicator) communicator = connect_by_nccl(team, team.topology().members());
  auto found = NcclMemory::share(communicator, bytes);
  if (const auto* refusal = std::get_if<NcclRefusal>(&found))
    throw DeviceError("NCCL gives no memory that peers reach: " + refusal->reason +
                      "; take XC_GPU_MEMORY=ipc");
  const std::shared_ptr<NcclMemory> memory = std::get<std::unique_ptr<NcclMemory>>(std::move(found));
  team.agree<DeviceError>(complaint_of([&] {  // before a peer writes there
    check(cudaMemset(memory->pointers()[std::size_t(team.place())], 0, bytes), "clearing memory of the GPU");
    check(cudaStreamSynchronize(nullptr), "clearing memory of the GPU");
  }));
  Shared all;
  for (void* const at : memory->pointers())
    all.push_back(std::make_shared<Mapping>(static_cast<std::byte*>(at), bytes, [memory] {}));
  return all;
}

class CudaStorage final : public Storage {
 public:
  CudaStorage(const Device& device, int index, Team& team) : device_(device), index_(index) {
    // Ranks that share a GPU cannot run at the same time, so by default none waits there for another.
    const std::string sync = agreed_choice(team, "XC_GPU_SYNC", {"", "event", "spin", "memop"});
    by_nccl_ = agreed_choice(team, "XC_GPU_MEMORY", {"", "ipc", "nccl"}) == "nccl";
    order_ =
        together(team, index_, [&] { return make_order(team, sync_from(sync.empty() ? "event" : sync)); });
  }

  Shared share(Team& team, std::size_t bytes) override {
    return together(team, index_, [&] {
      return by_nccl_ ? share_by_nccl(team, communicator_, bytes) : share_device_memory(team, bytes);
    });
  }
  std::shared_ptr<std::byte> allocate(std::size_t bytes) override {
    const Current current(index_);
    return allocate_device_memory(bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    const Current current(index_);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream()), "copying");
  }
  void copy_all(std::span<const Copy> copies) override {
    const Current current(index_);
    in_batches(copies, [&](const CopyBatch& batch) { device_.kernels().copy(batch, stream()); });
  }
  void clear(void* at, std::size_t bytes) override {
    const Current current(index_);
    check(cudaMemsetAsync(at, 0, bytes, stream()), "clearing memory of the GPU");
  }
  void finish() override {
    const Current current(index_);
    check(cudaStreamSynchronize(stream()), "waiting for the GPU");
    if (order_) order_->check();
  }
  void mark() override {
    const Current current(index_);
    if (!mark_) mark_ = make_event();
    check(cudaEventRecord(mark_.get(), stream()), "recording an event");
  }
  void await_mark() override {
    check(cudaEventSynchronize(mark_.get()), "waiting for the GPU");
    if (order_) order_->check();
  }
  void announce() override {
    if (!order_) return;
    const Current current(index_);
    order_->announce(stream());
  }
  void follow() override {
    if (!order_) return;
    const Current current(index_);
    order_->follow(stream());
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(device_.stream()); }

  const Device& device_;
  int index_;
  bool by_nccl_ = false;
  std::shared_ptr<NcclCommunicator> communicator_;
  std::unique_ptr<Order> order_;
  Event mark_;
};

// NCCL's transfers, on this GPU, beside the stream in use.
class CudaWire final : public CollectiveWire {
 public:
  CudaWire(const Device& device, int index, std::shared_ptr<NcclCommunicator> communicator)
      : device_(device), index_(index), wire_(std::move(communicator)) {}
  void fork() override {
    const Current current(index_);
    lane_.fork_from(static_cast<cudaStream_t>(device_.stream()));
  }
  void join() override {
    const Current current(index_);
    lane_.join_to(static_cast<cudaStream_t>(device_.stream()));
  }
  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) override {
    const Current current(index_);
    wire_.exchange(sends, receives, lane_.stream());
  }
  void reduce_scatter(float* blocks, std::int64_t elements) override {
    const Current current(index_);
    wire_.reduce_scatter(blocks, elements, lane_.stream());
  }
  void all_gather(float* blocks, std::int64_t elements) override {
    const Current current(index_);
    wire_.all_gather(blocks, elements, lane_.stream());
  }
  void check() override { wire_.check(); }
  void abort(const std::string& reason) override { wire_.abort(reason); }

 private:
  const Device& device_;
  int index_;
  Lane lane_;
  NcclWire wire_;
};

// Every rank on a GPU of its own: NCCL is not made for more.
bool share_a_gpu(const Team& team, int index) {
  cudaDeviceProp it{};
  check(cudaGetDeviceProperties(&it, index), "asking GPU " + std::to_string(index));
  auto all = team.all_gather({it.uuid.bytes, sizeof it.uuid.bytes});
  std::sort(all.begin(), all.end());
  return std::adjacent_find(all.begin(), all.end()) != all.end();
}

// NCCL where each rank has a GPU to itself, unless XC_GPU_WIRE says which.
bool wants_nccl(const Team& team, int index) {
  const std::string name = agreed_choice(team, "XC_GPU_WIRE", {"", "nccl", "mpi"});
  bool shared = true;
  team.agree<DeviceError>(complaint_of([&] { shared = share_a_gpu(team, index); }));
  return name == "nccl" || (name.empty() && !shared);
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    const Current current(index_);
    check(cudaFree(nullptr), "starting GPU " + std::to_string(index));
  }

  Place place() const override { return {2, index_}; }  // DLPack's CUDA
  std::string name() const override { return "cuda:" + std::to_string(index_); }
  const DeviceKernels& kernels() const override {
    static const DeviceKernels kernels = cuda_kernels();
    return kernels;
  }
  std::shared_ptr<Storage> storage(Team& team) override {
    return std::make_shared<CudaStorage>(*this, index_, team);
  }
  std::shared_ptr<std::byte> staging(std::size_t bytes) override {
    const Current current(index_);
    return allocate_mapped_memory(bytes);
  }
  std::unique_ptr<CollectiveWire> wire(Team& team) override {
    if (!wants_nccl(team, index_)) return nullptr;
    return together(team, index_, [&] {
      auto communicator = connect_by_nccl(team, team.topology().rail());
      std::unique_ptr<CollectiveWire> wire;
      team.agree<DeviceError>(
          complaint_of([&] { wire = std::make_unique<CudaWire>(*this, index_, std::move(communicator)); }));
      return wire;
    });
  }
  void launch(KernelFn kernel, const Launch& launch) override {
    const Current current(index_);
    kernel(launch, stream());
  }
  void judge(const Judgement& at) override {
    const Current current(index_);
    kernels().judge(at, stream());
  }
  bool captures() const override {
    const Current current(index_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream()), &status), "asking the stream");
    return status == cudaStreamCaptureStatusActive;
  }

 private:
  int index_;
};

}  // namespace

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::shared_ptr<Device> make_cuda_device(int index) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "looking for GPUs");
  if (index < 0 || index >= count)
    throw DeviceError("there is no GPU " + std::to_string(index) + " among the " + std::to_string(count) +
                      " that this process sees");
  return std::make_shared<CudaDevice>(index);
}

std::string identify_cuda_device(int index) {
  cudaDeviceProp it{};
  check(cudaGetDeviceProperties(&it, index), "asking GPU " + std::to_string(index));
  std::string text = "GPU-";
  for (const char byte : it.uuid.bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    const auto value = static_cast<unsigned char>(byte);
    text += {kDigits[value / 16], kDigits[value % 16]};
  }
  return text;
}

std::string describe_cuda_device(int index) {
  cudaDeviceProp it{};
  check(cudaGetDeviceProperties(&it, index), "asking GPU " + std::to_string(index));
  return std::string(it.name) + ", compute capability " + std::to_string(it.major) + "." +
         std::to_string(it.minor) + ", " + std::to_string(it.totalGlobalMem / 1'000'000) + " MB, " +
         std::to_string(it.multiProcessorCount) + " multiprocessors";
}

}  // namespace xc
