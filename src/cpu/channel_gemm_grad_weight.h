// channel_gemm_grad_weight.h — what the portable half (channel_gemm_grad_weight_driver.cpp: tiles, chunks, parts,
// threads) and the target-compiled half (channel_gemm_grad_weight.cpp: staging and register tiles) tell each other.
//
// The input's tile is a box of positions q over the input grid, grad_output's the positions s * q + d * t - p that any
// tap reads, both staged as [position][channel]. One of the two is the vector side: its channels lie along the lanes,
// those of the other side are broadcast. Sums are kept as [vector][block of kSumsBlock channels of the other side][tap]
// [channel of the block][lane], so that register tiles and the merge read them in the order in which they lie.
//
// A window is a row of taps that read neighbouring columns of one stride phase. With fewer output channels than lanes their
// values follow each other in the staged grad_output, and the lanes of a window's vectors are (tap, channel) pairs; sums are
// [channel of the other side][window].
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/grad_bias.h"
#include "kernel.h"

namespace tconv::cpu {

constexpr std::int64_t kSumsBlock = 8;

struct ChannelGradWeightTask {
  DType dtype;
  Layout layout;
  std::int64_t batch, groups;
  std::int64_t channels[2];  // per group; 0 input, 1 grad_output, here and below
  std::int64_t whole_channels[2];
  const void* source[2];
  std::int64_t size[2][3];
  std::int64_t stride[3], padding[3], dilation[3], kernel[3];
  std::int64_t num_taps;
  int vector_side;
  bool depthwise;  // one channel on both sides of every group: here one group, whose input channels are all of them
  std::int64_t grid[3];          // positions of the input that can meet any output
  std::int64_t samples, box[3];  // of a tile, in input positions
  std::int64_t tiles[4];         // over batch, depth, height, width
  std::int64_t raw[3];           // extents of grad_output's box; the width is a multiple of the stride
  const bool* used[2];           // rows of grad_output's box that any tap reads: depth, height
  bool one_phase;                // of the width is read: taps are a multiple of the stride apart
  bool sums_bias;  // every element of grad_output is in a tile's box, whose staging can add it to the bias's
  std::int64_t chunk[2], chunks[2];
  std::int64_t parts, num_tiles;
  std::int64_t item_groups;      // groups of one item, one after the other for each tile
  std::int64_t staged_pitch[2];  // elements from one staged position to the next
  std::int64_t lanes, pitch;     // channels of the vector side, rounded up to whole vectors
  bool windows;
  const std::int64_t* window;  // [window][2]: its first tap, its vectors
  std::int64_t num_windows;
  const std::int64_t* tap_sums;   // [tap]: where its sums are in those of one channel's windows
  std::int64_t row_elements;      // sums of one channel of the other side: of all taps, `pitch` each, or of all windows
  void* partial;                  // S: [part][group][sums]
  std::int64_t partial_elements;  // of one part
  double* bias;                   // [part][output channel]: sums of grad_output; null: not wanted
  struct PreOp {
    OpKind kind;
    double a, b;
  };
  const PreOp* pre;
  int num_pre;
};

struct ChannelGradWeightLoops {
  Isa target;
  void (*run)(const ChannelGradWeightTask&, std::int64_t item, void* scratch);
  std::int64_t (*scratch_bytes)(const ChannelGradWeightTask&);
  void (*merge)(const ChannelGradWeightTask&, std::int64_t item, void* result);  // item: group, vector
  void (*sum_bias)(const GradBiasTask&, std::int64_t item);
};

Fit fit_channel_grad_weight(const Problem&, const Epilogue&, const Device&, Isa target);
void prepare_channel_grad_weight(Step&, Isa target);
void launch_channel_grad_weight(const Step&, const Tensors&, Stream, const ChannelGradWeightLoops&);

}  // namespace tconv::cpu
