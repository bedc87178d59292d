// tap_gemm_grad_weight_sm80 — weight gradient as one tensor-core product per tap over staged tiles of positions.
// Computes  grad_weight[ci, co, t] = sum over b, i of input[b, ci, i] * grad_output[b, co, s * i + d * t - p]
// Method    rows are input channels, columns output channels, the summed index is the input position. A block stages a
//           tile of positions of both tensors as fp32 words (a 16-bit value is exact in TF32) and shifts grad_output by
//           the tap; its taps are a slice of the kernel (TG_TAPS). The tiles are cut into a fixed number of shares, one
//           block each; their partial sums are added in share order by a second kernel, so the bits never change.
// Refuses   fp64 (see tap_gemm_grad_weight_sm80.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "tap_tile.cuh"

// Tables of the layer, generated in the prelude. Per tap slice: source offsets of the fixed dimensions, then TG_TAPS
// word offsets (a slice that is not full repeats its first tap; the sum of a repeated tap is dropped by the finish).
__constant__ int tg_slice_offset[] = {TG_SLICE_OFFSET};
__constant__ int tg_tap_word[] = {TG_TAP_WORD};
__constant__ int tg_rows_d[] = {TG_ROWS_D};
__constant__ int tg_rows_h[] = {TG_ROWS_H};
__constant__ int tg_planes_w[] = {TG_PLANES_W};

constexpr int kThreads = 32 * TG_WARPS_M * TG_WARPS_N * TG_WARPS_K;
constexpr int kRowWords = TG_NPW * TG_JW;
constexpr int kGradPositions = TG_ND * TG_NH * kRowWords;
constexpr int kInputPositions = TG_TD * TG_TH * TG_TW;
constexpr int kInputPitch = TG_INPUT_PITCH;  // = 4 mod 32: 8 channels x 4 positions hit 32 banks, whatever the shift
constexpr int kGradPitch = TG_GRAD_PITCH;
constexpr int kStageWords = TG_BM * kInputPitch + TG_BN * kGradPitch;
constexpr int kMTiles = TG_WM / 16;
constexpr int kNTiles = TG_WN / 8;
constexpr int kSteps = kInputPositions / 8;

struct TapGemmArgs {
  const storage_t* input;
  const storage_t* grad_output;
  float* partial;
  int input_d, input_h, input_w;
  int grad_d, grad_h, grad_w;
  int tiles_d, tiles_h, tiles_w;
  int shares;
  long long num_tiles;
};

