// tap_gemm_grad_weight_sm90 — weight gradient on Hopper's warpgroup products.
// Computes  grad_weight[ci, co, t] = sum over b, i of input[b, ci, i] * grad_output[b, co, s * i + d * t - p]
// Method    as tap_gemm_grad_weight_sm80, but a warpgroup multiplies 64 rows: TG_CHANNELS output channels times
//           64 / TG_CHANNELS taps, read shifted from shared memory into registers, with TG_BN input channels, which lie in
//           shared memory as 16-byte units of 4 positions. Those are rounded once where they lie. Every TG_FLUSH tiles the
//           sums move to the block's partial sum in memory, because the tensor core truncates when it adds to a large sum.
// Refuses   fp32 accuracy, fp64 (see tap_gemm_grad_weight_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "partial_sums_sm90.cuh"
#include "tap_tile.cuh"
#include "wgmma_sm90.cuh"

// Tables of the layer, generated in the prelude. Per tap slice: source offsets of the fixed dimensions, then TG_TAPS
// word offsets (a slice that is not full repeats its first tap; the sum of a repeated tap is dropped by the finish).
__constant__ int tg_slice_offset[] = {TG_SLICE_OFFSET};
__constant__ int tg_tap_word[] = {TG_TAP_WORD};
__constant__ int tg_rows_d[] = {TG_ROWS_D};
__constant__ int tg_rows_h[] = {TG_ROWS_H};
__constant__ int tg_planes_w[] = {TG_PLANES_W};

constexpr int kThreads = 128;
constexpr int kRowWords = TG_NPW * TG_JW;
constexpr int kGradPositions = TG_ND * TG_NH * kRowWords;
constexpr int kInputPositions = TG_TD * TG_TH * TG_TW;
constexpr int kUnitPitch = TG_BN + 1;  // units of 4 positions: an odd pitch spreads them over the banks
constexpr int kInputWords = kInputPositions * kUnitPitch;
constexpr int kGradPitch = TG_GRAD_PITCH;  // = 4 mod 32: 8 channels x 4 positions hit 32 banks, whatever the shift
constexpr int kStageWords = (kInputWords + TG_CHANNELS * kGradPitch + 31) / 32 * 32;
constexpr int kSteps = kInputPositions / 8;
constexpr int kTapRows = 64 / TG_CHANNELS;  // taps side by side in the rows
constexpr int kSets = TG_TAPS / kTapRows;   // sums per thread

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
  extern __shared__ __align__(128) unsigned shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
    load_tile<kThreads, TG_BN, kUnitPitch, kInputPositions, TCONV_CI, true>(
        stage, input, input_volume, block_n * TG_BN, [&](int p) -> long long {
          const int w = q_w + p % TG_TW, row = p / TG_TW, h = q_h + row % TG_TH, d = q_d + row / TG_TH;
          return d < a.input_d && h < a.input_h && w < a.input_w ? ((long long)d * a.input_h + h) * a.input_w + w : -1;
        });
    load_tile<kThreads, TG_CHANNELS, kGradPitch, kGradPositions, TCONV_CO, false>(
        stage + kInputWords, grad, grad_volume, block_m * TG_CHANNELS, [&](int p) -> long long {
          const int row = p / kRowWords, j = p % kRowWords;
          const int d = q_d * TCONV_S0 + offset_d + tg_rows_d[row / TG_NH];
          const int h = q_h * TCONV_S1 + offset_h + tg_rows_h[row % TG_NH];
          const int w = (q_w + j % TG_JW) * TCONV_S2 + tg_planes_w[j / TG_JW];
          const bool inside =
              (unsigned)d < (unsigned)a.grad_d && (unsigned)h < (unsigned)a.grad_h && (unsigned)w < (unsigned)a.grad_w;
          return inside ? ((long long)d * a.grad_h + h) * a.grad_w + w : -1;
        });
  };

  float sum[kSets][TG_BN / 2];
  auto clear = [&]() {
#pragma unroll
    for (int j = 0; j < kSets; ++j)
#pragma unroll
      for (int r = 0; r < TG_BN / 2; ++r) sum[j][r] = 0.f;
  };
  clear();

  // 5 store: the block's partial sum in fragment order: [block][share][set][8 columns][warp][lane][4].
  const int block = ((group * TG_BLOCKS_M + block_m) * TG_BLOCKS_N + block_n) * TG_SLICES + slice;
  float4* const partial = reinterpret_cast<float4*>(a.partial) +
                          ((long long)block * a.shares + share) * (kSets * (TG_BN / 8) * 128) + threadIdx.x;

  // The warp's 16 rows: channels warp_channel .. + 15 of tap set * kTapRows + warp_tap.
  const int warp_channel = warp * 16 % TG_CHANNELS, warp_tap = warp * 16 / TG_CHANNELS;
  int tap_word[kSets];
