#include "engine/shared_array.hpp"

#include <map>

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
      exchange_(team, memory_, {}, 0) {
  plan_.segments = make_segments(count, team->worker_count(), 1);
  plan_.length = count;
  for (const auto& memory : memory_)
    for (std::size_t v = 0; v < static_cast<std::size_t>(team->workers_per_rank()); ++v)
      arrays_.push_back(memory->data() + control_bytes_ + v * stride_);
  if (dtype_ == DType::f64)
    wide_rails_ = rails_for<double>(exchange_, plan_, {});
  else
    rails_ = rails_for<float>(exchange_, plan_, {});
}

// Of a worker of this team.
std::byte* SharedArray::array_of(int worker) const {
  const Topology& topology = team().topology();
  const int place = topology.place_of(topology.owner(worker));
  return arrays_[static_cast<std::size_t>(place * topology.workers() + worker % topology.workers())];
}

std::shared_ptr<std::byte> SharedArray::view(int v) const {
  return {memory_[static_cast<std::size_t>(team().place())], array_of(team().first_worker() + v)};
}

// What each collective reads for a block and where it puts it.
template <class T>
void SharedArray::walk_blocks(double scale, int root) {
  TileBuffers<T> buffers(kTile, team().worker_count());
  const Run<T> run = whole<T>(dtype_, count_, scale);
  const bool streaming = exceeds_cache(count_ * size_of(dtype_) * team().worker_count());
  const int first = team().first_worker();
  for (int k = first; k < first + team().workers_per_rank(); ++k) {
    std::byte* const own = array_of(k);
    Workers workers{{arrays_.begin(), arrays_.end()}, {}, arrays_};
    if (operation_ == Operation::broadcast) workers.sources = {array_of(root)};
    if (operation_ == Operation::all_gather) workers.sources = {own};
    if (operation_ == Operation::reduce_scatter) workers.targets = {own};
    workers.own = {workers.targets.begin(), workers.targets.end()};
    const Shard<T> shard{block(k).begin, block(k).end, nullptr, {}};
    walk<T>(sum_pass(streaming), workers, std::span(&run, 1), shard, buffers);
  }
}

// The same with several teams. What is gathered waits in `carried`, segment by segment.
template <class T>
void SharedArray::ride(double scale, int root) {
  Rails<T>& rails = this->rails<T>();
  const Topology& topology = team().topology();
  TileBuffers<T> buffers(kTile, topology.worker_count());
  const Run<T> run = whole<T>(dtype_, count_, scale);
  const Workers workers{{arrays_.begin(), arrays_.end()}, {arrays_.begin(), arrays_.end()}, arrays_};
  const std::unique_ptr<std::map<int, std::vector<T>>, KeepAfterFailure> holder(
      new std::map<int, std::vector<T>>);
  std::map<int, std::vector<T>>& carried = *holder;
  for (const int k : topology.carried(topology.rank()))
    carried[k].resize(static_cast<std::size_t>(block(k).count()));
  const auto part = [&](const Slice& slice) {
    return Shard<T>{slice.begin,
                    slice.end,
                    carried[slice.segment].data() + (slice.begin - block(slice.segment).begin),
                    {}};
  };
  const auto walk_part = [&](const Pass& pass, const Workers& of, const Slice& slice, const Kept<T>& kept) {
    walk<T>(pass, of, std::span(&run, 1), part(slice), buffers, kept);
  };
  const auto load = [&](int k, const std::byte* from) {
    const Slice all{k, block(k).begin, block(k).end};
    walk_part(partial_pass(), {{from}, {}, {}}, all, {.mean = part(all).w});
  };
  const typename Rails<T>::Work work = {
      .partial = [&](const Slice& slice, T* to) { walk_part(partial_pass(), workers, slice, {.mean = to}); },
      .settle =
          [&](const Slice& slice, const T* total) {
            walk_part(summing_pass({.received = true}, {}), workers, slice,
                      {.mean = part(slice).w, .received = total});
          },
      .publish = [&](const Slice& slice) { walk_part(publish_pass(), workers, slice, {}); }};
  const std::vector<typename Rails<T>::Array> arrays = {[&](int k) { return carried[k].data(); }};
  const int first = team().first_worker();
  switch (operation_) {
    case Operation::all_reduce:
      return rails.reduce_and_gather(work, arrays);
    case Operation::reduce_scatter:
      rails.reduce({work.partial, work.settle, {}});
      for (int k = first; k < first + topology.workers(); ++k)
        walk_part(publish_pass(), {{}, {array_of(k)}, {array_of(k)}}, {k, block(k).begin, block(k).end}, {});
      return;
    case Operation::all_gather:
      for (int k = first; k < first + topology.workers(); ++k) load(k, array_of(k));
      return rails.gather({.partial = {}, .settle = {}, .publish = work.publish}, arrays);
    default:
      const int from = topology.team_of(topology.owner(root));
      if (from == topology.team())
        for (auto& [k, array] : carried) load(k, array_of(root));
      return rails.gather({.partial = {}, .settle = {}, .publish = work.publish}, arrays, from);
  }
}

template <>
Rails<float>& SharedArray::rails<float>() {
  return *rails_;
}

template <>
Rails<double>& SharedArray::rails<double>() {
  return *wide_rails_;
}

void SharedArray::run(Operation operation, std::uint64_t hash, double scale, int root) {
  operation_ = operation;
  const auto in_type = [&]<class T>(T) {
    return team().wire() ? ride<T>(scale, root) : walk_blocks<T>(scale, root);
  };
  exchange_.collective({operation, ++calls_, hash}, [&](const Exchange::Agreed&) {
    return dtype_ == DType::f64 ? in_type(double()) : in_type(float());
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