extern "C" __global__ void __launch_bounds__(kThreads, TG_MIN_BLOCKS) tap_gemm_grad_weight(const TapGemmArgs a) {
  extern __shared__ __align__(16) unsigned shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % TG_WARPS_M, warp_n = warp / TG_WARPS_M % TG_WARPS_N;
  const int warp_k = warp / (TG_WARPS_M * TG_WARPS_N);
  const int quad = lane / 4, quarter = lane % 4;

  // 1 locate: the blocks that share a tile of positions (slices, channel blocks) are neighbours and meet in L2.
  unsigned index = blockIdx.x;
  const int slice = index % TG_SLICES;
  index /= TG_SLICES;
  const int block_n = index % TG_BLOCKS_N;
  index /= TG_BLOCKS_N;
  const int block_m = index % TG_BLOCKS_M;
  index /= TG_BLOCKS_M;
  const int group = index % TCONV_GROUPS;
  const int share = index / TCONV_GROUPS;
  const int offset_d = tg_slice_offset[2 * slice], offset_h = tg_slice_offset[2 * slice + 1];
  const int* tap_word = tg_tap_word + slice * TG_TAPS;
  const long long input_volume = (long long)a.input_d * a.input_h * a.input_w;
  const long long grad_volume = (long long)a.grad_d * a.grad_h * a.grad_w;
  const long long tile_begin = a.num_tiles * share / a.shares, tile_end = a.num_tiles * (share + 1) / a.shares;

  // 2 load
  auto load = [&](long long tile, unsigned* stage) {
    unsigned rest = tile % ((long long)a.tiles_d * a.tiles_h * a.tiles_w);
    const long long b = tile / ((long long)a.tiles_d * a.tiles_h * a.tiles_w);
    const int q_w = rest % a.tiles_w * TG_TW;
    rest /= a.tiles_w;
    const int q_h = rest % a.tiles_h * TG_TH, q_d = rest / a.tiles_h * TG_TD;
#if TCONV_CHANNELS_LAST
    const storage_t* input = a.input + b * input_volume * (TCONV_CI * TCONV_GROUPS) + group * TCONV_CI;
    const storage_t* grad = a.grad_output + b * grad_volume * (TCONV_CO * TCONV_GROUPS) + group * TCONV_CO;
#else
    const storage_t* input = a.input + (b * TCONV_GROUPS + group) * TCONV_CI * input_volume;
    const storage_t* grad = a.grad_output + (b * TCONV_GROUPS + group) * TCONV_CO * grad_volume;
#endif
    load_tile<kThreads, TG_BM, kInputPitch, kInputPositions, TCONV_CI, false>(
        stage, input, input_volume, block_m * TG_BM, [&](int p) -> long long {
          const int w = q_w + p % TG_TW, row = p / TG_TW, h = q_h + row % TG_TH, d = q_d + row / TG_TH;
          return d < a.input_d && h < a.input_h && w < a.input_w ? ((long long)d * a.input_h + h) * a.input_w + w : -1;
        });
    load_tile<kThreads, TG_BN, kGradPitch, kGradPositions, TCONV_CO, false>(
        stage + TG_BM * kInputPitch, grad, grad_volume, block_n * TG_BN, [&](int p) -> long long {
          const int row = p / kRowWords, j = p % kRowWords;
          const int d = q_d * TCONV_S0 + offset_d + tg_rows_d[row / TG_NH];
          const int h = q_h * TCONV_S1 + offset_h + tg_rows_h[row % TG_NH];
          const int w = (q_w + j % TG_JW) * TCONV_S2 + tg_planes_w[j / TG_JW];
          const bool inside =
              (unsigned)d < (unsigned)a.grad_d && (unsigned)h < (unsigned)a.grad_h && (unsigned)w < (unsigned)a.grad_w;
          return inside ? ((long long)d * a.grad_h + h) * a.grad_w + w : -1;
        });
  };

  float total[TG_TAPS][kMTiles][kNTiles][4];
#pragma unroll
  for (int t = 0; t < TG_TAPS; ++t)
#pragma unroll
    for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
      for (int ni = 0; ni < kNTiles; ++ni)
#pragma unroll
        for (int r = 0; r < 4; ++r) total[t][mi][ni][r] = 0.f;

  if (tile_begin < tile_end) load(tile_begin, shared);
  copy_async_commit();
  int stage = 0;
  for (long long tile = tile_begin; tile < tile_end; ++tile, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is visible to all, and all have left the other stage
    if (tile + 1 < tile_end) load(tile + 1, shared + (stage ^ 1) * kStageWords);
    copy_async_commit();

    // 3 multiply. The tensor core truncates when it adds to a large sum, so a tile is summed from zero and then added
    // in fp32: over 10^6 positions that keeps the error of a plain fp32 sum.
    const unsigned* input = shared + stage * kStageWords + (warp_m * TG_WM + quad) * kInputPitch + quarter;
    const unsigned* grad =
        shared + stage * kStageWords + TG_BM * kInputPitch + (warp_n * TG_WN + quad) * kGradPitch + quarter;
    float sum[TG_TAPS][kMTiles][kNTiles][4];
#pragma unroll
    for (int t = 0; t < TG_TAPS; ++t)
#pragma unroll
      for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
        for (int ni = 0; ni < kNTiles; ++ni)
#pragma unroll
          for (int r = 0; r < 4; ++r) sum[t][mi][ni][r] = 0.f;
#pragma unroll 1
    for (int step = warp_k; step < kSteps; step += TG_WARPS_K) {
      const int row = step * 8 / TG_TW;
      const unsigned* grad_row = grad + (row / TG_TH) * (TG_STEP_D * TG_NH * kRowWords) +
                                 (row % TG_TH) * (TG_STEP_H * kRowWords) + step * 8 % TG_TW;
      unsigned big[kMTiles][4], small[kMTiles][4];
#pragma unroll
      for (int mi = 0; mi < kMTiles; ++mi) {
        const unsigned* at = input + mi * 16 * kInputPitch + step * 8;
        const unsigned raw[4] = {at[0], at[8 * kInputPitch], at[4], at[8 * kInputPitch + 4]};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          big[mi][r] = TG_EXACT ? raw[r] : to_tf32(__uint_as_float(raw[r]));
          if (TG_SPLIT3) small[mi][r] = to_tf32(__uint_as_float(raw[r]) - __uint_as_float(big[mi][r]));
        }
      }
#pragma unroll
      for (int t = 0; t < TG_TAPS; ++t) {
        const unsigned* at = grad_row + tap_word[t];
#pragma unroll
        for (int ni = 0; ni < kNTiles; ++ni) {
          const unsigned raw0 = at[ni * 8 * kGradPitch], raw1 = at[ni * 8 * kGradPitch + 4];
          const unsigned b0 = TG_EXACT ? raw0 : to_tf32(__uint_as_float(raw0));
          const unsigned b1 = TG_EXACT ? raw1 : to_tf32(__uint_as_float(raw1));
          if (TG_SPLIT3) {
            const unsigned s0 = to_tf32(__uint_as_float(raw0) - __uint_as_float(b0));
            const unsigned s1 = to_tf32(__uint_as_float(raw1) - __uint_as_float(b1));
#pragma unroll
            for (int mi = 0; mi < kMTiles; ++mi) {
              multiply_tf32(sum[t][mi][ni], small[mi], b0, b1);
              multiply_tf32(sum[t][mi][ni], big[mi], s0, s1);
            }
          }
#pragma unroll
          for (int mi = 0; mi < kMTiles; ++mi) multiply_tf32(sum[t][mi][ni], big[mi], b0, b1);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TG_TAPS; ++t)
#pragma unroll
      for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
        for (int ni = 0; ni < kNTiles; ++ni)
#pragma unroll
          for (int r = 0; r < 4; ++r) total[t][mi][ni][r] += sum[t][mi][ni][r];
  }

  // 5 store: in fragment order, so that every store is a full line: [block][share][k-warp][tap, mi, ni][warp][lane][4].
  const int block = ((group * TG_BLOCKS_M + block_m) * TG_BLOCKS_N + block_n) * TG_SLICES + slice;
  constexpr int kWarps = TG_WARPS_M * TG_WARPS_N;
  float4* to =
      reinterpret_cast<float4*>(a.partial) +
      (((long long)block * a.shares + share) * TG_WARPS_K + warp_k) * (TG_TAPS * kMTiles * kNTiles * kWarps * 32) +
      (warp_n * TG_WARPS_M + warp_m) * 32 + lane;
#pragma unroll
  for (int t = 0; t < TG_TAPS; ++t)
#pragma unroll
    for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
      for (int ni = 0; ni < kNTiles; ++ni)
        to[((t * kMTiles + mi) * kNTiles + ni) * (kWarps * 32)] =
            make_float4(total[t][mi][ni][0], total[t][mi][ni][1], total[t][mi][ni][2], total[t][mi][ni][3]);
}
