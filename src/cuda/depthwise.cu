// depthwise — one input channel per group: forward and grad_input, bound by memory.
//
// Computes  forward (result = output, source = input) and grad_input (result = grad_input, source = grad_output) for
//           groups = in_channels and at most 4 output channels per group.
// Method    With one source channel nothing is gained by sharing inputs between threads through shared memory; what counts
//           is how often an element is read and how full the lines are that leave. A thread owns QUEUE lattice rows of one
//           lattice column with all phases of the three dimensions, and takes each source element that these see once
//           from L1: for s = 2, k = 4 in two dimensions 18 reads for 16 results, for s = 2, k = 5 in three 54 for 32.
//           The multiply-adds are written out by depthwise.cpp, one slice of depth shifts at a time, so that a slice's
//           weights fit into registers. Contiguous: lanes along the width, width phases stored together, as one
//           access where rows are aligned for it, otherwise interleaved through a buffer of the warp. channels_last:
//           lanes along the channels, whole lines without more ado.
// Refuses   Groups of more than one input channel, too many phases or taps for registers.
// Reads as  add_taps (in the prelude) -> place -> weights -> taps -> store.
// SPDX-License-Identifier: Apache-2.0
#include "epilogue.cuh"

// From depthwise.cpp: QUEUE kThreads kChannelTile (1: contiguous) kResultChannels kSourceChannels kTaps kPhases[3]
// kResultStep[3] kSourceStep[3] kSums kSliceWeights kSlotTap[] and add_taps.

struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
  long long batch;
  long long source_size[3];
  long long result_size[3];
  long long lattice[3];  // positions; of height, groups of QUEUE
  long long packed;      // width phases may be stored as one access
  int weight_last;
};

constexpr int kWarps = kThreads / 32;
// Registers for the sums, a slice's weights and a row of elements. Without a number of blocks the compiler aims at more
// and spills.
constexpr int kMinBlocks = kSums * static_cast<int>(sizeof(accum_t) / 4) + kSliceWeights > 24 ? 3 : 4;

