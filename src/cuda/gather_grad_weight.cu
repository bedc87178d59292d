// gather_grad_weight — gradients of weight and bias in plain multiply-adds, for every problem.
//
// Computes  grad_weight[ci, co, t] = sum over b, i of input[b, ci, i] * grad_output[b, co, s*i + d*t - p], and grad_bias.
// Method    A block takes TILE_M input channels, TILE_N output channels and TILE_H x TILE_T neighbouring taps of height
//           and width, and walks over its share of all (b, i) with a position per thread; the sums stay in registers.
//           Threads are added by shuffles and through shared memory, shares by a second kernel, both in a fixed order.
// Refuses   Dimensions of 2^31 and more.
// Reads as  one entry per launch: partial sums, their sum, the same two for the bias.
// SPDX-License-Identifier: Apache-2.0
#include "epilogue.cuh"

// From gather_grad_weight.cpp: TILE_M TILE_N TILE_H TILE_T kThreads

struct Arguments {
  const void* input;
  const void* grad_output;
  void* result;
  void* grad_bias;
  accum_t* partial;       // [split][ci][co][t]
  accum_t* bias_partial;  // [co][b][chunk]
  long long batch;
  long long input_size[3];
  long long output_size[3];
  long long splits, share;  // positions are cut into `splits` shares
  long long chunk, chunks;  // of the output's positions, for the bias
};

constexpr int kWarps = kThreads / 32;
constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;
constexpr long long kInputChannels = static_cast<long long>(TCONV_GROUPS) * TCONV_CI;
constexpr long long kOutputChannels = static_cast<long long>(TCONV_GROUPS) * TCONV_CO;
constexpr int kTilesM = TCONV_CI ? (TCONV_CI + TILE_M - 1) / TILE_M : 1;
constexpr int kTilesN = TCONV_CO ? (TCONV_CO + TILE_N - 1) / TILE_N : 1;
constexpr int kTilesH = (TCONV_K1 + TILE_H - 1) / TILE_H;
constexpr int kTilesT = (TCONV_K2 + TILE_T - 1) / TILE_T;

