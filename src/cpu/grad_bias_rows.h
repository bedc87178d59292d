// grad_bias_rows.h — one run of the bias gradient; for files that are compiled once per target.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/grad_bias.h"
#include "cpu/simd.h"

namespace tconv::cpu {
namespace {

template <class S>
void sum_bias_typed(const GradBiasTask& task, int64_t item) {
  constexpr int64_t kPiece = 2048;
  S line[kPiece + kLanes<S>];
  const int64_t channels = task.channels;
  if (task.layout == Layout::contiguous) {
    const int64_t c = item % channels, row = item / channels;
    const int64_t b = row / task.runs, p0 = row % task.runs * kBiasRun;
    const int64_t p1 = task.positions < p0 + kBiasRun ? task.positions : p0 + kBiasRun;
    double total = 0;
    for (int64_t p = p0; p < p1; p += kPiece) {
      const int64_t n = p1 - p < kPiece ? p1 - p : kPiece;
      load_row(task.source, task.dtype, (b * channels + c) * task.positions + p, n, line);
      Vec<S> sum[4] = {};
      int64_t i = 0;
      for (; i + 4 * kLanes<S> <= n; i += 4 * kLanes<S>)
        for (int j = 0; j < 4; ++j) sum[j] += load(line + i + j * kLanes<S>);
      S rest = 0;
      for (; i < n; ++i) rest += line[i];
      total += static_cast<double>(reduce<S>((sum[0] + sum[1]) + (sum[2] + sum[3]))) + static_cast<double>(rest);
    }
    task.sums[row * channels + c] = total;
    return;
  }
  const int64_t b = item / task.runs, p0 = item % task.runs * kBiasRun;
  const int64_t p1 = task.positions < p0 + kBiasRun ? task.positions : p0 + kBiasRun;
  double* sums = task.sums + item * channels;
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  // Sixteen positions at a time are added in S, then in double.
  S total[kPiece];
  for (int64_t c0 = 0; c0 < channels; c0 += kPiece) {
    const int64_t n = channels - c0 < kPiece ? channels - c0 : kPiece;
    for (int64_t p = p0; p < p1; p += 16) {
      const int64_t end = p1 < p + 16 ? p1 : p + 16;
      for (int64_t c = 0; c < n; ++c) total[c] = 0;
      for (int64_t q = p; q < end; ++q) {
        load_row(task.source, task.dtype, (b * task.positions + q) * channels + c0, n, line);
        for (int64_t c = 0; c < n; ++c) total[c] += line[c];
      }
      for (int64_t c = 0; c < n; ++c) sums[c0 + c] += static_cast<double>(total[c]);
    }
  }
}

void sum_bias(const GradBiasTask& task, int64_t item) {
  task.dtype == DType::f64 ? sum_bias_typed<double>(task, item) : sum_bias_typed<float>(task, item);
}

}  // namespace
}  // namespace tconv::cpu
