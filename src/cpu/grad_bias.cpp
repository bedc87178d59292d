// grad_bias.cpp — the portable half: partition, threads and the last sums.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/grad_bias.h"

#include "cpu/element.h"
#include "cpu/parallel.h"

namespace tconv::cpu {
namespace {

std::int64_t runs_of(const Problem& problem) { return (volume(output_size(problem)) + kBiasRun - 1) / kBiasRun; }

}  // namespace

std::size_t grad_bias_bytes(const Problem& problem) {
  const std::size_t bytes =
      static_cast<std::size_t>(problem.batch * runs_of(problem) * problem.out_channels) * sizeof(double);
  return (bytes + 63) / 64 * 64;
}

void launch_grad_bias(const Problem& problem, const Tensors& tensors, void* workspace, int threads, SumBias sum_bias) {
  GradBiasTask task{problem.dtype,        problem.layout,
                    tensors.grad_output,  problem.batch,
                    problem.out_channels, volume(output_size(problem)),
                    runs_of(problem),     static_cast<double*>(workspace)};
  const std::int64_t rows = problem.batch * task.runs;
  parallel_for(rows * (problem.layout == Layout::contiguous ? problem.out_channels : 1), threads,
               [&](std::int64_t item) { sum_bias(task, item); });
  store_grad_bias(problem, tensors, task.sums, rows);
}

void store_grad_bias(const Problem& problem, const Tensors& tensors, const double* sums, std::int64_t rows) {
  for (std::int64_t c = 0; c < problem.out_channels; ++c) {
    double sum = 0;
    for (std::int64_t row = 0; row < rows; ++row) sum += sums[row * problem.out_channels + c];
    store_element(tensors.grad_bias, problem.dtype, c, sum);
  }
}

}  // namespace tconv::cpu
