#include <algorithm>

#include "engine/step.hpp"

// The step with several teams. If nothing has to be known of the whole gradient first, each chunk goes
// through everything at once: its total comes in, the rule is applied, the new weights go out. Otherwise all
// totals come in first and wait; passes over them sum; and the last pass lets the new weights out.

namespace xc {

template <class T>
bool Stepper<T>::must_wait_for_scalars(const Engine::Step& step) const {
  return overlap_ || step.wants_norm() || step.observe == Observe::before || maker_.measures() > 0;
}

// Null for segments of others.
template <class T>
T* Stepper<T>::total_of(std::size_t k) {
  const std::size_t first = arenas_.first_worker();
  T* const total = overlap_ ? overlap_->total() : total_.data();
  if (!total || k < first || k >= first + arenas_.own_shards().size()) return nullptr;
  return total + (plan_.segments[k].begin - arenas_.own_shards().front().begin);
}

template <class T>
T* Stepper<T>::carried_of(const StoredArray<T>& array, std::size_t k) const {
  return array.empty() ? nullptr : array.data() + places_[k];
}

template <class T>
Stepper<T>::~Stepper() {
  if (!rails_ || !rails_->broken()) return;
  new StoredArray<T>(std::move(mean_));
  new StoredArray<T>(std::move(factor_));
}

// A slice as a shard of its own.
template <class T>
Shard<T> Stepper<T>::part(const Slice& slice) const {
  Shard<T> shard = arenas_.shards()[static_cast<std::size_t>(slice.segment)];
  const std::int64_t offset = slice.begin - shard.begin;
  shard.w += offset;
  for (T*& slot : shard.slots)
    if (slot) slot += offset;
  shard.begin = slice.begin;
  shard.end = slice.end;
  return shard;
}

template <class T>
void Stepper<T>::add_team(const Slice& slice, T* to) {
  const Shard<T> alone{slice.begin, slice.end, nullptr, {}};
  walker_.walk(partial_pass(), arenas_.workers(), runs_, alone, {.mean = to});
}

template <class T>
void Stepper<T>::collect_total(const LayerMarks& marks) {
  if (overlap_) return overlap_->complete(marks.stale, marks.present);
  const auto own = arenas_.own_shards();
  total_.resize(storage_, static_cast<std::size_t>(own.back().end - own.front().begin));
  rails_->reduce({.partial = [this](const Slice& slice, T* to) { add_team(slice, to); },
                  .settle =
                      [this](const Slice& slice, const T* total) {
                        const auto k = static_cast<std::size_t>(slice.segment);
                        storage_.copy(total_of(k) + (slice.begin - plan_.segments[k].begin), total,
                                      static_cast<std::size_t>(slice.count()) * sizeof(T));
                      },
                  .publish = {}});
}

// What is summed of all workers' gradients is summed by every team of its own, over all segments.
template <class T>
void Stepper<T>::sum_over_rails(Gradient gradient, Sums sums) {
  gradient.received = true;
  const Sums of_workers{.workers = sums.workers, .own_squares = sums.own_squares};
  Sums of_mean = sums;
  of_mean.workers = of_mean.own_squares = false;
  if (of_mean.any()) walk_own(summing_pass(gradient, of_mean), of_mean);
  if (of_workers.any()) sum_workers(of_workers);
  share_sums(sums);
}

template <class T>
void Stepper<T>::sum_workers(Sums sums) {
  for (const int k : arenas_.carried())
    walk_segment(summing_pass({.needed = false}, sums), sums, static_cast<std::size_t>(k),
                 arenas_.shards()[static_cast<std::size_t>(k)]);
}

// After it and the team's next meeting every rank has the sums of all cells.
template <class T>
void Stepper<T>::share_sums(Sums sums) {
  const auto numbers = [this](int sum) {
    return [this, sum](int k) { return arenas_.sums(static_cast<std::size_t>(k), sum, set_); };
  };
  if (sums.mean) rails_->share(numbers(0));
  if (sums.workers) rails_->add_up(numbers(1));
  if (sums.measure >= 0)
    for (int q = 0; q < kMaxSums; ++q) rails_->share(numbers(kStatistics + q));
}

// What displaces beside each worker's own gradient is known to the owner only, and travels with the weights.
template <class T>
bool Stepper<T>::has_factor() const {
  return maker_.scaled() && any([](const Run<T>& run) { return run.kernel->factor != nullptr; });
}

template <class T>
std::vector<typename Rails<T>::Array> Stepper<T>::make_ready_to_gather() {
  const bool by_mean = any([](const Run<T>& run) { return run.extrapolation->by_mean(); });
  mean_.resize(storage_, by_mean ? carried_elements_ : 0);
  factor_.resize(storage_, has_factor() ? carried_elements_ : 0);
  std::vector<typename Rails<T>::Array> arrays = {
      [this](int k) { return arenas_.shards()[static_cast<std::size_t>(k)].w; }};
  for (const StoredArray<T>* const array : {&mean_, &factor_})
    if (!array->empty())
      arrays.push_back([this, array](int k) { return carried_of(*array, static_cast<std::size_t>(k)); });
  return arrays;
}

// What a pass over a slice leaves behind for those who publish it.
template <class T>
void Stepper<T>::keep_displacement(const Slice& slice, Kept<T>& kept) {
  const auto k = static_cast<std::size_t>(slice.segment);
  const std::int64_t offset = slice.begin - plan_.segments[k].begin;
  if (!mean_.empty()) kept.mean = carried_of(mean_, k) + offset;
  if (!factor_.empty()) kept.factor = carried_of(factor_, k) + offset;
}

template <class T>
void Stepper<T>::publish_slice(const Slice& slice) {
  Kept<T> kept{.filters = &filters_};
  keep_displacement(slice, kept);
  walker_.walk(publication_pass(streaming_), arenas_.workers(), runs_, part(slice), kept);
}

template <class T>
void Stepper<T>::apply_slice(const Pass& pass, const Slice& slice, const T* total, Sinks& sinks) {
  Kept<T> kept = this->kept(sinks);
  kept.received = total;
  keep_displacement(slice, kept);
  walker_.walk(pass, arenas_.workers(), runs_, part(slice), kept);
}

template <class T>
void Stepper<T>::last_pass_over_rails(const Engine::Step& step, Gradient how, Sums sums, const Meet& meet) {
  how.received = true;
  const auto arrays = make_ready_to_gather();
  Sums of_mean = sums;
  of_mean.workers = false;
  const Pass pass = apply_pass(how, of_mean, has_factor());
  const std::size_t first = arenas_.first_worker();
  std::vector<Sinks> own;
  for (std::size_t v = 0; v < arenas_.own_shards().size(); ++v) own.push_back(sinks(first + v, of_mean));
  const auto settle = [&](const Slice& slice, const T* total) {
    apply_slice(pass, slice, total, own[static_cast<std::size_t>(slice.segment) - first]);
  };
  const bool by_filter = any([](const Run<T>& run) { return run.extrapolation->per_filter; });
  std::function<void(const Slice&)> publish;
  if (!by_filter) publish = [this](const Slice& slice) { publish_slice(slice); };

  if (must_wait_for_scalars(step)) {
    for (std::size_t k = first; k < first + own.size(); ++k)
      settle({static_cast<int>(k), plan_.segments[k].begin, plan_.segments[k].end}, total_of(k));
    rails_->gather({.partial = {}, .settle = {}, .publish = publish}, arrays);
  } else {
    const auto partial = [this](const Slice& slice, T* to) { add_team(slice, to); };
    rails_->reduce_and_gather({partial, settle, publish}, arrays);
  }
  for (Sinks& sinks : own) sinks.finish();
  if (sums.workers) sum_workers({.workers = true});
  share_sums(sums);
  if (by_filter) publish_with_filters(meet);
}

// Filters may reach over segments, so their norms wait for all new weights.
template <class T>
void Stepper<T>::publish_with_filters(const Meet& meet) {
  meet(true);
  filters_.forget();
  for (const int k : arenas_.carried()) {
    const Segment& segment = plan_.segments[static_cast<std::size_t>(k)];
    publish_slice({k, segment.begin, segment.end});
  }
}

template <class T>
void Stepper<T>::spread_from(int team) {
  if (!rails_) return;
  rails_->gather({}, {[this](int k) { return arenas_.shards()[static_cast<std::size_t>(k)].w; }}, team);
}

template class Stepper<float>;
template class Stepper<double>;

}  // namespace xc
