// box_gemm_finish — adds the partial sums of box_gemm_grad_weight_sm90 in share order and stores the weight gradient by
// whole lines.
// Computes  grad_weight[ci, co, t] = sum over shares of partial, one rounding to the problem's dtype
// Method    a block takes one fragment of 16 x 8 channels at all taps, which lie far apart in the sums, and puts the taps of
//           a weight side by side in shared memory. Stored as they come, every weight is a sector of its own: 38 us for two
//           million of 16 taps on an H100. Needs output channels in whole fragments.
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "convert.cuh"

constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2, kChunk = kTaps < 32 ? kTaps : 32;
constexpr int kInputs = BW_INPUT_ROWS ? 16 : 8, kOutputs = BW_INPUT_ROWS ? 8 : 16;  // channels of a fragment
constexpr int kColumnGroups = BW_N * BW_COLUMNS / 8;
constexpr unsigned kPerBlock = TG_BLOCK_FLOATS / 4;

extern "C" __global__ void __launch_bounds__(BW_FINISH_THREADS, 1024 / BW_FINISH_THREADS)
    box_gemm_finish(const float4* partial, storage_t* grad_weight, int summands) {
  __shared__ float tile[kInputs * kOutputs][kChunk | 1];
  constexpr int kAllInputs = (TCONV_CI + kInputs - 1) / kInputs, kAllOutputs = TCONV_CO / kOutputs;
  const int co0 = blockIdx.x % kAllOutputs * kOutputs, ci0 = blockIdx.x / kAllOutputs % kAllInputs * kInputs;
  const int group = blockIdx.x / (kAllOutputs * kAllInputs), lane = threadIdx.x % 32;
  wait_for_kernel_before();  // multiplies
#pragma unroll 1
  for (int first = 0; first < kTaps; first += kChunk) {
    const int count = kTaps - first < kChunk ? kTaps - first : kChunk;
#pragma unroll 1
    for (int t = threadIdx.x / 32; t < count; t += BW_FINISH_THREADS / 32) {
      const int outer = (first + t) / BW_FOLD, folded = (first + t) % BW_FOLD * TCONV_CO + co0;
      constexpr int kWidth = BW_INPUT_ROWS ? BW_N : 64;
      const int tap_piece = outer * BW_TAP_PIECES + folded / kWidth, in_piece = folded % kWidth;
      const int row_piece = BW_INPUT_ROWS ? ci0 / 64 : tap_piece, row = BW_INPUT_ROWS ? ci0 % 64 : in_piece;
      const int column_piece = BW_INPUT_ROWS ? tap_piece : ci0 / BW_N, column = BW_INPUT_ROWS ? in_piece : ci0 % BW_N;
      const unsigned block = (group * BW_BLOCKS_M + row_piece / BW_ROWS) * BW_BLOCKS_N + column_piece / BW_COLUMNS;
      const unsigned inner =
          (row_piece % BW_ROWS * kColumnGroups + (column_piece % BW_COLUMNS * BW_N + column) / 8) * 128 +
          row / 16 * 32 + lane;
      const float4* from = partial + static_cast<unsigned long long>(block) * summands * kPerBlock + inner;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int s = 0; s < summands; ++s) {
        const float4 x = from[static_cast<unsigned long long>(s) * kPerBlock];
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      const float element[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int of_row = lane / 4 + r / 2 * 8, of_column = lane % 4 * 2 + r % 2;
        tile[BW_INPUT_ROWS ? of_row * kOutputs + of_column : of_column * kOutputs + of_row][t] = element[r];
      }
    }
    __syncthreads();
    storage_t* const to = grad_weight + ((group * (long long)TCONV_CI + ci0) * TCONV_CO + co0) * kTaps + first;
    for (int i = threadIdx.x; i < kInputs * kOutputs * count; i += BW_FINISH_THREADS) {
      const int t = i % count, weight = i / count, ci = weight / kOutputs, co = weight % kOutputs;
      if (ci0 + ci < TCONV_CI) to[((long long)ci * TCONV_CO + co) * kTaps + t] = narrow<storage_t>(tile[weight][t]);
    }
    __syncthreads();
  }
}