#pragma unroll
  for (int j = 0; j < kSets; ++j)
    tap_word[j] = tg_tap_word[slice * TG_TAPS + j * kTapRows + warp_tap] + (warp_channel + quad) * kGradPitch + quarter;

  if (tile_begin < tile_end) load(tile_begin, shared);
  copy_async_commit();
  int stage = 0, unflushed = 0;
  bool first = true;
  for (long long tile = tile_begin; tile < tile_end; ++tile, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is visible to all, and all have left the other stage
    if (tile + 1 < tile_end) load(tile + 1, shared + (stage ^ 1) * kStageWords);
    copy_async_commit();
    unsigned* const input = shared + stage * kStageWords;
    const unsigned* const grad = input + kInputWords;
    if (!TG_EXACT) {
      uint4* units = reinterpret_cast<uint4*>(input);
#pragma unroll 4
      for (int u = threadIdx.x; u < kInputPositions / 4 * kUnitPitch; u += kThreads) {
        uint4 unit = units[u];
        unit.x = to_tf32(__uint_as_float(unit.x));
        unit.y = to_tf32(__uint_as_float(unit.y));
        unit.z = to_tf32(__uint_as_float(unit.z));
        unit.w = to_tf32(__uint_as_float(unit.w));
        units[u] = unit;
      }
    }
    fence_shared_for_wgmma();
    __syncthreads();  // rounded units are visible to the tensor core

    // 3 multiply
    unsigned rows[2][kSets][4];
    auto multiply = [&](int step, unsigned (&current)[kSets][4]) {
      const int row = step * 8 / TG_TW;
      const unsigned* grad_row = grad + (row / TG_TH) * (TG_STEP_D * TG_NH * kRowWords) +
                                 (row % TG_TH) * (TG_STEP_H * kRowWords) + step * 8 % TG_TW;
#pragma unroll
      for (int j = 0; j < kSets; ++j) {
        const unsigned* at = grad_row + tap_word[j];
        const unsigned raw[4] = {at[0], at[8 * kGradPitch], at[4], at[8 * kGradPitch + 4]};
#pragma unroll
        for (int r = 0; r < 4; ++r) current[j][r] = TG_EXACT ? raw[r] : to_tf32(__uint_as_float(raw[r]));
      }
      const unsigned long long columns = columns_descriptor(input + step * (8 * kUnitPitch), kUnitPitch * 16);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kSets; ++j) wgmma_step(sum[j], current[j], columns);
      wgmma_commit();
      wgmma_wait<1>();  // the step before has left the other rows
    };
#pragma unroll 1
    for (int step = 0; step < kSteps; step += 2) {
      multiply(step, rows[0]);
      multiply(step + 1, rows[1]);
    }
    wgmma_wait<0>();
    if (++unflushed == TG_FLUSH || tile + 1 == tile_end) {
      flush_sums(partial, sum, first);
      clear();
      first = false;
      unflushed = 0;
    }
  }
  if (first) flush_sums(partial, sum, true);  // no tile: zeros
}
