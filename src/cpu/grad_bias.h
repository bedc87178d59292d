// grad_bias.h — the gradient of the bias: partial sums over runs of positions, for the kernels of grad_weight.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "tconv/tconv.h"

namespace tconv::cpu {

// The sum over grad_output of each channel. The partition depends on the problem only.
struct GradBiasTask {
  DType dtype;
  Layout layout;
  const void* source;
  std::int64_t batch, channels, positions;
  std::int64_t runs;  // of kBiasRun positions, of each sample
  double* sums;       // [b * runs + run][channel]
};

inline constexpr std::int64_t kBiasRun = 16384;
using SumBias = void (*)(const GradBiasTask&, std::int64_t item);

std::size_t grad_bias_bytes(const Problem& problem);
// workspace: grad_bias_bytes, 64-byte aligned.
void launch_grad_bias(const Problem& problem, const Tensors& tensors, void* workspace, int threads, SumBias sum_bias);
// grad_bias[c] = the sum over rows of sums[row][c], in order.
void store_grad_bias(const Problem& problem, const Tensors& tensors, const double* sums, std::int64_t rows);

}  // namespace tconv::cpu
