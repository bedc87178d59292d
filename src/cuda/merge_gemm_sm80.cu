// merge_gemm_sm80 — transposed convolution to few output channels: phases and channels are the columns of one product.
//
// Computes  output[b, co, s*q + r] = epilogue( sum over ci, taps of phase r of input[b, ci, q + shift] * weight[ci, co, tap] )
// Method    With one to three output channels (images, masks, waveforms) a product whose columns are channels is mostly
//           padding, once per phase. Here a column is a phase of all dimensions and a channel, and all columns of a
//           lattice position are summed together: for each shift of the staged tile its input is multiplied with the
//           weights of every phase, zero where a phase has no tap there; blocks of 8 columns without any are left out. For
//           9x9 taps, stride 4 and one channel that is 9 shifts of 16 columns, 56 % of them taps, instead of 81 of 8, an
//           eighth of them used. Blocks stay for many tiles and keep their weights in shared memory as fragments.
// Refuses   Other directions, fp64, pre-activations, more than 64 columns, weights that do not fit beside a tile
// Reads as  1 weights · 2 load · 3 multiply · 4 epilogue and store
// SPDX-License-Identifier: Apache-2.0
#include "row_tile.cuh"

// Tables of the layer, generated in the prelude. Per shift its word in the tile and the blocks of 8 columns that have a tap
// there; per shift and column the tap or -1; per column its channel and phases.
__constant__ int mg_shift_word[] = {MG_SHIFT_WORD};
__constant__ int mg_shift_mask[] = {MG_SHIFT_MASK};
__constant__ short mg_tap[] = {MG_TAP};
__constant__ short mg_column[][4] = {MG_COLUMN};  // channel, phase of depth, height, width

constexpr int kThreads = 32 * RT_WARPS;
constexpr int kFragment = 2 * MG_PARTS;  // words of a lane for one step of 8 words and 8 columns
constexpr int kSteps = RT_WORDS / 8, kAllSteps = MG_CHUNKS * kSteps;
constexpr int kWeightWords = MG_SHIFTS * kAllSteps * MG_NT * 32 * kFragment;

struct MergeGemmArgs {
  const storage_t* input;
  const storage_t* weight;
  const void* bias;
  output_t* output;
  long long input_plane, output_plane;  // positions
  int input_d, input_h, input_w;
  int output_d, output_h, output_w;
  int tiles_d, tiles_h, tiles_w;
  int shares;  // blocks that divide the tiles of a group
  int wide;    // channels_last, 16 bits: words of channels are 4-byte aligned
  int weight_last;
  int pairs;            // neighbouring columns lie side by side in memory, aligned
  long long num_tiles;  // with the batch
  Operands operands;
};

