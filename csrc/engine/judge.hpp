#pragma once

#include <span>

#include "engine/passes.hpp"

namespace xc {

// What the norm of a step led to.
struct Verdict {
  double norm = 0;
  bool skipped = false;
};

// Decides by the norm of the mean gradient where the gradient lies: the passes of the step go by what it has
// decided (Pass::judged), and nobody waits to learn it.
template <class T>
class Judge {
 public:
  virtual ~Judge() = default;
  // Before the step's first pass, which leaves the squares of the mean gradient.
  virtual void begin(const Bounds& bounds, std::span<const Run<T>> runs) = 0;
  // After the meeting that follows it: what it comes to, for the runs of the next pass.
  virtual void judge() = 0;
  // Of the last step that was judged; waits for it.
  virtual Verdict verdict() = 0;
};

}  // namespace xc
