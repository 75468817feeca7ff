#include "engine/shared_array.hpp"

#include "core/error.hpp"
#include "core/streaming.hpp"
#include "engine/passes.hpp"

namespace xc {
namespace {

constexpr std::int64_t kTile = 512;
constexpr std::size_t kPage = 4096;

std::size_t round_up(std::size_t value, std::size_t grid) { return (value + grid - 1) / grid * grid; }

void require_same_shape(const Team& team, DType dtype, std::int64_t count) {
  const auto shapes = team.all_gather(std::string(name_of(dtype)) + " array of " + std::to_string(count));
  for (std::size_t r = 1; r < shapes.size(); ++r)
    if (shapes[r] != shapes[0])
      throw MismatchError("the ranks make different arrays: rank 0 a " + shapes[0] + ", rank " +
                          std::to_string(r) + " a " + shapes[r] + " elements");
}

Shared checked_memory(Team& team, DType dtype, std::int64_t count, std::size_t bytes) {
  require_same_shape(team, dtype, count);
  return team.share(bytes);
}

template <class T>
Run<T> whole(DType dtype, std::int64_t count, double scale) {
  Run<T> run{};
  run.end = count;
  run.element_size = size_of(dtype);
  run.scale = T(scale);
  run.reduce = reduce_kernel<T>(dtype);
  run.extrapolation = &kExtrapolations[0];
  run.publish = publish_kernel<T>(dtype, Direction::none, false);
  run.stream = stream_kernel<T>(dtype, Direction::none, false);
  return run;
}

}  // namespace

SharedArray::SharedArray(std::shared_ptr<Team> team, DType dtype, std::int64_t count)
    : dtype_(dtype),
      count_(count),
      control_bytes_(round_up(Exchange::control_bytes(0, 0), kPage)),
      stride_(round_up(static_cast<std::size_t>(count * size_of(dtype)) + kLine, kPage) + 3 * kLine),
      memory_(checked_memory(*team, dtype, count,
                             control_bytes_ + stride_ * static_cast<std::size_t>(team->workers_per_rank()))),
      exchange_(team, memory_, {}, 0),
      blocks_(make_segments(count, team->worker_count(), 1)) {
  for (const auto& memory : memory_)
    for (std::size_t v = 0; v < static_cast<std::size_t>(team->workers_per_rank()); ++v)
      arrays_.push_back(memory->data() + control_bytes_ + v * stride_);
}

std::shared_ptr<std::byte> SharedArray::view(int v) const {
  return {memory_[static_cast<std::size_t>(team().rank())],
          arrays_[static_cast<std::size_t>(team().first_worker() + v)]};
}

// What each collective reads for a block and where it puts it.
template <class T>
void SharedArray::walk_blocks(double scale, int root) {
  TileBuffers<T> buffers(kTile, team().worker_count());
  const Run<T> run = whole<T>(dtype_, count_, scale);
  const bool streaming = exceeds_cache(count_ * size_of(dtype_) * team().worker_count());
  const int first = team().first_worker();
  for (int k = first; k < first + team().workers_per_rank(); ++k) {
    std::byte* const own = arrays_[static_cast<std::size_t>(k)];
    Workers workers{{arrays_.begin(), arrays_.end()}, {}, arrays_};
    if (operation_ == Operation::broadcast) workers.sources = {arrays_[static_cast<std::size_t>(root)]};
    if (operation_ == Operation::all_gather) workers.sources = {own};
    if (operation_ == Operation::reduce_scatter) workers.targets = {own};
    workers.own = {workers.targets.begin(), workers.targets.end()};
    const Shard<T> shard{block(k).begin, block(k).end, nullptr, {}};
    walk<T>(sum_pass<T>(streaming), workers, std::span(&run, 1), shard, buffers);
  }
}

void SharedArray::run(Operation operation, std::uint64_t hash, double scale, int root) {
  operation_ = operation;
  exchange_.collective({operation, ++calls_, hash}, [&](std::span<const Post>) {
    if (dtype_ == DType::f64) return walk_blocks<double>(scale, root);
    walk_blocks<float>(scale, root);
  });
}

void SharedArray::all_reduce(Reduction reduction) {
  run(Operation::all_reduce, std::uint64_t(reduction),
      reduction == Reduction::mean ? 1.0 / team().worker_count() : 1.0, 0);
}

void SharedArray::reduce_scatter(Reduction reduction) {
  run(Operation::reduce_scatter, std::uint64_t(reduction),
      reduction == Reduction::mean ? 1.0 / team().worker_count() : 1.0, 0);
}

void SharedArray::all_gather() { run(Operation::all_gather, 0, 1.0, 0); }

void SharedArray::broadcast(int root_worker) {
  run(Operation::broadcast, std::uint64_t(root_worker), 1.0, root_worker);
}

void SharedArray::complain(Operation operation, const std::string& complaint) {
  exchange_.complain({operation, ++calls_}, complaint);
}

void SharedArray::close() { exchange_.close(); }

}  // namespace xc