#ifdef TCONV_ENTRY_gather_grad_weight
// About 70 registers beside the sums. Without a number of blocks the compiler aims at more and spills.
constexpr int kSums = TILE_M * TILE_N * TILE_H * TILE_T * static_cast<int>(sizeof(accum_t) / 4);
constexpr int kMinBlocks = kSums > 64 ? 2 : kSums > 48 ? 3 : kSums > 24 ? 4 : 5;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) gather_grad_weight(const Arguments a) {
  unsigned block = blockIdx.x;
  const int t0 = static_cast<int>(block % kTilesT) * TILE_T;
  block /= kTilesT;
  const int n0 = static_cast<int>(block % kTilesN) * TILE_N;
  block /= kTilesN;
  const int m0 = static_cast<int>(block % kTilesM) * TILE_M;
  block /= kTilesM;
  const int h0 = static_cast<int>(block % kTilesH) * TILE_H;
  block /= kTilesH;
  const int tap_0 = static_cast<int>(block % TCONV_K0);
  block /= TCONV_K0;
  const int g = static_cast<int>(block % TCONV_GROUPS);
  const long long split = block / TCONV_GROUPS;

  const long long depth = a.input_size[0], height = a.input_size[1], width = a.input_size[2];
  const long long input_volume = depth * height * width;
  const long long output_volume = a.output_size[0] * a.output_size[1] * a.output_size[2];
#if TCONV_CHANNELS_LAST
  const long long input_step = kInputChannels, output_step = kOutputChannels, input_channel = 1, output_channel = 1;
#else
  const long long input_step = 1, output_step = 1, input_channel = input_volume, output_channel = output_volume;
#endif
  const storage_t* input =
      static_cast<const storage_t*>(a.input) + (static_cast<long long>(g) * TCONV_CI + m0) * input_channel;
  const storage_t* grad =
      static_cast<const storage_t*>(a.grad_output) + (static_cast<long long>(g) * TCONV_CO + n0) * output_channel;

  accum_t sum[TILE_M][TILE_N][TILE_H * TILE_T];
#pragma unroll
  for (int m = 0; m < TILE_M; ++m)
#pragma unroll
    for (int n = 0; n < TILE_N; ++n)
#pragma unroll
      for (int t = 0; t < TILE_H * TILE_T; ++t) sum[m][n][t] = 0;

  // Coordinates advance by kThreads positions a step, with carries instead of divisions.
  const long long begin = split * a.share, total = a.batch * input_volume;
  const long long end = begin + a.share < total ? begin + a.share : total;
  long long rest = begin + threadIdx.x;
  int w = static_cast<int>(rest % width);
  rest /= width;
  int h = static_cast<int>(rest % height);
  rest /= height;
  int d = static_cast<int>(rest % depth);
  long long b = rest / depth;
  const int step_w = static_cast<int>(kThreads % width), step_h = static_cast<int>(kThreads / width % height);
  const int step_d = static_cast<int>(kThreads / width / height % depth),
            step_b = static_cast<int>(kThreads / width / height / depth);

#pragma unroll 1
  for (long long flat = begin + threadIdx.x; flat < end; flat += kThreads) {
    const long long z = static_cast<long long>(d) * TCONV_S0 + tap_0 * TCONV_D0 - TCONV_P0;
    const long long y0 = static_cast<long long>(h) * TCONV_S1 + h0 * TCONV_D1 - TCONV_P1;
    const long long x = static_cast<long long>(w) * TCONV_S2 + t0 * TCONV_D2 - TCONV_P2;
    if (z >= 0 && z < a.output_size[0]) {
      const long long place = flat - b * input_volume;
      const storage_t* from_input = input + b * input_volume * kInputChannels + place * input_step;
      const storage_t* from_grad = grad + b * output_volume * kOutputChannels +
                                   ((z * a.output_size[1] + y0) * a.output_size[2] + x) * output_step;
      accum_t value[TILE_M];
#pragma unroll
      for (int m = 0; m < TILE_M; ++m) {
        value[m] = 0;
        if (m0 + m < TCONV_CI) value[m] = tconv_pre<accum_t>(widen(from_input[m * input_channel]));
      }
      // One row of taps; `all`: each of them lies inside, which leaves no branch between the reads.
      auto add_row = [&](int row, const storage_t* from, bool all) {
#pragma unroll
        for (int t = 0; t < TILE_T; ++t) {
          const long long column = x + t * TCONV_D2;
          if (all || (t0 + t < TCONV_K2 && column >= 0 && column < a.output_size[2])) {
#pragma unroll
            for (int n = 0; n < TILE_N; ++n) {
              if (n0 + n < TCONV_CO) {
                const accum_t v = widen(from[t * TCONV_D2 * output_step + n * output_channel]);
#pragma unroll
                for (int m = 0; m < TILE_M; ++m) sum[m][n][row * TILE_T + t] += value[m] * v;
              }
            }
          }
        }
      };
      const bool all = t0 + TILE_T <= TCONV_K2 && x >= 0 && x + (TILE_T - 1) * TCONV_D2 < a.output_size[2];
#pragma unroll
      for (int row = 0; row < TILE_H; ++row) {
        const long long y = y0 + row * TCONV_D1;
        if (h0 + row < TCONV_K1 && y >= 0 && y < a.output_size[1]) {
          const storage_t* from = from_grad + row * TCONV_D1 * a.output_size[2] * output_step;
          if (all) {
            add_row(row, from, true);
          } else {
            add_row(row, from, false);
          }
        }
      }
    }
    w += step_w;
    const int carry_w = w >= width;
    w -= carry_w ? static_cast<int>(width) : 0;
    h += step_h + carry_w;
    const int carry_h = h >= height;
    h -= carry_h ? static_cast<int>(height) : 0;
    d += step_d + carry_h;
    const int carry_d = d >= depth;
    d -= carry_d ? static_cast<int>(depth) : 0;
    b += step_b + carry_d;
  }

  __shared__ accum_t stage[kWarps][TILE_M * TILE_N * TILE_H * TILE_T];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < TILE_M; ++m)
#pragma unroll
    for (int n = 0; n < TILE_N; ++n)
