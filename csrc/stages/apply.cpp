#include <array>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "core/clones.hpp"
#include "rules/all.hpp"
#include "stages/squares.hpp"
#include "stages/tables.hpp"
#include "stages/update.hpp"

// The apply stage and the tables of all rules, derived from the one list.

namespace xc {
namespace {

template <int kMeasure, class R, class T, class... S>
XC_HOST_DEVICE void measured(const R& rule, const T* mean, const T* extra, std::int64_t i, double* term, T& w,
                             S&... s) {
  if constexpr (extra_of<R>() == Extra::spread)
    rule.template measure<kMeasure>(mean[i], extra[i], term, w, s...);
  else
    rule.template measure<kMeasure>(mean[i], term, w, s...);
}

template <class R, class T>
XC_CLONES void apply(const void* scalars, const Elements<T>& at, std::int64_t count) {
  const R rule = *static_cast<const R*>(scalars);
  const T* __restrict mean = at.mean;
  const T* __restrict extra = at.extra;
  T* __restrict w = at.w;
  T* __restrict a = at.slots[0];
  T* __restrict b = at.slots[1];
  T* __restrict c = at.slots[2];
  static_assert(kMaxSlots == 3);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    if constexpr (R::kSlots == 0) update(rule, mean, extra, i, w[i]);
    if constexpr (R::kSlots == 1) update(rule, mean, extra, i, w[i], a[i]);
    if constexpr (R::kSlots == 2) update(rule, mean, extra, i, w[i], a[i], b[i]);
    if constexpr (R::kSlots == 3) update(rule, mean, extra, i, w[i], a[i], b[i], c[i]);
  }
}

template <class R, class T>
XC_CLONES void factor(const void* scalars, const Elements<T>& at, T* __restrict factor, std::int64_t count) {
  const R rule = *static_cast<const R*>(scalars);
  const T* __restrict w = at.w;
  const T* __restrict a = at.slots[0];
  const T* __restrict b = at.slots[1];
  const T* __restrict c = at.slots[2];
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    if constexpr (R::kSlots == 0) factor[i] = rule.factor(w[i]);
    if constexpr (R::kSlots == 1) factor[i] = rule.factor(w[i], a[i]);
    if constexpr (R::kSlots == 2) factor[i] = rule.factor(w[i], a[i], b[i]);
    if constexpr (R::kSlots == 3) factor[i] = rule.factor(w[i], a[i], b[i], c[i]);
  }
}

template <class R>
void prepare(Hyper hyper, std::int64_t updates, void* scalars) {
  new (scalars) R(hyper, updates);
}

template <class R, class T, int kMeasure>
XC_CLONES void measure(const void* scalars, const Elements<T>& at, std::int64_t first, std::int64_t count,
                       double* lanes, const Upcoming& next) {
  const R rule = *static_cast<const R*>(scalars);
  const T* __restrict mean = at.mean;
  const T* __restrict extra = at.extra;
  T* __restrict w = at.w;
  T* __restrict a = at.slots[0];
  T* __restrict b = at.slots[1];
  T* __restrict c = at.slots[2];
  add_terms<R::kSums[kMeasure]>(first, count, lanes, next, [&](std::int64_t i, double* term) XC_INLINE {
    if constexpr (R::kSlots == 0) measured<kMeasure>(rule, mean, extra, i, term, w[i]);
    if constexpr (R::kSlots == 1) measured<kMeasure>(rule, mean, extra, i, term, w[i], a[i]);
    if constexpr (R::kSlots == 2) measured<kMeasure>(rule, mean, extra, i, term, w[i], a[i], b[i]);
    if constexpr (R::kSlots == 3) measured<kMeasure>(rule, mean, extra, i, term, w[i], a[i], b[i], c[i]);
  });
}

template <class R>
void settle(void* scalars, int measure, const double* sums, std::int64_t elements) {
  static_cast<R*>(scalars)->settle(measure, sums, elements);
}

template <class R>
void project(void* scalars, std::span<const TermSums> filters, std::int64_t length,
             std::span<double> coefficients) {
  static_cast<R*>(scalars)->project(filters, length, coefficients);
}

template <class R, class T>
T own_decay(const void* scalars) {
  return static_cast<const R*>(scalars)->own_decay();
}

template <class R, class T, int... kMeasure>
void add_measures(RuleKernel<T>& kernel, std::integer_sequence<int, kMeasure...>) {
  ((kernel.sums[kMeasure] = R::kSums[kMeasure], kernel.measure[kMeasure] = &measure<R, T, kMeasure>), ...);
}

template <class R, class T>
RuleKernel<T> kernel_of() {
  RuleKernel<T> kernel{R::kSlots, &prepare<R>, &apply<R, T>};
  kernel.extra = extra_of<R>();
  if constexpr (kHasFactor<R, T>) kernel.factor = &factor<R, T>;
  if constexpr (Measuring<R>) {
    kernel.measures = R::kMeasures;
    if constexpr (Projecting<R>)
      kernel.project = &project<R>;
    else
      kernel.settle = &settle<R>;
    kernel.measures_touch_state = R::kMeasuresTouchState;
    kernel.needs_gradient = R::kNeedsGradient;
    kernel.revises = Revising<R>;
    kernel.lags = Lagging<R>;
    if constexpr (MeasuringWorkers<R>) kernel.own_decay = &own_decay<R, T>;
    add_measures<R>(kernel, std::make_integer_sequence<int, R::kMeasures>{});
  }
  return kernel;
}

template <class T, class F, unsigned... kMember>
std::vector<RuleKernel<T>> members(std::integer_sequence<unsigned, kMember...>) {
  static_assert((Rule<typename F::template Member<T, kMember>, T> && ...));
  return {kernel_of<typename F::template Member<T, kMember>, T>()...};
}

template <class T, class... F>
std::vector<std::vector<RuleKernel<T>>> kernels(Families<F...>) {
  return {members<T, F>(std::make_integer_sequence<unsigned, F::kMembers>{})...};
}

template <class R>
constexpr int measures_of() {
  if constexpr (Measuring<R>)
    return R::kMeasures;
  else
    return 0;
}

template <class... F>
std::vector<FamilyInfo> infos(Families<F...>) {
  return {FamilyInfo{F::kName, F::kParameters, F::kFlags, F::kSlotNames,
                     measures_of<typename F::template Member<float, 0>>(),
                     Projecting<typename F::template Member<float, 0>>,
                     kHasFactor<typename F::template Member<float, 0>, float>,
                     Revising<typename F::template Member<float, 0>>,
                     extra_of<typename F::template Member<float, 0>>() == Extra::spread, &F::member}...};
}

}  // namespace

const std::vector<FamilyInfo>& families() {
  static const std::vector<FamilyInfo> list = infos(AllFamilies{});
  return list;
}

int family_index(std::string_view name) {
  for (std::size_t i = 0; i < families().size(); ++i)
    if (families()[i].name == name) return static_cast<int>(i);
  return -1;
}

std::string_view instruction_set() { return chosen_clone(); }

template <class T>
const RuleKernel<T>& rule_kernel(int family, unsigned member) {
  static const auto table = kernels<T>(AllFamilies{});
  return table.at(static_cast<std::size_t>(family)).at(member);
}

template const RuleKernel<float>& rule_kernel<float>(int, unsigned);
template const RuleKernel<double>& rule_kernel<double>(int, unsigned);

}  // namespace xc
