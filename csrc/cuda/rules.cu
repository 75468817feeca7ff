#include "cuda/launch.cuh"
#include "cuda/launcher.cuh"
#include "cuda/tables.hpp"
#include "device/copying.hpp"
#include "device/judging.hpp"

namespace xc {
namespace {

// One block: a thread for each lane of the norm, then for each run. Halves of the lanes are added as
// sum_of_lanes does.
__global__ void __launch_bounds__(kNormLanes, kFewestBlocks) judge_squares(const Judgement at) {
  __shared__ double lanes[kNormLanes];
  const int thread = static_cast<int>(threadIdx.x);
  lanes[thread] = lane_of(at.squares, thread);
  __syncthreads();
  for (int width = kNormLanes / 2; width > 0; width /= 2) {
    if (thread < width) lanes[thread] += lanes[thread + width];
    __syncthreads();
  }
  const DeviceVerdict verdict = verdict_on(*at.bounds, lanes[0]);
  for (int run = thread; run < at.bounds->run_count; run += kNormLanes) clip(at, verdict, run);
  if (thread == 0) *at.verdict = verdict;
}

void judge(const Judgement& at, Stream stream) {
  start(&judge_squares, 1, kNormLanes, static_cast<cudaStream_t>(stream), at);
}

__global__ void __launch_bounds__(kCopyThreads) copy_pieces(const __grid_constant__ CopyBatch batch) {
  for (std::int64_t piece = blockIdx.x; piece < pieces_of(batch); piece += gridDim.x)
    copy_piece(batch, piece, static_cast<int>(threadIdx.x));
}

void copy(const CopyBatch& batch, Stream stream) {
  constexpr std::int64_t kMostBlocks = 2048;
  const auto blocks = static_cast<unsigned>(std::min(pieces_of(batch), kMostBlocks));
  if (blocks == 0) return;
  start(&copy_pieces, blocks, kCopyThreads, static_cast<cudaStream_t>(stream), batch);
}

}  // namespace

void add_cuda_rules(RuleTable& rules) { Tables<CudaLauncher>::add_rules(rules); }

DeviceKernels cuda_element_kernels() {
  using Own = Tables<CudaLauncher>;
  return {{Own::element<float>(), Own::element<Bf16>(), Own::element<F16>()},
          &CudaLauncher::launch<TakeBody>,
          &CudaLauncher::launch<ClipBody>,
          &CudaLauncher::sum<MeanSquaresBody>,
          &copy,
          &judge,
          {}};
}

}  // namespace xc