struct Buffer {
  accum_t value[32 * kPhases[2]];
  long long element[32];      // of the lane's first result
  int rows[32], columns[32];  // how many rows and columns from there exist
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    depthwise(const Arguments a, const Operands operands) {
  __shared__ __align__(16) accum_t weights[kResultChannels * kSourceChannels * kTaps * kChannelTile];
  __shared__ int unusual;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  // Where: the block's channels, sample and depth; the thread's height and width.
  const unsigned places = static_cast<unsigned>(a.lattice[1] * a.lattice[2]);
  unsigned block = blockIdx.x;
#if TCONV_CHANNELS_LAST
  constexpr unsigned kChannelTiles = (TCONV_GROUPS + kChannelTile - 1) / kChannelTile;
  constexpr unsigned kPlaces = kThreads / kChannelTile;
  const int channel0 = static_cast<int>(block % kChannelTiles) * kChannelTile;
  block /= kChannelTiles;
  const unsigned tiles = (places + kPlaces - 1) / kPlaces;
  const unsigned place = block % tiles * kPlaces + thread / kChannelTile;
  block /= tiles;
  const int q_0 = static_cast<int>(block % static_cast<unsigned>(a.lattice[0]));
  const int b = static_cast<int>(block / static_cast<unsigned>(a.lattice[0]));
  const int local = thread % kChannelTile, channel = channel0 + local;
  const bool exists = thread / kChannelTile < static_cast<int>(kPlaces) && place < places && channel < TCONV_GROUPS;
#else
  const unsigned tiles = (places + kThreads - 1) / kThreads;
  const unsigned place = block % tiles * kThreads + thread;
  block /= tiles;
  const int q_0 = static_cast<int>(block % static_cast<unsigned>(a.lattice[0]));
  block /= static_cast<unsigned>(a.lattice[0]);
  const int channel = static_cast<int>(block % TCONV_GROUPS), channel0 = channel, local = 0;
  const int b = static_cast<int>(block / TCONV_GROUPS);
  const bool exists = place < places;
#endif
  const int q_1 = static_cast<int>(place / static_cast<unsigned>(a.lattice[2])) * QUEUE;
  const int q_2 = static_cast<int>(place % static_cast<unsigned>(a.lattice[2]));

  // Weights in the order of their use. An element outside is taken as zero, which is the same as leaving its products
  // out unless a weight is infinite or NaN: then they are left out one by one.
  if (thread == 0) unusual = 0;
  __syncthreads();
  for (int e = thread; e < kResultChannels * kSourceChannels * kTaps * kChannelTile; e += kThreads) {
    const int c = channel0 + e % kChannelTile, slot = e / kChannelTile % kTaps, m = e / (kChannelTile * kTaps);
    accum_t w = 0;
    if (c < TCONV_GROUPS) {
      const long long at = weight_element<TCONV_CO, kTaps>(a.weight_last, c, m, kSlotTap[slot]);
      w = widen(static_cast<const storage_t*>(a.weight)[at]);
    }
    weights[e] = w;
    if (!(w - w == accum_t(0))) unusual = 1;
  }
  __syncthreads();

  const long long source_volume = a.source_size[0] * a.source_size[1] * a.source_size[2];
  const long long result_volume = a.result_size[0] * a.result_size[1] * a.result_size[2];
  const int z0 = q_0 * kSourceStep[0], x0 = q_2 * kSourceStep[2];
  const int y0 = exists ? q_1 * kSourceStep[1] : -(1 << 30);  // outside everything
  const int sizes[3] = {static_cast<int>(a.source_size[0]), static_cast<int>(a.source_size[1]),
                        static_cast<int>(a.source_size[2])};
#if TCONV_CHANNELS_LAST
  constexpr long long kStep = static_cast<long long>(TCONV_GROUPS) * kSourceChannels;
  const long long next_channel = 1;
  long long offset = static_cast<long long>(b) * source_volume * kStep + channel * kSourceChannels;
#else
  constexpr long long kStep = 1;
  const long long next_channel = source_volume;
  long long offset = (static_cast<long long>(b) * TCONV_GROUPS + channel) * kSourceChannels * source_volume;
#endif
  offset += ((static_cast<long long>(z0) * sizes[1] + q_1 * kSourceStep[1]) * sizes[2] + x0) * kStep;

  accum_t sum[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] = 0;
#pragma unroll 1
  for (int m = 0; m < kSourceChannels; ++m, offset += next_channel) {
    const storage_t* source = static_cast<const storage_t*>(a.source) + offset;
    const accum_t* w = weights + m * kTaps * kChannelTile + local;
    if (!unusual) {
      add_taps<true, kStep>(source, sizes, z0, y0, x0, w, sum);
    } else {
      add_taps<false, kStep>(source, sizes, z0, y0, x0, w, sum);
    }
  }

  // Store. Result (n, queue, phases) is sum[...] in this order.
  output_t* result = static_cast<output_t*>(a.result);
  const int rows = exists ? static_cast<int>(a.result_size[1]) - q_1 * kResultStep[1] : 0;
  const int columns = static_cast<int>(a.result_size[2]) - q_2 * kResultStep[2];
  const int slices = static_cast<int>(a.result_size[0]) - q_0 * kResultStep[0];
  const long long first =
      (static_cast<long long>(q_0) * kResultStep[0] * a.result_size[1] + static_cast<long long>(q_1) * kResultStep[1]) *
          a.result_size[2] +
      static_cast<long long>(q_2) * kResultStep[2];
  const int result_channel = channel * kResultChannels;
#if TCONV_CHANNELS_LAST
  constexpr long long kResultPitch = static_cast<long long>(TCONV_GROUPS) * kResultChannels;
  const long long element = (static_cast<long long>(b) * result_volume + first) * kResultPitch + result_channel;
#else
  constexpr long long kResultPitch = 1;
  const long long element =
      (static_cast<long long>(b) * TCONV_GROUPS * kResultChannels + result_channel) * result_volume + first;
#endif
  auto value_at = [&](accum_t value, int n, long long where) {
    value += tconv_bias(a.bias, result_channel + n);
    return narrow<output_t>(tconv_epilogue<accum_t>(value, result_channel + n, where, operands));
  };
  constexpr bool kTogether = !TCONV_CHANNELS_LAST && kPhases[2] > 1;
  constexpr bool kPackable = kPhases[2] == 2 || kPhases[2] == 4;
  __shared__ Buffer buffers[kTogether ? kWarps : 1];
  Buffer& buffer = buffers[kTogether ? warp : 0];
  if (kTogether && !(kPackable && a.packed)) {
    buffer.element[lane] = element;
    buffer.rows[lane] = rows;
    buffer.columns[lane] = columns;
  }
  int index = 0;
#pragma unroll
  for (int n = 0; n < kResultChannels; ++n)
#pragma unroll
    for (int row = 0; row < QUEUE; ++row)
#pragma unroll
      for (int r_0 = 0; r_0 < kPhases[0]; ++r_0)
#pragma unroll
        for (int r_1 = 0; r_1 < kPhases[1]; ++r_1, index += kPhases[2]) {
          const int y = row * kResultStep[1] + r_1;
          long long offset_row = (static_cast<long long>(r_0) * a.result_size[1] + y) * a.result_size[2];
#if TCONV_CHANNELS_LAST
          offset_row = offset_row * kResultPitch + n;
#else
          offset_row += n * result_volume;
#endif
          if (r_0 >= slices) continue;
          if constexpr (!kTogether) {
            if (y < rows) {
#pragma unroll
              for (int r = 0; r < kPhases[2]; ++r) {
                const long long where = element + offset_row + r * kResultPitch;
                if (r < columns) result[where] = value_at(sum[index + r], n, where);
              }
            }
          } else {
            if (kPackable && a.packed) {
              if (y < rows) {
                output_t pack[kPackable ? kPhases[2] : 1];
#pragma unroll
                for (int r = 0; r < (kPackable ? kPhases[2] : 1); ++r) {
                  pack[r] = value_at(sum[index + r], n, element + offset_row + r);
                }
                store_pack(result + element + offset_row, pack);
              }
            } else {
              __syncwarp();
#pragma unroll
              for (int r = 0; r < kPhases[2]; ++r) buffer.value[lane * kPhases[2] + r] = sum[index + r];
              __syncwarp();
#pragma unroll
              for (int k = 0; k < kPhases[2]; ++k) {
                const int i = k * 32 + lane, from = i / kPhases[2], r = i % kPhases[2];
                if (y < buffer.rows[from] && r < buffer.columns[from]) {
                  const long long where = buffer.element[from] + offset_row + r;
                  result[where] = value_at(buffer.value[i], n, where);
                }
              }
            }
          }
        }
}
