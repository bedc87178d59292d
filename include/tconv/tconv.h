// tconv.h — run a plan.
//
//   auto p = tconv::parse_problem("2d b1 c32>16 i64x64 t4x4 s2 p1");
//   auto chosen = tconv::plan(p, {}, tconv::cpu_device());
//   tconv::execute(*chosen, {.input = x, .weight = w, .output = y});
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "tconv/plan.h"

#pragma GCC visibility push(default)
namespace tconv {

inline constexpr int kMaxOperands = 16;

// Raw pointers to dense tensors in the problem's layout; the caller owns all of them. Which are read and written
// depends on the direction (problem.h). `output` receives the result of the direction.
struct Tensors {
  const void* input = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  bool weight_channels_last =
      false;  // CUDA: weight lies (in, taps, out / groups), as PyTorch's channels_last weights do
  const void* grad_output = nullptr;
  void* output = nullptr;
  void* grad_bias = nullptr;  // grad_weight: optional, (out_channels) in the problem's dtype
  void* raw = nullptr;        // Epilogue::save: the convolution's result with bias
  void* mean = nullptr;       // Epilogue::save with a norm: fp32 (fp64 for f64) statistics; inputs of grad_epilogue
  void* rstd = nullptr;
  std::array<const void*, kMaxOperands> operands{};
  std::array<void*, kMaxOperands> grad_operands{};  // grad_epilogue; null: not wanted
  void* workspace = nullptr;  // Plan::workspace_bytes, 256-byte aligned; on the CPU may be null (then allocated)
};

// Where to run: a CUDA stream (null: the legacy default stream), or how many CPU threads (0: all cores).
struct Stream {
  void* handle = nullptr;
  int num_threads = 0;
};

// Runs the plan. On CUDA it only enqueues: no synchronisation, no allocation, so it may be captured in a graph.
// The same inputs give the same bits, whatever the thread count. Throws std::runtime_error when a launch fails.
void execute(const Plan& plan, const Tensors& tensors, Stream stream = {});

}  // namespace tconv
#pragma GCC visibility pop
