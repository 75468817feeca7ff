#include <array>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "core/clones.hpp"
#include "rules/all.hpp"
#include "stages/tables.hpp"

// The apply stage and the tables of all rules, derived from the one list.

namespace xc {
namespace {

template <class R, class T>
XC_CLONES void apply(const void* scalars, const T* __restrict mean, T* __restrict w, T* const* slots,
                     std::int64_t count) {
  const R rule = *static_cast<const R*>(scalars);
  if constexpr (R::kSlots == 0) {
    for (std::int64_t i = 0; i < count; ++i) rule(mean[i], w[i]);
  } else if constexpr (R::kSlots == 1) {
    T* __restrict first = slots[0];
    for (std::int64_t i = 0; i < count; ++i) rule(mean[i], w[i], first[i]);
  } else {
    T* __restrict first = slots[0];
    T* __restrict second = slots[1];
    for (std::int64_t i = 0; i < count; ++i) rule(mean[i], w[i], first[i], second[i]);
  }
}

template <class R>
void prepare(Hyper hyper, std::int64_t updates, void* scalars) {
  static_assert(std::is_trivially_copyable_v<R>);
  new (scalars) R(hyper, updates);
}

template <class R, class T, int kMeasure>
XC_CLONES void measure(const void* scalars, const T* __restrict mean, T* __restrict w, T* const* slots,
                       T* const* quantities, std::int64_t count) {
  const R rule = *static_cast<const R*>(scalars);
  constexpr int kSums = R::kSums[kMeasure];
  T* __restrict first = slots[0];
  T* __restrict second = slots[1];
  static_assert(kMaxSums == 3);
  T* __restrict out0 = quantities[0];
  T* __restrict out1 = quantities[1];
  T* __restrict out2 = quantities[2];
  for (std::int64_t i = 0; i < count; ++i) {
    T quantity[kMaxSums];
    if constexpr (R::kSlots == 1)
      rule.template measure<kMeasure>(mean[i], w[i], first[i], quantity);
    else
      rule.template measure<kMeasure>(mean[i], w[i], first[i], second[i], quantity);
    out0[i] = quantity[0];
    if constexpr (kSums > 1) out1[i] = quantity[1];
    if constexpr (kSums > 2) out2[i] = quantity[2];
  }
}

template <class R>
void settle(void* scalars, int measure, const double* squares) {
  static_cast<R*>(scalars)->settle(measure, squares);
}

template <class R, class T, int... kMeasure>
void add_measures(RuleKernel<T>& kernel, std::integer_sequence<int, kMeasure...>) {
  ((kernel.sums[kMeasure] = R::kSums[kMeasure], kernel.measure[kMeasure] = &measure<R, T, kMeasure>), ...);
}

template <class R, class T>
RuleKernel<T> kernel_of() {
  RuleKernel<T> kernel{R::kSlots, &prepare<R>, &apply<R, T>};
  if constexpr (Measuring<R>) {
    kernel.measures = R::kMeasures;
    kernel.settle = &settle<R>;
    kernel.measures_touch_state = R::kMeasuresTouchState;
    kernel.needs_gradient = R::kNeedsGradient;
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
  return {FamilyInfo{F::kName, F::kParameters, F::kFlags, F::kSlotNames, F::kExtrapolates,
                     measures_of<typename F::template Member<float, 0>>(), &F::member}...};
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
