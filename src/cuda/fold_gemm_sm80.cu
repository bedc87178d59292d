// fold_gemm_sm80 — input gradient of layers with few output channels a group: taps and channels are one summed index.
//
// Computes  grad_input[b, ci, i] = sum over co, t of grad_output[b, co, s*i + d*t - p] * weight[ci, co, t]
// Method    Where a product of 8 words of channels would be mostly zeros (an image has one to three channels, a group often
//           eight), 8 words are any (channel, tap) pairs instead, so little is multiplied in vain. A block stages the rows
//           of a tile of grad_output as they lie in memory, one plane per word of channels, without sorting columns by
//           residue: with width taps innermost in k, lanes (quad, quarter) of a fragment read the words stride * quad +
//           quarter, which meet in a bank only where they are the same word. Blocks stay for many tiles and keep their
//           weights in shared memory as fragments.
//           Tried: the forward pass in the same way, phase after phase from one staged tile. Its results leave in pieces,
//           stride elements apart, and took 1.7 to 2.5 ms on an H100 for 32 channels in 4 groups, 3x3x3 taps, stride 2
//           (phase_gemm_sm80: 0.78).
// Refuses   Other directions, fp64, weights that do not fit beside a tile (see fold_gemm_sm80.cpp)
// Reads as  1 weights · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "row_tile.cuh"

// Tables of the layer, generated in the prelude. Per word of k: its offset in the tile, the tap (-1: beyond the last, weight
// 0) and the word of channels.
__constant__ int fg_word_offset[] = {FG_WORD_OFFSET};
__constant__ int fg_word_tap[] = {FG_WORD_TAP};
__constant__ int fg_word_channel[] = {FG_WORD_CHANNEL};

constexpr int kThreads = 32 * RT_WARPS;
constexpr int kFragment = 2 * FG_PARTS;  // words of a lane for one step and 8 result channels
constexpr int kWeightWords = FG_STEPS * FG_NT * 32 * kFragment;
constexpr int kGradChannels = TCONV_CO * TCONV_GROUPS, kInputChannels = TCONV_CI * TCONV_GROUPS;

struct FoldGemmArgs {
  const storage_t* grad_output;
  const storage_t* weight;
  storage_t* grad_input;
  long long grad_plane, input_plane;  // positions
  int grad_d, grad_h, grad_w;
  int input_d, input_h, input_w;
  int tiles_d, tiles_h, tiles_w;
  int shares;  // blocks that divide the tiles of a group and column block
  int wide;    // channels_last, 16 bits: words of channels are 4-byte aligned
  int weight_last;
  int pairs;            // two neighbouring results go out together: channels, or (contiguous, 16 bits) positions
  long long num_tiles;  // with the batch
};

