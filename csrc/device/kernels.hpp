#pragma once

#include <array>
#include <vector>

#include "core/dtype.hpp"
#include "device/stream.hpp"
#include "device/views.hpp"

namespace xc {

// A device's kernels, as tables of functions that queue one launch each. Those of a whole step know both the
// element type and the rule; all others know one of the two, so their number is a sum.
//
// How many workers a fused kernel keeps in registers: their gradients are read once. 0 stands for any number,
// which reads them twice.

using KernelFn = void (*)(const Launch& launch, Stream stream);
struct CopyBatch;
using CopyFn = void (*)(const CopyBatch& batch, Stream stream);
using JudgeFn = void (*)(const Judgement& at, Stream stream);

inline constexpr int kUnrolled[] = {1, 2, 4, 8, 0};
inline constexpr int kUnrolledCount = 5;

// The place in the tables for so many workers.
constexpr int unrolled_place(int workers) {
  for (int i = 0; i < kUnrolledCount - 1; ++i)
    if (kUnrolled[i] == workers) return i;
  return kUnrolledCount - 1;
}

struct ElementKernels {
  std::array<KernelFn, kUnrolledCount> reduce;   // mean = scale x the tree sum of the sources
  std::array<KernelFn, kUnrolledCount> squares;  // sum 0: of the mean that reduce makes
  KernelFn worker_squares;                       // sum k: of source k
  KernelFn own_squares;                          // sum k: of source k, with the decay of the weights
  KernelFn publish;                              // targets from w, displaced
};

struct RuleKernels {
  KernelFn step[3][kUnrolledCount] = {};  // by element type: reduce, apply, publish in one
  KernelFn apply = nullptr;               // from mean to w and slots
  KernelFn factor = nullptr;
  KernelFn measure[kMaxMeasures] = {};
  int sums[kMaxMeasures] = {};
};

struct DeviceKernels {
  ElementKernels element[3];
  KernelFn take;          // mean = scale x received
  KernelFn clip;          // mean *= clip
  KernelFn mean_squares;  // sum 0: of the mean
  CopyFn copy;
  JudgeFn judge;                                // from the squares to the verdict, and the runs' clip
  std::vector<std::vector<RuleKernels>> rules;  // by family and member; empty ones where a device has none
};

// The place of a type in the tables; double has none.
constexpr int element_place(DType type) { return type == DType::f32 ? 0 : type == DType::bf16 ? 1 : 2; }

}  // namespace xc
