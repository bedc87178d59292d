// tap_gemm_finish — adds the partial sums of the weight-gradient kernels in share order and stores the weight gradient.
// Computes  grad_weight[ci, co, t] = sum over shares and k-warps of partial, one rounding to the problem's dtype
// Method    a thread takes the four sums of a lane's fragment, so that reads are whole lines; up to eight threads share the
//           summands of one fragment (every eighth each) and add up in a fixed tree. With one element a thread and always
//           eight of them, 2 million weights of two summands took 54 us on an H100.
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "convert.cuh"

#if TG_LINES
__constant__ int tg_set_piece[] = {TG_SET_PIECE};  // [slice][set]: which 64 elements of a line
__constant__ int tg_set_tap[] = {TG_SET_TAP};      // [slice][set][residue of the width] -> packed tap, or -1
#elif !TG_BOXES
__constant__ int tg_slice_tap[] = {TG_SLICE_TAP};  // [slice][TG_TAPS] -> packed tap, or -1
#endif

struct Weight {
  int ci, co, tap;  // of the group; tap -1: none
};

// Element r of fragment `rest` of a block of sums.
__device__ __forceinline__ Weight weight_at(unsigned block, int rest, int r) {
  const int quad = rest % 32 / 4, quarter = rest % 4;
  rest /= 32;
#if TG_BOXES
  const int block_n = block % BW_BLOCKS_N, block_m = block / BW_BLOCKS_N % BW_BLOCKS_M;
  const int row = rest % 4 * 16 + quad + r / 2 * 8;
  const int n = rest / 4 % (BW_N * BW_COLUMNS / 8) * 8 + quarter * 2 + r % 2;
  const int row_piece = block_m * BW_ROWS + rest / 4 / (BW_N * BW_COLUMNS / 8);
  const int column_piece = block_n * BW_COLUMNS + n / BW_N, column = n % BW_N;
#if BW_INPUT_ROWS
  const int ci = row_piece * 64 + row, piece = column_piece, channel = piece % BW_TAP_PIECES * BW_N + column;
#else
  const int ci = column_piece * BW_N + column, piece = row_piece, channel = piece % BW_TAP_PIECES * 64 + row;
#endif
  const bool exists = piece < BW_NUM_OUTER * BW_TAP_PIECES && channel < BW_FOLD * TCONV_CO;
  return {ci, channel % TCONV_CO, exists ? piece / BW_TAP_PIECES * BW_FOLD + channel / TCONV_CO : -1};
#else
  const int slice = block % TG_SLICES;
  const int block_n = block / TG_SLICES % TG_BLOCKS_N;
  const int block_m = block / TG_SLICES / TG_BLOCKS_N % TG_BLOCKS_M;
#if TG_LINES
  const int row = rest % 4 * 16 + quad + r / 2 * 8, set = slice * TG_SETS + rest / 4 / (TG_BN / 8);
  const int ci = block_n * TG_BN + rest / 4 % (TG_BN / 8) * 8 + quarter * 2 + r % 2;
  const int element = tg_set_piece[set] * 64 + row, residue = element / TCONV_CO, co = element % TCONV_CO;
  return {ci, co, residue < TCONV_S2 ? tg_set_tap[set * TCONV_S2 + residue] : -1};
#else
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
  return {ci, co, tg_slice_tap[slice * TG_TAPS + t]};
#endif
#endif
}

#if TG_BOXES
#define TG_BLOCKS_OF_GROUP (BW_BLOCKS_N * BW_BLOCKS_M)
#else
#define TG_BLOCKS_OF_GROUP (TG_SLICES * TG_BLOCKS_N * TG_BLOCKS_M)
#endif

// 256 threads: `lanes` (1, 2, 4, 8) for each of 256 / lanes fragments.
extern "C" __global__ void __launch_bounds__(256)
    tap_gemm_finish(const float4* partial, storage_t* grad_weight, int summands, unsigned fragments, int lanes) {
  __shared__ float4 sums[256];
  wait_for_kernel_before();  // multiplies
  constexpr unsigned kPerBlock = TG_BLOCK_FLOATS / 4;
  const unsigned per_thread_block = 256 / lanes, lane = threadIdx.x / per_thread_block;
  const unsigned fragment = blockIdx.x * per_thread_block + threadIdx.x % per_thread_block;
  const unsigned block = fragment / kPerBlock;
  const int inner = fragment % kPerBlock;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (fragment < fragments) {
    const float4* from = partial + (static_cast<unsigned long long>(block) * summands) * kPerBlock + inner;
#pragma unroll 4
    for (int s = lane; s < summands; s += lanes) {
      const float4 x = from[static_cast<unsigned long long>(s) * kPerBlock];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  }
  if (lanes > 1) {
    sums[threadIdx.x] = sum;
    __syncthreads();
  }
  if (lane != 0 || fragment >= fragments) return;
  for (int e = 1; e < lanes; ++e) {
    const float4 x = sums[e * per_thread_block + threadIdx.x];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  const float element[4] = {sum.x, sum.y, sum.z, sum.w};
  const long long group = block / TG_BLOCKS_OF_GROUP;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Weight at = weight_at(block, inner, r);
    if (at.ci < TCONV_CI && at.co < TCONV_CO && at.tap >= 0)
      grad_weight[((group * TCONV_CI + at.ci) * TCONV_CO + at.co) * (TCONV_K0 * TCONV_K1 * TCONV_K2) + at.tap] =
          narrow<storage_t>(element[r]);
  }
}
