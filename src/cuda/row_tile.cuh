// row_tile.cuh — staging the source of a tile row by row as it lies in memory: words of channels in planes, columns in
// order. For fold_gemm_sm80 and merge_gemm_sm80.
//
// From the prelude: RT_CHANNELS (of a group in the source), RT_WORDS (words of channels staged at once), RT_ND RT_NH (rows)
// and RT_ROWS_D RT_ROWS_H (their places relative to the tile's first), RT_COLUMNS, RT_PITCH RT_PLANE (words between rows and
// between words of channels), RT_WARPS.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "mma_sm80.cuh"

__constant__ int rt_rows_d[] = {RT_ROWS_D};
__constant__ int rt_rows_h[] = {RT_ROWS_H};

constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;  // channels in a word
constexpr int kRows = RT_ND * RT_NH;

struct RowSource {
  const storage_t* source;  // the sample's and group's first element
  long long plane;          // positions
  int depth, height, width;
  int wide;  // channels_last, 16 bits: words of channels are 4-byte aligned
};

// Lanes of a warp along a staged row: channels_last, a power of two of them along the words of channels.
constexpr int kLanes = !TCONV_CHANNELS_LAST ? 1
                       : RT_WORDS > 16      ? 32
                       : RT_WORDS > 8       ? 16
                       : RT_WORDS > 4       ? 8
                       : RT_WORDS > 2       ? 4
                                            : RT_WORDS;
constexpr int kLaneColumns = 32 / kLanes;
// A last span of a few columns is staged on its own, with lanes along the rows.
constexpr int kTail = RT_COLUMNS % kLaneColumns * 4 <= kLaneColumns ? RT_COLUMNS % kLaneColumns : 0;
constexpr int kSpans = (RT_COLUMNS - kTail + kLaneColumns - 1) / kLaneColumns;

// A warp takes whole rows of the tile, all words of channels behind each other, so that what is worked out per row
// and per column is worked out once (a row at a time for each word took twice as long for three taps of eight channels).
// Positions outside the source are zero.
__device__ __forceinline__ void load_tile(unsigned* tile, const RowSource& a, int first_channel, int d0, int h0,
                                          int w0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Spans whose reads are under way together, where they go through registers.
  constexpr int kBatch = kSpans < 4 ? (kSpans < 1 ? 1 : kSpans) : 4;
  constexpr int kStep = TCONV_CHANNELS_LAST ? RT_CHANNELS * TCONV_GROUPS : 1;
  const int x0 = lane / kLanes, word0 = lane % kLanes;
  // Whether channel c of the group exists; all do where the words that are staged divide the channels.
  const auto exists = [&](int c) {
    return RT_CHANNELS % (RT_WORDS * kPerWord) == 0 || first_channel + c < RT_CHANNELS;
  };
  const long long next_channel = TCONV_CHANNELS_LAST ? 1 : a.plane;
#pragma unroll 1
  for (int row = warp; row < kRows; row += RT_WARPS) {
    const int d = d0 + rt_rows_d[row / RT_NH], h = h0 + rt_rows_h[row % RT_NH];
    const bool there = (unsigned)d < (unsigned)a.depth && (unsigned)h < (unsigned)a.height;
    const int width = there ? a.width : 0;
    const storage_t* from_row =
        a.source + (((long long)d * a.height + h) * a.width + w0 + x0) * kStep + first_channel * next_channel;
    unsigned* to_row = tile + row * RT_PITCH + x0;
#pragma unroll(RT_WORDS / kLanes <= 8 ? RT_WORDS / kLanes : 2)
    for (int first = 0; first < RT_WORDS; first += kLanes) {
      const int word = first + word0;
      if (RT_WORDS % kLanes != 0 && word >= RT_WORDS) break;
      const storage_t* from = from_row + word * kPerWord * next_channel;
      unsigned* to = to_row + word * RT_PLANE;
      const bool copies = kPerWord == 1 || (TCONV_CHANNELS_LAST && RT_CHANNELS % 2 == 0 && a.wide);
      if (copies) {
#pragma unroll(8)
        for (int i = 0; i < kSpans; ++i) {
          const int x = i * kLaneColumns;
          if (x + kLaneColumns <= RT_COLUMNS || x0 + x < RT_COLUMNS)
            copy_async_4(to + x, from + x * kStep,
                         (unsigned)(w0 + x0 + x) < (unsigned)width && exists(word * kPerWord));
        }
      } else {
#pragma unroll 1
        for (int begin = 0; begin < kSpans; begin += kBatch) {
          storage_t low[kBatch], high[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int x = (begin + i) * kLaneColumns;
            const bool valid = x0 + x < RT_COLUMNS - kTail && (unsigned)(w0 + x0 + x) < (unsigned)width;
            low[i] = high[i] = storage_t{};
            if (valid && exists(word * 2)) low[i] = from[x * kStep];
            if (valid && exists(word * 2 + 1)) high[i] = from[x * kStep + next_channel];
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int x = (begin + i) * kLaneColumns;
            if (x0 + x < RT_COLUMNS - kTail) to[x] = pack_words(low[i], high[i]);
          }
        }
      }
    }
  }
  if (kTail == 0) return;
#pragma unroll 2
  for (int e = warp * 32 + lane; e < kRows * RT_WORDS * kTail; e += (32 * RT_WARPS)) {
    const int word = e % RT_WORDS, x = RT_COLUMNS - kTail + e / RT_WORDS % kTail, row = e / RT_WORDS / kTail;
    const int d = d0 + rt_rows_d[row / RT_NH], h = h0 + rt_rows_h[row % RT_NH];
    const bool valid =
        (unsigned)d < (unsigned)a.depth && (unsigned)h < (unsigned)a.height && (unsigned)(w0 + x) < (unsigned)a.width;
    const storage_t* from = a.source + (((long long)d * a.height + h) * a.width + w0 + x) * kStep +
                            (first_channel + word * kPerWord) * next_channel;
    unsigned* to = tile + word * RT_PLANE + row * RT_PITCH + x;
    if (kPerWord == 1) {
      copy_async_4(to, from, valid && exists(word * kPerWord));
    } else {
      storage_t low{}, high{};
      if (valid && exists(word * 2)) low = from[0];
      if (valid && exists(word * 2 + 1)) high = from[next_channel];
      *to = pack_words(low, high);
    }
  }
}
