// gather — every transposed convolution in plain multiply-adds: any channels, groups, taps, strides, layout and dtype.
//
// Computes  forward (result = output, source = input) and grad_input (result = grad_input, source = grad_output).
// Method    Each result is one sum. In lattice coordinates q a result lies at R*q + r (r the phase; R = stride forward, 1
//           backward) and tap t reads the source at Q*q + shift(t) (Q = 1 forward, stride backward). A thread owns
//           TILE_Q lattice positions, all width phases of each and TILE_N result channels in registers; a block has one
//           depth and one height phase, whose taps it stages with their weights in shared memory. Width taps are
//           unrolled, in the order of their shifts, so that an element is read once for all taps that see it; rows of
//           taps are the outer loop, so that addresses and bounds are worked out once for all source channels.
//           With s = 2, k = 3, TILE_Q = 4, TILE_N = 8 one channel takes 96 multiply-adds, 6 broadcast reads of weights
//           and 8 of the source.
//           Contiguous results leave through a buffer of the warp that interleaves the width phases, since stores with
//           stride s touch every sector s times.
//           TCONV_SPLIT_WIDTH (wide kernels, large strides): a width phase per block and one tap at a time.
// Refuses   Dimensions of 2^31 and more.
// Reads as  tables in the prelude (gather.cpp) -> positions -> loop over stages -> store.
// SPDX-License-Identifier: Apache-2.0
#include "epilogue.cuh"

// From gather.cpp: TILE_Q TILE_N WIDTH_PHASES WIDTH_TAPS TCONV_SPLIT_WIDTH kThreads kSum kResult (channels per group)
// kStageRows kStageSum kResultStep[3] kSourceStep[3] kTapStep[3] kShiftStep[3] kFirstTap_<dim>[] kTapCount_<dim>[]
// kFirstShift_<dim>[] kTap[] kTapPhase[] kTapShift[] kShifts kShift[] kFirstOfShift[]

struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
  long long batch;
  long long source_size[3];
  long long result_size[3];
  long long lattice[3];  // positions per dimension, enough for every phase
  int weight_last;
};

constexpr int kWarps = kThreads / 32;
constexpr int kWarpPositions = 32 * TILE_Q;
constexpr int kResultBlocks = (kResult + TILE_N - 1) / TILE_N;
constexpr bool kInterleave = !TCONV_CHANNELS_LAST && WIDTH_PHASES > 1;
constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;

// Registers beside the accumulators, as compiled. Without a number of blocks the compiler aims at more and spills.
constexpr int kAccumulators = TILE_Q * TILE_N * WIDTH_PHASES * static_cast<int>(sizeof(accum_t) / 4);
constexpr int kRegisters = kAccumulators + 28 * TILE_Q + 40;
constexpr int kMinBlocks = kRegisters > 168 ? 2 : kRegisters > 128 ? 3 : kRegisters > 96 ? 4 : 5;

// The buffer of one warp while it stores one channel.
struct Buffer {
  accum_t value[kWarpPositions * WIDTH_PHASES];
  long long element[kWarpPositions];  // of width phase 0, first channel
  int limit[kWarpPositions];          // how many width phases exist
};

struct Position {
  int b;
  int q[3];
  bool exists;
};

// The position `local` behind `start`, which is small: 64-bit divisions are made once, for the block's start.
__device__ __forceinline__ Position position(const Arguments& a, const Position& start, int local) {
  Position at;
  unsigned rest = static_cast<unsigned>(local);
#pragma unroll
  for (int dim = 2; dim >= 0; --dim) {
    const unsigned size = static_cast<unsigned>(a.lattice[dim]);
    rest += static_cast<unsigned>(start.q[dim]);
    at.q[dim] = static_cast<int>(rest % size);
    rest /= size;
  }
  at.b = start.b + static_cast<int>(rest);
  at.exists = at.b < a.batch;
  return at;
}

