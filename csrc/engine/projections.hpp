#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/passes.hpp"
#include "engine/plan.hpp"

namespace xc {

// What a rule that projects measures in every filter, and the coefficients that follow from it. Cells are cut
// where filters begin, so a filter's sums are its cells', in flat order, whoever owned them.
template <class T>
class Projections {
 public:
  explicit Projections(const Plan& plan);

  // All sums become zero.
  void clear();
  // Adds a number to one of the sums of the filter that holds the element `at` of a layer.
  void add(std::size_t layer, std::int64_t at, int sum, double number);
  // The coefficients of a run's layer, and its scalars.
  void settle(Run<T>& run);

 private:
  const Plan& plan_;
  std::vector<std::size_t> first_;  // each layer's first filter; then the number of all filters
  std::vector<TermSums> sums_;
  std::vector<double> coefficients_;
};

}  // namespace xc
