#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "rules/rule.hpp"

namespace xc {

// The projection of AdamP and SGDP (Heo et al. 2021, arXiv:2006.08217). A normalisation
// behind a filter makes the loss independent of the filter's length, which shows in its gradient g being
// orthogonal to its weights w. Momentum p still lengthens such a filter and so slows its turning; there the
// part of p along w is taken away, p - w (w p) / (|w| + eps)^2, and the decay is reduced.
//
// A layer of n filters of m elements is tried as n vectors first: all of them must have |cos(g, w)| below
// delta / sqrt(m). Failing that, as one vector of nm elements. The cosine is 0 where a norm is zero, and
// nothing is taken away along weights of zero; a cosine that is no number is not below anything.
class Projection {
 public:
  // What is summed, number by number.
  enum Term { weights, gradients, gradient_along, update_along };
  static constexpr int kTerms = 4;

  Projection(double delta, double epsilon) : delta_(delta), epsilon_(epsilon) {}

  template <class T>
  XC_HOST_DEVICE static void terms(T g, T w, T p, double* term) {
    term[weights] = product(w, w);
    term[gradients] = product(g, g);
    term[gradient_along] = product(w, g);
    term[update_along] = product(w, p);
  }

  // Writes each filter's (w p) / (|w| + eps)^2, zeros if nothing is to be projected; returns whether it is.
  bool settle(std::span<const TermSums> filters, std::int64_t length, std::span<double> coefficients) const {
    std::fill(coefficients.begin(), coefficients.end(), 0.0);
    if (filters.empty()) return false;
    if (std::all_of(filters.begin(), filters.end(), [&](const TermSums& f) { return turns(f, length); })) {
      std::transform(filters.begin(), filters.end(), coefficients.begin(),
                     [&](const TermSums& f) { return coefficient(f); });
      return true;
    }
    const TermSums layer = total(filters);
    if (!turns(layer, length * static_cast<std::int64_t>(filters.size()))) return false;
    std::fill(coefficients.begin(), coefficients.end(), coefficient(layer));
    return true;
  }

 private:
  // Whether the gradient is so nearly orthogonal that it can only turn these weights.
  bool turns(const TermSums& sums, std::int64_t length) const {
    return cosine(sums) < delta_ / std::sqrt(static_cast<double>(length));
  }

  double cosine(const TermSums& sums) const {
    if (sums[gradient_along] == 0) return 0.0;
    const double w = std::max(std::sqrt(sums[weights]), epsilon_);
    const double g = std::max(std::sqrt(sums[gradients]), epsilon_);
    return std::abs(sums[gradient_along]) / (w * g);
  }

  double coefficient(const TermSums& sums) const {
    if (sums[weights] == 0) return 0.0;
    const double w = std::sqrt(sums[weights]) + epsilon_;
    return sums[update_along] / (w * w);
  }

  static TermSums total(std::span<const TermSums> filters) {
    TermSums sums{};
    for (const TermSums& filter : filters)
      for (int q = 0; q < kTerms; ++q) sums[q] += filter[q];
    return sums;
  }

  double delta_;
  double epsilon_;
};

}  // namespace xc