// All channels of one stage at one row of taps. `from` points at each position's element of the first channel at shift 0;
// bit i of `inside` says whether shift i may be read. `all`: every bit of every position is set.
template <bool all>
__device__ __forceinline__ void add_row(const storage_t* const (&from)[TILE_Q], const unsigned (&inside)[TILE_Q],
                                        long long step, long long channel_step, int channels, const accum_t* weights,
                                        accum_t (&sum)[TILE_Q][WIDTH_PHASES][TILE_N]) {
  long long offset = 0;
#pragma unroll 1
  for (int k = 0; k < channels; ++k, offset += channel_step, weights += WIDTH_TAPS * TILE_N) {
    accum_t x[TILE_Q];
#pragma unroll
    for (int j = 0; j < WIDTH_TAPS; ++j) {
      if (kFirstOfShift[j]) {
#pragma unroll
        for (int u = 0; u < TILE_Q; ++u) {
          x[u] = 0;
          if (all || (inside[u] >> kTapShift[j] & 1)) {
            x[u] = tconv_pre<accum_t>(widen(from[u][offset + kShift[kTapShift[j]] * step]));
          }
        }
      }
      constexpr int kPack = TILE_N * sizeof(accum_t) < 16 ? TILE_N : 16 / static_cast<int>(sizeof(accum_t));
      accum_t w[TILE_N];
#pragma unroll
      for (int n = 0; n < TILE_N; n += kPack) {
        const auto pack = *reinterpret_cast<const Pack<accum_t, kPack>*>(weights + j * TILE_N + n);
#pragma unroll
        for (int i = 0; i < kPack; ++i) w[n + i] = pack.item[i];
      }
#pragma unroll
      for (int u = 0; u < TILE_Q; ++u) {
        // A tap outside contributes nothing, not even zero times an infinite weight.
        if (all || (inside[u] >> kTapShift[j] & 1)) {
#pragma unroll
          for (int n = 0; n < TILE_N; ++n) sum[u][kTapPhase[j]][n] += x[u] * w[n];
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) gather(const Arguments a, const Operands operands) {
  extern __shared__ __align__(16) unsigned char shared[];
  accum_t* weights = reinterpret_cast<accum_t*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  unsigned block = blockIdx.x;
  const int n0 = static_cast<int>(block % kResultBlocks) * TILE_N;
  block /= kResultBlocks;
  const int g = static_cast<int>(block % TCONV_GROUPS);
  block /= TCONV_GROUPS;
  int phase[3] = {0, 0, 0};
#pragma unroll
  for (int dim = TCONV_SPLIT_WIDTH ? 2 : 1; dim >= 0; --dim) {
    phase[dim] = static_cast<int>(block % kResultStep[dim]);
    block /= kResultStep[dim];
  }
  const int counts[3] = {kTapCount_0[phase[0]], kTapCount_1[phase[1]], TCONV_SPLIT_WIDTH ? kTapCount_2[phase[2]] : 1};
  const int rows = counts[0] * counts[1] * counts[2];

  const int sizes[3] = {static_cast<int>(a.source_size[0]), static_cast<int>(a.source_size[1]),
                        static_cast<int>(a.source_size[2])};
  const long long source_volume = a.source_size[0] * a.source_size[1] * a.source_size[2];
  const long long source_sample = source_volume * TCONV_GROUPS * kSum;
  const long long result_volume = a.result_size[0] * a.result_size[1] * a.result_size[2];
#if TCONV_CHANNELS_LAST
  const long long step = static_cast<long long>(TCONV_GROUPS) * kSum, channel_step = 1;
#else
  const long long step = 1, channel_step = source_volume;
#endif

  Position start;
  long long rest = static_cast<long long>(block) * (kWarps * kWarpPositions);
#pragma unroll
  for (int dim = 2; dim >= 0; --dim) {
    start.q[dim] = static_cast<int>(rest % a.lattice[dim]);
    rest /= a.lattice[dim];
  }
  start.b = static_cast<int>(rest);
  Position at[TILE_Q];
#pragma unroll
  for (int u = 0; u < TILE_Q; ++u) {
    at[u] = position(a, start, warp * kWarpPositions + u * 32 + lane);
#pragma unroll
    for (int dim = 0; dim < 3; ++dim) {
      at[u].exists =
          at[u].exists && static_cast<long long>(at[u].q[dim]) * kResultStep[dim] + phase[dim] < a.result_size[dim];
    }
  }

  accum_t sum[TILE_Q][WIDTH_PHASES][TILE_N];
#pragma unroll
  for (int u = 0; u < TILE_Q; ++u)
#pragma unroll
    for (int r = 0; r < WIDTH_PHASES; ++r)
#pragma unroll
      for (int n = 0; n < TILE_N; ++n) sum[u][r][n] = 0;

#pragma unroll 1
  for (int row0 = 0; row0 < rows; row0 += kStageRows) {
    const int stage_rows = rows - row0 < kStageRows ? rows - row0 : kStageRows;
#pragma unroll 1
    for (int k0 = 0; k0 < kSum; k0 += kStageSum) {
      const int stage_sum = kSum - k0 < kStageSum ? kSum - k0 : kStageSum;
      __syncthreads();
      for (int e = threadIdx.x; e < stage_rows * stage_sum * WIDTH_TAPS * TILE_N; e += kThreads) {
        const int n = n0 + e % TILE_N, j = e / TILE_N % WIDTH_TAPS, k = e / (TILE_N * WIDTH_TAPS) % stage_sum;
        int row = row0 + e / (TILE_N * WIDTH_TAPS) / stage_sum;
        const int tap_2 = TCONV_SPLIT_WIDTH ? kFirstTap_2[phase[2]] + row % counts[2] * kTapStep[2] : kTap[j];
        row /= counts[2];
        const int tap_1 = kFirstTap_1[phase[1]] + row % counts[1] * kTapStep[1];
        const int tap_0 = kFirstTap_0[phase[0]] + row / counts[1] * kTapStep[0];
        const long long tap = (static_cast<long long>(tap_0) * TCONV_K1 + tap_1) * TCONV_K2 + tap_2;
#if TCONV_GATHER_FORWARD
        const long long ci = static_cast<long long>(g) * kSum + k0 + k, co = n;
#else
        const long long ci = static_cast<long long>(g) * kResult + n, co = k0 + k;
#endif
        weights[e] = n < kResult ? static_cast<accum_t>(widen(static_cast<const storage_t*>(
                                       a.weight)[weight_element<TCONV_CO, kTaps>(a.weight_last, ci, co, tap)]))
                                 : accum_t(0);
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < stage_rows; ++i) {
        const storage_t* source =
            static_cast<const storage_t*>(a.source) + (static_cast<long long>(g) * kSum + k0) * channel_step;
        int row = row0 + i;
        const int shift_2 = TCONV_SPLIT_WIDTH ? kFirstShift_2[phase[2]] + row % counts[2] * kShiftStep[2] : 0;
        row /= counts[2];
        const int shift_1 = kFirstShift_1[phase[1]] + row % counts[1] * kShiftStep[1];
        const int shift_0 = kFirstShift_0[phase[0]] + row / counts[1] * kShiftStep[0];
        const storage_t* from[TILE_Q];
        unsigned inside[TILE_Q];
        bool all = true, any = false;
#pragma unroll
        for (int u = 0; u < TILE_Q; ++u) {
          const int z = at[u].q[0] * kSourceStep[0] + shift_0, y = at[u].q[1] * kSourceStep[1] + shift_1;
          const int x = at[u].q[2] * kSourceStep[2] + shift_2;
          const bool row_inside = at[u].exists && z >= 0 && z < sizes[0] && y >= 0 && y < sizes[1];
          inside[u] = 0;
#pragma unroll
          for (int shift = 0; shift < kShifts; ++shift) {
            const int column = x + kShift[shift];
            if (row_inside && column >= 0 && column < sizes[2]) inside[u] |= 1u << shift;
          }
          from[u] =
              source + at[u].b * source_sample + ((static_cast<long long>(z) * sizes[1] + y) * sizes[2] + x) * step;
          all = all && inside[u] == ~0u >> (32 - kShifts);
          any = any || inside[u] != 0;
        }
        if (!__any_sync(0xffffffffu, any)) continue;
        const accum_t* row_weights = weights + i * stage_sum * WIDTH_TAPS * TILE_N;
        if (__all_sync(0xffffffffu, all)) {
          add_row<true>(from, inside, step, channel_step, stage_sum, row_weights, sum);
        } else {
          add_row<false>(from, inside, step, channel_step, stage_sum, row_weights, sum);
        }
      }
    }
  }

  const long long channels = static_cast<long long>(TCONV_GROUPS) * kResult;
  const int channel0 = g * kResult + n0;
  output_t* result = static_cast<output_t*>(a.result);
  long long element[TILE_Q];
#pragma unroll
  for (int u = 0; u < TILE_Q; ++u) {
    long long place = 0;
#pragma unroll
    for (int dim = 0; dim < 3; ++dim) {
      place = place * a.result_size[dim] + static_cast<long long>(at[u].q[dim]) * kResultStep[dim] + phase[dim];
    }
#if TCONV_CHANNELS_LAST
    element[u] = (static_cast<long long>(at[u].b) * result_volume + place) * channels + channel0;
#else
    element[u] = (static_cast<long long>(at[u].b) * channels + channel0) * result_volume + place;
#endif
  }
  auto put = [&](long long where, int n, accum_t value) {
    value += tconv_bias(a.bias, channel0 + n);
    result[where] = narrow<output_t>(tconv_epilogue<accum_t>(value, channel0 + n, where, operands));
  };

  if constexpr (kInterleave) {
    constexpr int kWeightBytes = kStageRows * kStageSum * WIDTH_TAPS * TILE_N * static_cast<int>(sizeof(accum_t));
    Buffer& buffer = reinterpret_cast<Buffer*>(shared + (kWeightBytes + 15) / 16 * 16)[warp];
#pragma unroll
    for (int u = 0; u < TILE_Q; ++u) {
      buffer.element[u * 32 + lane] = element[u];
      const long long left = a.result_size[2] - static_cast<long long>(at[u].q[2]) * kResultStep[2];
      buffer.limit[u * 32 + lane] = at[u].exists ? static_cast<int>(left < WIDTH_PHASES ? left : WIDTH_PHASES) : 0;
    }
#pragma unroll
    for (int n = 0; n < TILE_N; ++n) {
      if (n0 + n >= kResult) break;
      __syncwarp();
#pragma unroll
      for (int u = 0; u < TILE_Q; ++u)
#pragma unroll
        for (int r = 0; r < WIDTH_PHASES; ++r) buffer.value[(u * 32 + lane) * WIDTH_PHASES + r] = sum[u][r][n];
      __syncwarp();
#pragma unroll 2
      for (int i = lane; i < kWarpPositions * WIDTH_PHASES; i += 32) {
        const int from = i / WIDTH_PHASES, r = i % WIDTH_PHASES;
        if (r < buffer.limit[from]) put(buffer.element[from] + r + n * result_volume, n, buffer.value[i]);
      }
    }
  } else {
#pragma unroll
    for (int u = 0; u < TILE_Q; ++u) {
      if (!at[u].exists) continue;
#pragma unroll
      for (int r = 0; r < WIDTH_PHASES; ++r) {
        if (static_cast<long long>(at[u].q[2]) * kResultStep[2] + phase[2] + r >= a.result_size[2]) break;
#pragma unroll
        for (int n = 0; n < TILE_N; ++n) {
          if (n0 + n >= kResult) break;
#if TCONV_CHANNELS_LAST
          put(element[u] + r * channels + n, n, sum[u][r][n]);
#else
          put(element[u] + r + n * result_volume, n, sum[u][r][n]);
#endif
        }
      }
    }
  }
}