extern "C" __global__ void __launch_bounds__(kThreads, FG_MIN_BLOCKS) fold_gemm(const FoldGemmArgs a) {
  extern __shared__ __align__(16) unsigned shared[];
  unsigned* const weights = shared;
  int* const offsets = reinterpret_cast<int*>(shared + kWeightWords);
  unsigned* const tile = shared + kWeightWords + FG_STEPS * 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, quarter = lane % 4;

  unsigned index = blockIdx.x;
  const int column_block = index % FG_NBLOCKS;
  index /= FG_NBLOCKS;
  const int group = index % TCONV_GROUPS;
  const int share = index / TCONV_GROUPS;
  const int n_first = column_block * (FG_NT * 8);

  // 1 weights: fragments [step][8 channels][lane][part][2], rounded as they are used.
  for (int i = threadIdx.x; i < FG_STEPS * FG_NT * 64; i += kThreads) {
    const int r = i % 2, to_lane = i / 2 % 32, fragment = i / 64, ni = fragment % FG_NT, step = fragment / FG_NT;
    const int word = step * 8 + r * 4 + to_lane % 4, n = n_first + ni * 8 + to_lane / 4;
    const int tap = fg_word_tap[word], k = fg_word_channel[word] * kPerWord;
    storage_t value[2] = {storage_t(), storage_t()};
    for (int e = 0; e < kPerWord; ++e) {
      if (tap < 0 || n >= TCONV_CI || k + e >= TCONV_CO) continue;
      value[e] = a.weight[weight_element<TCONV_CO, TCONV_K0 * TCONV_K1 * TCONV_K2>(
          a.weight_last, group * (long long)TCONV_CI + n, k + e, tap)];
    }
    write_fragment<FG_PARTS>(weights + (fragment * 32 + to_lane) * kFragment + r, value);
  }
  for (int i = threadIdx.x; i < FG_STEPS * 8; i += kThreads) offsets[i] = fg_word_offset[i];

  // Of each of the warp's lines of 16 positions: the lane's first word.
  int line[FG_MT];
#pragma unroll
  for (int mi = 0; mi < FG_MT; ++mi) {
    const int m = (warp * FG_MT + mi) * 16, row = m / RT_TW;
    line[mi] = (row / RT_TH * (RT_STEP_D * RT_NH) + row % RT_TH * RT_STEP_H) * RT_PITCH + (m % RT_TW + quad) * TCONV_S2;
  }

#pragma unroll 1
  for (long long at = share; at < a.num_tiles; at += a.shares) {
    const long long per_sample = (long long)a.tiles_d * a.tiles_h * a.tiles_w, b = at / per_sample;
    unsigned rest = at % per_sample;
    const int q_w = rest % a.tiles_w * RT_TW;
    rest /= a.tiles_w;
    const int q_h = rest % a.tiles_h * RT_TH, q_d = rest / a.tiles_h * RT_TD;
#if TCONV_CHANNELS_LAST
    const storage_t* grad = a.grad_output + b * a.grad_plane * kGradChannels + group * TCONV_CO;
#else
    const storage_t* grad = a.grad_output + (b * TCONV_GROUPS + group) * TCONV_CO * a.grad_plane;
#endif
    __syncthreads();  // all have left the tile before
    load_tile(tile, {grad, a.grad_plane, a.grad_d, a.grad_h, a.grad_w, a.wide}, 0, q_d * TCONV_S0, q_h * TCONV_S1,
              q_w * TCONV_S2 + RT_FIRST);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    float acc[FG_MT][FG_NT][4];
#pragma unroll
    for (int mi = 0; mi < FG_MT; ++mi)
#pragma unroll
      for (int ni = 0; ni < FG_NT; ++ni)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[mi][ni][r] = 0.f;

    // 3 multiply
#pragma unroll 1
    for (int step = 0; step < FG_STEPS; ++step) {
      const int first = offsets[step * 8 + quarter], second = offsets[step * 8 + 4 + quarter];
      WeightFragments<FG_NT, FG_PARTS> columns;
#pragma unroll
      for (int ni = 0; ni < FG_NT; ++ni) {
        read_fragment(columns, ni, weights + ((step * FG_NT + ni) * 32 + lane) * kFragment);
      }
#pragma unroll
      for (int mi = 0; mi < FG_MT; ++mi) {
        const unsigned* words = tile + line[mi];
        LineFragments<FG_PARTS> rows;
        rows.set(words[first], words[first + 8 * TCONV_S2], words[second], words[second + 8 * TCONV_S2]);
        multiply_line<FG_NT, FG_PARTS>(acc[mi], rows, columns);
      }
    }

    // 5 store: eight lanes hold neighbouring positions, four lanes pairs of neighbouring channels, so what leaves together
    // are whole sectors of fp32 and halves of them in 16 bits, in either layout. Contiguous, 16 bits: neighbouring lanes
    // trade a channel for a position first, which halves the stores.
    constexpr bool kTrades = !TCONV_CHANNELS_LAST && kPerWord == 2;
    const int odd = quad % 2;
#pragma unroll
    for (int mi = 0; mi < FG_MT; ++mi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = (warp * FG_MT + mi) * 16, row = m / RT_TW;
        const int d = q_d + row / RT_TH, h = q_h + row % RT_TH, w = q_w + m % RT_TW + quad + half * 8;
        const bool there = d < a.input_d && h < a.input_h && w < a.input_w;
        const long long position = ((long long)d * a.input_h + h) * a.input_w + w;
#pragma unroll
        for (int ni = 0; ni < FG_NT; ++ni) {
          const int n = n_first + ni * 8 + quarter * 2, channel = group * TCONV_CI + n;
          const float first = acc[mi][ni][2 * half], second = acc[mi][ni][2 * half + 1];
          if (kTrades && a.pairs) {
            const float other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 4);
            const storage_t two[2] = {narrow<storage_t>(odd ? other : first), narrow<storage_t>(odd ? second : other)};
            if (there && n + odd < TCONV_CI)
              store_pack(a.grad_input + (b * kInputChannels + channel + odd) * a.input_plane + position - odd, two);
            continue;
          }
          if (!there || n >= TCONV_CI) continue;
          const storage_t two[2] = {narrow<storage_t>(first), narrow<storage_t>(second)};
#if TCONV_CHANNELS_LAST
          storage_t* to = a.grad_input + (b * a.input_plane + position) * kInputChannels + channel;
          constexpr long long kNext = 1;
#else
          storage_t* to = a.grad_input + (b * kInputChannels + channel) * a.input_plane + position;
          const long long kNext = a.input_plane;
#endif
          if (TCONV_CHANNELS_LAST && TCONV_CI % 2 == 0 && a.pairs) {
            store_pack(to, two);
          } else {
            to[0] = two[0];
            if (TCONV_CI % 2 == 0 || n + 1 < TCONV_CI) to[kNext] = two[1];
          }
        }
      }
    }
  }
}
