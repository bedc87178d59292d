// row_tile.cuh — staging the source of a tile row by row as it lies in memory: words of channels in planes, columns in
// order. For fold_gemm_sm80 and merge_gemm_sm80.
//
// From the prelude: RT_CHANNELS (of a group in the source), RT_WORDS (words of channels staged at once), RT_TD RT_TH RT_TW
// (positions of a tile), RT_ND RT_NH (its rows), RT_STEP_D RT_STEP_H (rows from one position to the next) and RT_ROWS_D
// RT_ROWS_H (their places relative to the tile's first), RT_FIRST RT_COLUMNS (its columns), RT_PITCH RT_PLANE (words between
// rows and between words of channels), RT_WARPS.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "mma_sm80.cuh"

__constant__ int rt_rows_d[] = {RT_ROWS_D};
__constant__ int rt_rows_h[] = {RT_ROWS_H};

constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;  // channels in a word
constexpr int kRows = RT_ND * RT_NH;

// Weights in shared memory: for each step of 8 words and 8 columns a lane's two words, rounded as they are used, and with
// kParts of 2 what rounding left of them.
template <int kParts>
__device__ __forceinline__ void write_fragment(unsigned* to, const storage_t (&value)[2]) {
#if TCONV_DTYPE_f32
  const float x = widen(value[0]);
  const unsigned big = to_tf32(x);
  to[0] = big;
  if (kParts == 2) to[2] = to_tf32(x - __uint_as_float(big));
#else
  to[0] = pack_words(value[0], value[1]);
#endif
}
template <int kTiles, int kParts>
__device__ __forceinline__ void read_fragment(WeightFragments<kTiles, kParts>& columns, int tile,
                                              const unsigned* from) {
  if constexpr (kParts == 2) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    columns.word[0][2 * tile] = four.x, columns.word[0][2 * tile + 1] = four.y;
    columns.word[kParts - 1][2 * tile] = four.z, columns.word[kParts - 1][2 * tile + 1] = four.w;
  } else {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    columns.word[0][2 * tile] = two.x, columns.word[0][2 * tile + 1] = two.y;
  }
}

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
// A last span of a few columns is staged on its own, with lanes along the rows, unless it takes many turns.
constexpr int kThreadsOfTile = 32 * RT_WARPS, kOver = RT_COLUMNS % kLaneColumns;
constexpr int kTailTurns = (kRows * RT_WORDS * kOver + kThreadsOfTile - 1) / kThreadsOfTile;
constexpr int kTail = kOver * 4 <= kLaneColumns && kTailTurns <= 4 ? kOver : 0;
constexpr int kSpans = (RT_COLUMNS - kTail + kLaneColumns - 1) / kLaneColumns;
static_assert(kSpans > 0);

// A warp takes whole rows of the tile, all words of channels behind each other, so that what is worked out per row and per
// column is worked out once (a row at a time for each word took twice as long for three taps of eight channels). Positions
// outside the source are zero.
__device__ __forceinline__ void load_tile(unsigned* tile, const RowSource& a, int first_channel, int d0, int h0,
                                          int w0) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Of a row: words and spans whose reads are under way together, where they go through registers.
  constexpr int kTurns = (RT_WORDS + kLanes - 1) / kLanes, kUnits = kTurns * kSpans, kBatch = kUnits < 8 ? kUnits : 8;
  constexpr int kStep = TCONV_CHANNELS_LAST ? RT_CHANNELS * TCONV_GROUPS : 1;
  const int x0 = lane / kLanes, word0 = lane % kLanes;
  // Whether channel c of the group exists; all do where the words that are staged divide the channels.
  const auto exists = [&](int c) {
    return RT_CHANNELS % (RT_WORDS * kPerWord) == 0 || first_channel + c < RT_CHANNELS;
  };
  const long long next_channel = TCONV_CHANNELS_LAST ? 1 : a.plane;
  const bool copies = kPerWord == 1 || (TCONV_CHANNELS_LAST && RT_CHANNELS % 2 == 0 && a.wide);

  // The tail's reads go out first; where they pass through registers, they are stored behind everything else.
  storage_t tail[kTail > 0 ? kTailTurns : 1][2];
  const auto each_of_tail = [&](auto&& take) {
#pragma unroll
    for (int turn = 0; turn < (kTail > 0 ? kTailTurns : 0); ++turn) {
      const int e = turn * kThreadsOfTile + threadIdx.x;
      const int word = e % RT_WORDS, x = RT_COLUMNS - kTail + e / RT_WORDS % (kTail > 0 ? kTail : 1),
                row = e / RT_WORDS / (kTail > 0 ? kTail : 1);
      if (e < kRows * RT_WORDS * kTail) take(turn, word, x, row, tile + word * RT_PLANE + row * RT_PITCH + x);
    }
  };
  each_of_tail([&](int turn, int word, int x, int row, unsigned* to) {
    const int d = d0 + rt_rows_d[row / RT_NH], h = h0 + rt_rows_h[row % RT_NH];
    const bool valid =
        (unsigned)d < (unsigned)a.depth && (unsigned)h < (unsigned)a.height && (unsigned)(w0 + x) < (unsigned)a.width;
    const storage_t* from = a.source + (((long long)d * a.height + h) * a.width + w0 + x) * kStep +
                            (first_channel + word * kPerWord) * next_channel;
    if (copies) {
      copy_async_4(to, from, valid && exists(word * kPerWord));
    } else {
      tail[turn][0] = tail[turn][1] = storage_t{};
      if (valid && exists(word * 2)) tail[turn][0] = from[0];
      if (valid && exists(word * 2 + 1)) tail[turn][1] = from[next_channel];
    }
  });

