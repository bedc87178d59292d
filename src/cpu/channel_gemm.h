// channel_gemm.h — what the portable half (channel_gemm_driver.cpp: tiles, packing, threads) and the target-compiled half
// (channel_gemm.cpp: staging and register tiles) tell each other.
//
// Grid, phases and taps are those of phase_gemm.h. A tile's source is a box of positions staged as [position][channel],
// zero outside; a tap is an offset into the box. Weights are packed as [group][block of result channels][tap][k][channel].
//
// A window is a row of taps that read neighbouring columns: with few source channels their values follow each other in the
// box, and a window of them is one run of the register tile. Alone a tap of one channel is one step of the tile's loop
// behind a setup that takes longer than four of them. In windows an odd number of source channels can be multiplied in
// pairs too: the box then has a word for every value, itself and the next one, and the run takes every second word.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/phase_gemm.h"

namespace tconv::cpu {

struct ChannelGemmTask {
  DType dtype, result_dtype;
  std::int64_t batch, groups, k, m;  // k source and m result channels per group
  std::int64_t rows;                 // staged words of a position: k, or pairs of channels
  bool windows;                      // taps are joined, and columns not split by their phase
  std::int64_t word_step;            // from one word of a run to the next: 2 where there is one for every value
  bool depthwise;                    // one channel on both sides of every group: here one group with m of them
  std::int64_t source_channels;      // of the whole tensor
  const void* source;
  bool direct;  // no tap reads beyond the source, whose words are multiplied where they are
  void* result;
  std::int64_t source_size[3], result_size[3];
  std::int64_t source_step[3], result_step[3];
  std::int64_t grid[3], samples, tile[3];  // of a tile, in grid positions
  std::int64_t tiles[4];                   // over batch, depth, height, width
  std::int64_t first_shift[3], range[3];   // the box of n positions is source_step * (n + range) wide
  const bool* used[2];                     // rows of the box that any tap reads: depth, height
  std::int64_t column_phase;               // the only phase of columns that is read; -1: all
  std::int64_t pitch;                      // staged elements from one position to the next
  std::int64_t vectors;                    // of a group's result channels
  std::int64_t m_chunk, m_chunks;          // blocks of one item
  std::int64_t items, ahead;               // this many items later comes the one that a thread probably takes next
  // Taps, sorted by result phase
  const int* phase_taps;           // [phase]: first tap; one more entry at the end
  const std::int64_t* tap_source;  // [tap][3]: position in the box of the grid's first position
  std::int64_t num_taps;
  // Of a result phase: taps of a window, words of a window, and all words before it
  const int* phase_window;
  const std::int64_t *phase_words, *phase_first;
  std::int64_t words;  // of all taps
  const void* weight;
  bool masked;  // a weight is not finite: zeros outside the source must not be multiplied
  const PhaseOp* pre;
  int num_pre;
  const void* bias;    // S per channel, readable one vector beyond the last, or null
  const PhaseOp* ops;  // channel operands likewise
  int num_ops;
};

// Weights of one block of a group: value c of tap t is value tap_value[t] + c of the block's words.
struct ChannelPackTask {
  DType dtype;
  const void* weight;
  void* packed;
  std::int64_t taps, k, m, k_stride, m_stride, words;
  const std::int64_t* tap_value;
};

// For avx512_amx: words of a run in one product of matrices, at most 16. With fewer than six most of it would be empty; 0 then.
inline std::int64_t matrix_words(std::int64_t n) {
  for (std::int64_t words = 16; words >= 6; --words)
    if (n % words == 0) return words;
  return 0;
}

// Blocks of at most `most` vectors that pass through the registers together.
inline std::int64_t channel_blocks(std::int64_t vectors, std::int64_t most) { return (vectors + most - 1) / most; }

struct ChannelGemmLoops {
  Isa target;
  std::int64_t most_vectors;
  bool (*pack)(const ChannelPackTask&, std::int64_t item);  // item: group, block; returns whether all are finite
  void (*run)(const ChannelGemmTask&, std::int64_t item, void* scratch);
  std::int64_t (*scratch_bytes)(const ChannelGemmTask&);
};

Fit fit_channel_gemm(const Problem&, const Epilogue&, const Device&, Isa target);
void prepare_channel_gemm(Step&, Isa target);
void launch_channel_gemm(const Step&, const Tensors&, Stream, const ChannelGemmLoops&);

}  // namespace tconv::cpu