extern "C" __global__ void __launch_bounds__(kThreads, MG_MIN_BLOCKS) merge_gemm(const MergeGemmArgs a) {
  extern __shared__ __align__(16) unsigned shared[];
  unsigned* const weights = shared;
  unsigned* const tile = shared + kWeightWords;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, quarter = lane % 4;
  const int group = blockIdx.x % TCONV_GROUPS, share = blockIdx.x / TCONV_GROUPS;

  // 1 weights: fragments [chunk][shift][step][8 columns][lane][part][2], rounded as they are used.
  for (int i = threadIdx.x; i < MG_SHIFTS * kAllSteps * MG_NT * 64; i += kThreads) {
    const int r = i % 2, to_lane = i / 2 % 32, fragment = i / 64, ni = fragment % MG_NT;
    const int step = fragment / MG_NT % kSteps, shift = fragment / MG_NT / kSteps % MG_SHIFTS;
    const int chunk = fragment / MG_NT / kSteps / MG_SHIFTS, column = ni * 8 + to_lane / 4;
    const int k = ((chunk * kSteps + step) * 8 + r * 4 + to_lane % 4) * kPerWord;
    const int tap = column < MG_COLUMNS ? mg_tap[shift * MG_COLUMNS + column] : -1;
    storage_t value[2] = {storage_t(), storage_t()};
    for (int e = 0; e < kPerWord; ++e) {
      if (tap < 0 || k + e >= TCONV_CI) continue;
      value[e] = a.weight[weight_element<TCONV_CO, TCONV_K0 * TCONV_K1 * TCONV_K2>(
          a.weight_last, group * (long long)TCONV_CI + k + e, mg_column[column][0], tap)];
    }
    write_fragment<MG_PARTS>(weights + (fragment * 32 + to_lane) * kFragment + r, value);
  }

  // Of each of the warp's lines of 16 positions: the lane's first word.
  int line[MG_MT];
#pragma unroll
  for (int mi = 0; mi < MG_MT; ++mi) {
    const int m = (warp * MG_MT + mi) * 16, row = m / RT_TW;
    line[mi] = (row / RT_TH * (RT_STEP_D * RT_NH) + row % RT_TH * RT_STEP_H) * RT_PITCH + m % RT_TW + quad +
               quarter * RT_PLANE;
  }

#pragma unroll 1
  for (long long at = share; at < a.num_tiles; at += a.shares) {
    const long long per_sample = (long long)a.tiles_d * a.tiles_h * a.tiles_w, b = at / per_sample;
    unsigned rest = at % per_sample;
    const int q_w = rest % a.tiles_w * RT_TW;
    rest /= a.tiles_w;
    const int q_h = rest % a.tiles_h * RT_TH, q_d = rest / a.tiles_h * RT_TD;
#if TCONV_CHANNELS_LAST
    const storage_t* input = a.input + b * a.input_plane * (TCONV_CI * TCONV_GROUPS) + group * TCONV_CI;
#else
    const storage_t* input = a.input + (b * TCONV_GROUPS + group) * TCONV_CI * a.input_plane;
#endif
    float acc[MG_MT][MG_NT][4];
#pragma unroll
    for (int mi = 0; mi < MG_MT; ++mi)
#pragma unroll
      for (int ni = 0; ni < MG_NT; ++ni)
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[mi][ni][r] = 0.f;

#pragma unroll 1
    for (int chunk = 0; chunk < MG_CHUNKS; ++chunk) {
      __syncthreads();  // all have left the tile before
      load_tile(tile, {input, a.input_plane, a.input_d, a.input_h, a.input_w, a.wide}, chunk * (RT_WORDS * kPerWord),
                q_d, q_h, q_w + RT_FIRST);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();

      // 3 multiply: a line's words are read and rounded once for all columns.
      const unsigned* fragments = weights + chunk * (MG_SHIFTS * kSteps * MG_NT * 32 * kFragment) + lane * kFragment;
#pragma unroll 1
      for (int shift = 0; shift < MG_SHIFTS; ++shift) {
        const int mask = mg_shift_mask[shift];
        const unsigned* words = tile + mg_shift_word[shift];
#pragma unroll
        for (int step = 0; step < kSteps; ++step, fragments += MG_NT * 32 * kFragment) {
          LineFragments<MG_PARTS> rows[MG_MT];
#pragma unroll
          for (int mi = 0; mi < MG_MT; ++mi) {
            const unsigned* from = words + line[mi] + step * (8 * RT_PLANE);
            rows[mi].set(from[0], from[8], from[4 * RT_PLANE], from[4 * RT_PLANE + 8]);
          }
#pragma unroll
          for (int ni = 0; ni < MG_NT; ++ni) {
            if (MG_NT > 1 && !(mask >> ni & 1)) continue;
            WeightFragments<1, MG_PARTS> columns;
            read_fragment(columns, 0, fragments + ni * (32 * kFragment));
#pragma unroll
            for (int mi = 0; mi < MG_MT; ++mi)
              multiply_line<1, MG_PARTS>(reinterpret_cast<float (&)[1][4]>(acc[mi][ni]), rows[mi], columns);
          }
        }
      }
    }

    // 4 epilogue and store
#pragma unroll
    for (int ni = 0; ni < MG_NT; ++ni) {
      const int column = ni * 8 + quarter * 2;
      if (column >= MG_COLUMNS) continue;
      long long place[2];
      int channel[2], phase[2][3];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = column + e < MG_COLUMNS ? column + e : column;
        channel[e] = group * TCONV_CO + mg_column[c][0];
#pragma unroll
        for (int dim = 0; dim < 3; ++dim) phase[e][dim] = mg_column[c][1 + dim];
        const long long at_phase = ((long long)phase[e][0] * a.output_h + phase[e][1]) * a.output_w + phase[e][2];
        place[e] = TCONV_CHANNELS_LAST ? (b * a.output_plane + at_phase) * (TCONV_CO * TCONV_GROUPS) + channel[e]
                                       : (b * (TCONV_CO * TCONV_GROUPS) + channel[e]) * a.output_plane + at_phase;
      }
#pragma unroll
      for (int mi = 0; mi < MG_MT; ++mi) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = (warp * MG_MT + mi) * 16, row = m / RT_TW;
          const int od = (q_d + row / RT_TH) * TCONV_S0, oh = (q_h + row % RT_TH) * TCONV_S1;
          const int ow = (q_w + m % RT_TW + quad + half * 8) * TCONV_S2;
          const long long position = ((long long)od * a.output_h + oh) * a.output_w + ow;
          output_t value[2];
          bool there[2];
          long long element[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            element[e] = place[e] + position * (TCONV_CHANNELS_LAST ? TCONV_CO * TCONV_GROUPS : 1);
            there[e] = column + e < MG_COLUMNS && od + phase[e][0] < a.output_d && oh + phase[e][1] < a.output_h &&
                       ow + phase[e][2] < a.output_w;
            if (there[e])
              value[e] = narrow<output_t>(tconv_epilogue<float>(
                  acc[mi][ni][2 * half + e] + tconv_bias(a.bias, channel[e]), channel[e], element[e], a.operands));
          }
          if (MG_PAIRS && a.pairs && there[0] && there[1]) {
            store_pack(a.output + element[0], value);
          } else {
            if (there[0]) a.output[element[0]] = value[0];
            if (there[1]) a.output[element[1]] = value[1];
          }
        }
      }
    }
  }
}
