#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "device/bodies.hpp"
#include "device/kernels.hpp"
#include "device/summing.hpp"
#include "rules/all.hpp"

namespace xc {

// The tables of one launcher, derived from the one list of rules. A LAUNCHER has two functions:
// launch<Body>(launch, stream) calls a body for every thread of every cell, and sum<Body>(launch, stream) a
// summing body, and stores what its terms come to.

// Rules that a device has: those whose elements need nothing beside the mean gradient.
template <class R>
inline constexpr bool kOnDevices = extra_of<R>() == Extra::none;

// Rules that come often enough for kernels that keep their gradients in registers.
template <class R>
inline constexpr bool kIsUnrolled = !Measuring<R>;

template <class Launcher>
class Tables {
 public:
  template <class E>
  static ElementKernels element() {
    constexpr auto kPlaces = std::make_integer_sequence<int, kUnrolledCount>{};
    return {reduce<E>(kPlaces), squares<E>(kPlaces), &Launcher::template sum<WorkerSquaresBody<E>>,
            &Launcher::template sum<OwnSquaresBody<E>>, &Launcher::template launch<PublishBody<E>>};
  }

  // The steps of one element type, for all rules; then what is alike for all types.
  template <class E>
  static void add_steps(std::vector<std::vector<RuleKernels>>& all) {
    add<Steps<E>>(all, AllFamilies{});
  }
  static void add_rules(std::vector<std::vector<RuleKernels>>& all) { add<Rules>(all, AllFamilies{}); }

 private:
  template <class E, int... kPlace>
  static std::array<KernelFn, kUnrolledCount> reduce(std::integer_sequence<int, kPlace...>) {
    std::array<KernelFn, kUnrolledCount> table{};
    ((table[kPlace] = &Launcher::template launch<ReduceBody<E, kUnrolled[kPlace]>>), ...);
    return table;
  }

  template <class E, int... kPlace>
  static std::array<KernelFn, kUnrolledCount> squares(std::integer_sequence<int, kPlace...>) {
    std::array<KernelFn, kUnrolledCount> table{};
    ((table[kPlace] = &Launcher::template sum<GradientSquaresBody<E, kUnrolled[kPlace]>>), ...);
    return table;
  }

  template <class Part, class... F>
  static void add(std::vector<std::vector<RuleKernels>>& all, Families<F...>) {
    all.resize(sizeof...(F));
    std::size_t family = 0;
    (add_family<Part, F>(all[family++]), ...);
  }
  template <class Part, class F>
  static void add_family(std::vector<RuleKernels>& members) {
    members.resize(F::kMembers);
    add_members<Part, F>(members, std::make_integer_sequence<unsigned, F::kMembers>{});
  }
  template <class Part, class F, unsigned... kMember>
  static void add_members(std::vector<RuleKernels>& members, std::integer_sequence<unsigned, kMember...>) {
    (Part::template add<typename F::template Member<float, kMember>>(members[kMember]), ...);
  }

  template <class E>
  struct Steps {
    template <class R>
    static void add(RuleKernels& kernels) {
      add_step<E, R>(kernels, std::make_integer_sequence<int, kUnrolledCount>{});
    }
  };
  struct Rules {
    template <class R>
    static void add(RuleKernels& kernels) {
      add_rule<R>(kernels);
    }
  };

  template <class E, class R, int... kPlace>
  static void add_step(RuleKernels& kernels, std::integer_sequence<int, kPlace...>) {
    if constexpr (kOnDevices<R> && kIsUnrolled<R>)
      ((kernels.step[kElement<E>][kPlace] = &Launcher::template launch<StepBody<E, R, kUnrolled[kPlace]>>),
       ...);
    else if constexpr (kOnDevices<R>)
      kernels.step[kElement<E>][kUnrolledCount - 1] = &Launcher::template launch<StepBody<E, R, 0>>;
  }

  template <class R>
  static void add_rule(RuleKernels& kernels) {
    if constexpr (kOnDevices<R>) {
      kernels.apply = &Launcher::template launch<ApplyBody<R>>;
      kernels.factor = &Launcher::template launch<FactorBody<R>>;
      if constexpr (Measuring<R>) add_measures<R>(kernels, std::make_integer_sequence<int, R::kMeasures>{});
    }
  }
  template <class R, int... kMeasure>
  static void add_measures(RuleKernels& kernels, std::integer_sequence<int, kMeasure...>) {
    ((kernels.measure[kMeasure] = &Launcher::template sum<MeasureBody<R, kMeasure>>), ...);
    ((kernels.sums[kMeasure] = R::kSums[kMeasure]), ...);
  }

  template <class E>
  static constexpr int kElement = std::is_same_v<E, float>  ? 0
                                  : std::is_same_v<E, Bf16> ? 1
                                                            : 2;
};

}  // namespace xc