#pragma unroll 1
  for (int row = warp; row < kRows; row += RT_WARPS) {
    const int d = d0 + rt_rows_d[row / RT_NH], h = h0 + rt_rows_h[row % RT_NH];
    const bool there = (unsigned)d < (unsigned)a.depth && (unsigned)h < (unsigned)a.height;
    const int width = there ? a.width : 0;
    const storage_t* from_row =
        a.source + (((long long)d * a.height + h) * a.width + w0 + x0) * kStep + first_channel * next_channel;
    unsigned* to_row = tile + row * RT_PITCH + x0;
    if (copies) {
#pragma unroll(kTurns <= 8 ? kTurns : 2)
      for (int turn = 0; turn < kTurns; ++turn) {
        const int word = turn * kLanes + word0;
        if (RT_WORDS % kLanes != 0 && word >= RT_WORDS) break;
        const storage_t* from = from_row + word * kPerWord * next_channel;
        unsigned* to = to_row + word * RT_PLANE;
#pragma unroll(8)
        for (int i = 0; i < kSpans; ++i) {
          const int x = i * kLaneColumns;
          if (x + kLaneColumns <= RT_COLUMNS || x0 + x < RT_COLUMNS)
            copy_async_4(to + x, from + x * kStep,
                         (unsigned)(w0 + x0 + x) < (unsigned)width && exists(word * kPerWord));
        }
      }
    } else {
#pragma unroll(kUnits <= 16 ? 2 : 1)
      for (int begin = 0; begin < kUnits; begin += kBatch) {
        storage_t low[kBatch], high[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int word = (begin + i) / kSpans * kLanes + word0, x = (begin + i) % kSpans * kLaneColumns;
          const bool valid = x0 + x < RT_COLUMNS - kTail && (unsigned)(w0 + x0 + x) < (unsigned)width &&
                             (kUnits % kBatch == 0 || begin + i < kUnits) &&
                             (RT_WORDS % kLanes == 0 || word < RT_WORDS);
          const storage_t* from = from_row + word * kPerWord * next_channel + x * kStep;
          low[i] = high[i] = storage_t{};
          if (valid && exists(word * 2)) low[i] = from[0];
          if (valid && exists(word * 2 + 1)) high[i] = from[next_channel];
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int word = (begin + i) / kSpans * kLanes + word0, x = (begin + i) % kSpans * kLaneColumns;
          if (x0 + x < RT_COLUMNS - kTail && (kUnits % kBatch == 0 || begin + i < kUnits) &&
              (RT_WORDS % kLanes == 0 || word < RT_WORDS))
            to_row[word * RT_PLANE + x] = pack_words(low[i], high[i]);
        }
      }
    }
  }
  if (!copies) {
    each_of_tail([&](int turn, int, int, int, unsigned* to) { *to = pack_words(tail[turn][0], tail[turn][1]); });
  }
}