#pragma unroll
      for (int t = 0; t < TILE_H * TILE_T; ++t) {
        accum_t value = sum[m][n][t];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
        if (lane == 0) stage[warp][(m * TILE_N + n) * TILE_H * TILE_T + t] = value;
      }
  __syncthreads();
  for (int i = threadIdx.x; i < TILE_M * TILE_N * TILE_H * TILE_T; i += kThreads) {
    const int t = t0 + i % TILE_T, tap_1 = h0 + i / TILE_T % TILE_H;
    const int n = n0 + i / (TILE_T * TILE_H) % TILE_N, m = m0 + i / (TILE_T * TILE_H * TILE_N);
    if (t >= TCONV_K2 || tap_1 >= TCONV_K1 || n >= TCONV_CO || m >= TCONV_CI) continue;
    accum_t value = stage[0][i];
    for (int other = 1; other < kWarps; ++other) value += stage[other][i];
    const long long tap = (static_cast<long long>(tap_0) * TCONV_K1 + tap_1) * TCONV_K2 + t;
    const long long pair = (static_cast<long long>(g) * TCONV_CI + m) * TCONV_CO + n;
    a.partial[(split * kInputChannels * TCONV_CO + pair) * kTaps + tap] = value;
  }
}
#endif

#ifdef TCONV_ENTRY_gather_sum_weight
extern "C" __global__ void __launch_bounds__(kThreads) gather_sum_weight(const Arguments a) {
  constexpr long long kCount = kInputChannels * TCONV_CO * kTaps;
  const long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= kCount) return;
  accum_t sum = 0;
#pragma unroll 8
  for (long long split = 0; split < a.splits; ++split) sum += a.partial[split * kCount + i];
  static_cast<storage_t*>(a.result)[i] = narrow<storage_t>(sum);
}
#endif

#ifdef TCONV_ENTRY_gather_bias
// contiguous: a block per (channel, b, chunk of positions). channels_last: a thread per channel, rows in turn.
extern "C" __global__ void __launch_bounds__(kThreads) gather_bias(const Arguments a) {
  const long long volume = a.output_size[0] * a.output_size[1] * a.output_size[2];
  const storage_t* grad = static_cast<const storage_t*>(a.grad_output);
  unsigned block = blockIdx.x;
  const long long chunk = block % static_cast<unsigned>(a.chunks);
  block /= static_cast<unsigned>(a.chunks);
  const long long begin = chunk * a.chunk, end = begin + a.chunk < volume ? begin + a.chunk : volume;
  __shared__ accum_t stage[kThreads];
  accum_t sum = 0;
#if TCONV_CHANNELS_LAST
  constexpr int kTiles = static_cast<int>((kOutputChannels + kThreads - 1) / kThreads);
  const int tile = static_cast<int>(block % kTiles) * kThreads;
  const long long b = block / kTiles;
  const int columns = static_cast<int>(kOutputChannels - tile < kThreads ? kOutputChannels - tile : kThreads);
  const int lanes = kThreads / columns, lane = threadIdx.x / columns, channel = tile + threadIdx.x % columns;
  if (lane < lanes) {
#pragma unroll 8
    for (long long i = begin + lane; i < end; i += lanes)
      sum += widen(grad[(b * volume + i) * kOutputChannels + channel]);
  }
  stage[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0) {
    for (int other = 1; other < lanes; ++other) sum += stage[threadIdx.x + other * columns];
    a.bias_partial[(channel * a.batch + b) * a.chunks + chunk] = sum;
  }
#else
  const long long b = block / kOutputChannels, channel = block % kOutputChannels;
#pragma unroll 8
  for (long long i = begin + threadIdx.x; i < end; i += kThreads)
    sum += widen(grad[static_cast<long long>(block) * volume + i]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) stage[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += stage[warp];
    a.bias_partial[(channel * a.batch + b) * a.chunks + chunk] = sum;
  }
#endif
}
#endif

#ifdef TCONV_ENTRY_gather_sum_bias
// A warp per channel.
extern "C" __global__ void __launch_bounds__(kThreads) gather_sum_bias(const Arguments a) {
  const long long channel = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32, count = a.batch * a.chunks;
  if (channel >= kOutputChannels) return;
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (long long i = lane; i < count; i += 32) sum += a.bias_partial[channel * count + i];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (lane == 0) static_cast<storage_t*>(a.grad_bias)[channel] = narrow<storage_t>(static_cast<accum_t>(sum));
}
#endif
