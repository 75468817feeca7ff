#include "engine/step.hpp"

#include <algorithm>

#include "core/error.hpp"

// The step with several teams. If nothing has to be known of the whole gradient first, each chunk goes through
// everything at once: its total comes in, the rule is applied, the new weights go out. Otherwise all totals
// come in first and wait; passes over them sum; and the last pass lets the new weights out.

namespace xc {

template <class T>
bool Stepper<T>::must_wait_for_scalars(const Engine::Step& step) const {
  return step.wants_norm() || step.observe == Observe::before || maker_.measures() > 0;
}

// A rule that compares the workers' gradients element by element would need all of them at the owner.
template <class T>
void Stepper<T>::require_rails_suffice() const {
  if (any([](const Run<T>& run) { return run.kernel->extra == Extra::spread; }))
    throw UsageError(
        "this rule compares all workers' gradients element by element, which must lie in one team: use it on "
        "one host, or another rule between hosts");
}

// Null for segments of others.
template <class T>
T* Stepper<T>::total_of(std::size_t k) {
  const std::size_t first = arenas_.first_worker();
  if (total_.empty() || k < first || k >= first + arenas_.own_shards().size()) return nullptr;
  return total_.data() + (plan_.segments[k].begin - arenas_.own_shards().front().begin);
}

template <class T>
T* Stepper<T>::carried_of(std::vector<T>& array, std::size_t k) const {
  return array.empty() ? nullptr : array.data() + places_[k];
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
  walk<T>(partial_pass<T>(), arenas_.workers(), runs_, alone, buffers_, {.mean = to});
}

template <class T>
void Stepper<T>::collect_total() {
  require_rails_suffice();
  const auto own = arenas_.own_shards();
  total_.resize(static_cast<std::size_t>(own.back().end - own.front().begin));
  rails_->reduce({.partial = [this](const Slice& slice, T* to) { add_team(slice, to); },
                  .settle =
                      [this](const Slice& slice, const T* total) {
                        const auto k = static_cast<std::size_t>(slice.segment);
                        std::copy_n(total, slice.count(),
                                    total_of(k) + (slice.begin - plan_.segments[k].begin));
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
  if (of_mean.any()) walk_own(summing_pass<T>(gradient, of_mean), of_mean);
  if (of_workers.any())
    for (const int k : arenas_.carried())
      walk_segment(summing_pass<T>({.needed = false}, of_workers), of_workers, static_cast<std::size_t>(k),
                   arenas_.shards()[static_cast<std::size_t>(k)]);
  share_sums(sums);
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

template <class T>
void Stepper<T>::publish_slice(const Slice& slice) {
  const auto k = static_cast<std::size_t>(slice.segment);
  const std::int64_t offset = slice.begin - plan_.segments[k].begin;
  Kept<T> kept{.filters = &filters_};
  if (!mean_.empty()) kept.mean = carried_of(mean_, k) + offset;
  if (!factor_.empty()) kept.factor = carried_of(factor_, k) + offset;
  walk<T>(publication_pass<T>(streaming_), arenas_.workers(), runs_, part(slice), buffers_, kept);
}

template <class T>
void Stepper<T>::last_pass_over_rails(const Engine::Step& step, Gradient how, Sums sums, const Meet& meet) {
  require_rails_suffice();
  how.received = true;
  const bool by_mean = any([](const Run<T>& run) { return run.extrapolation->by_mean(); });
  const bool by_filter = any([](const Run<T>& run) { return run.extrapolation->per_filter; });
  const bool scaled = maker_.scaled() && any([](const Run<T>& run) { return run.kernel->factor != nullptr; });
  mean_.resize(by_mean ? carried_elements_ : 0);
  factor_.resize(scaled ? carried_elements_ : 0);

  Sums of_mean = sums;
  of_mean.workers = false;
  const Pass<T> pass = apply_pass<T>(how, of_mean, scaled);
  std::vector<Sinks> own;
  for (std::size_t v = 0; v < arenas_.own_shards().size(); ++v)
    own.push_back(sinks(arenas_.first_worker() + v, of_mean));
  const auto settle = [&](const Slice& slice, const T* total) {
    const auto k = static_cast<std::size_t>(slice.segment);
    const std::int64_t offset = slice.begin - plan_.segments[k].begin;
    Kept<T> kept = this->kept(own[k - arenas_.first_worker()]);
    kept.received = total;
    if (by_mean) kept.mean = carried_of(mean_, k) + offset;
    if (!factor_.empty()) kept.factor = carried_of(factor_, k) + offset;
    walk<T>(pass, arenas_.workers(), runs_, part(slice), buffers_, kept);
  };
  std::vector<typename Rails<T>::Array> arrays = {
      [this](int k) { return arenas_.shards()[static_cast<std::size_t>(k)].w; }};
  if (by_mean) arrays.push_back([this](int k) { return carried_of(mean_, static_cast<std::size_t>(k)); });
  if (!factor_.empty())
    arrays.push_back([this](int k) { return carried_of(factor_, static_cast<std::size_t>(k)); });
  const auto partial = [this](const Slice& slice, T* to) { add_team(slice, to); };
  const auto publish = [this](const Slice& slice) { publish_slice(slice); };
  const std::function<void(const Slice&)> later;

  if (must_wait_for_scalars(step)) {
    for (std::size_t v = 0; v < own.size(); ++v) {
      const std::size_t k = arenas_.first_worker() + v;
      const Segment& segment = plan_.segments[k];
      settle({static_cast<int>(k), segment.begin, segment.end}, total_of(k));
    }
    rails_->gather({.partial = {}, .settle = {}, .publish = by_filter ? later : publish}, arrays);
  } else {
    rails_->reduce_and_gather({partial, settle, by_filter ? later : publish}, arrays);
  }
  for (Sinks& sums_of : own) sums_of.finish();
  if (sums.workers) {
    const Sums of_workers{.workers = true};
    for (const int k : arenas_.carried())
      walk_segment(summing_pass<T>({.needed = false}, of_workers), of_workers, static_cast<std::size_t>(k),
                   arenas_.shards()[static_cast<std::size_t>(k)]);
  }
  share_sums(sums);
  if (!by_filter) return;
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
