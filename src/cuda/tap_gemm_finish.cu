// tap_gemm_finish — adds the partial sums of the tap_gemm_grad_weight kernels in share order and stores the weight gradient.
// Computes  grad_weight[ci, co, t] = sum over shares and k-warps of partial, one rounding to the problem's dtype
// Method    eight lanes per element take every eighth share each, then add up in a fixed tree: reads stay whole lines
//           because neighbouring elements are neighbouring threads of the same eighth
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "convert.cuh"

__constant__ int tg_slice_tap[] = {TG_SLICE_TAP};  // [slice][TG_TAPS] -> packed tap, or -1

extern "C" __global__ void __launch_bounds__(256)
    tap_gemm_finish(const float* partial, storage_t* grad_weight, int summands) {
  // 256 threads: 8 eighths of 32 elements.
  __shared__ float sums[8][33];
  constexpr long long kPerBlock = TG_BLOCK_FLOATS;
  const int eighth = threadIdx.x / 32, lane32 = threadIdx.x % 32;
  const long long element = blockIdx.x * 32ll + lane32;  // kPerBlock is a multiple of 32
  const long long block = element / kPerBlock, inner = element % kPerBlock;
  const float* from = partial + block * summands * kPerBlock + inner;
  float sum = 0.f;
#pragma unroll 4
  for (int s = eighth; s < summands; s += 8) sum += from[s * kPerBlock];
  sums[eighth][lane32] = sum;
  __syncthreads();
  if (eighth != 0) return;
#pragma unroll
  for (int e = 1; e < 8; ++e) sum += sums[e][lane32];

  const int slice = block % TG_SLICES;
  const int block_n = block / TG_SLICES % TG_BLOCKS_N;
  const int block_m = block / TG_SLICES / TG_BLOCKS_N % TG_BLOCKS_M;
  const int group = block / TG_SLICES / TG_BLOCKS_N / TG_BLOCKS_M;
  // Where the kernel that summed keeps this element: fragments of 4 per lane.
  int rest = static_cast<int>(inner);
  const int r = rest % 4;
  rest /= 4;
  const int quad = rest % 32 / 4, quarter = rest % 4;
  rest /= 32;
#if TG_WARPGROUP
  const int warp = rest % 4, n8 = rest / 4 % (TG_BN / 8), set = rest / 4 / (TG_BN / 8);
  const int row = warp * 16 + quad + r / 2 * 8, column = block_n * TG_BN + n8 * 8 + quarter * 2 + r % 2;
#if TG_INPUT_ROWS
  const int t = set % TG_TAPS, ci = block_m * TG_BM + set / TG_TAPS * 64 + row, co = column;
#else
  const int t = set * (64 / TG_CHANNELS) + row / TG_CHANNELS;
  const int co = block_m * TG_CHANNELS + row % TG_CHANNELS, ci = column;
#endif
#else
  const int warp_m = rest % TG_WARPS_M, warp_n = rest / TG_WARPS_M % TG_WARPS_N;
  rest /= TG_WARPS_M * TG_WARPS_N;
  const int ni = rest % (TG_WN / 8), mi = rest / (TG_WN / 8) % (TG_WM / 16), t = rest / ((TG_WN / 8) * (TG_WM / 16));
  const int ci = block_m * TG_BM + warp_m * TG_WM + mi * 16 + quad + r / 2 * 8;
  const int co = block_n * TG_BN + warp_n * TG_WN + ni * 8 + quarter * 2 + r % 2;
#endif
  const int tap = tg_slice_tap[slice * TG_TAPS + t];
  if (ci >= TCONV_CI || co >= TCONV_CO || tap < 0) return;
  grad_weight[((group * (long long)TCONV_CI + ci) * TCONV_CO + co) * TG_NUM_TAPS + tap] = narrow<storage_t>(sum);
}
