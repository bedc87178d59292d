// finish.h — what the portable half (finish_driver.cpp: partition, memory, threads) and the target-compiled half
// (finish.cpp: loops over one tile) of the finish kernel tell each other. Plain data only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernel.h"

namespace tconv::cpu {

// Count, mean and sum of squared deviations of one tile's share of a statistic.
struct TileMoments {
  double count, mean, m2;
};

struct FinishOp {
  OpKind kind;
  OperandKind operand;
  double a, b;
  const void* values;  // channel: one S per channel; tensor: elements of the problem's dtype
  void* gradients;     // tensor: elements of the problem's dtype, or null
  int sum_slot;        // channel: which row of FinishTask::sums receives the gradient, or -1
};

// S is float, or double for f64 problems. A tile is a block of channels by a run of positions of one sample.
struct FinishTask {
  DType dtype, output_dtype;
  Layout layout;
  std::int64_t batch, channels, positions;
  const void* input;
  const void* grad_output;  // null: the chain forward
  void* output;
  const void* bias;  // S per channel, or null
  const FinishOp* ops;
  int num_ops;
  int norm;  // index of the normalisation among ops, or -1
  OpKind norm_kind;
  std::int64_t num_groups;  // of group_norm
  const void* norm_weight;  // S per channel, or null
  const void* norm_bias;
  // Tiles: item = (b * channel_blocks + block) * position_blocks + run
  std::int64_t tile_channels, tile_positions, channel_blocks, position_blocks, blocks_per_group;
  // group_norm: [b][group]; batch_norm: [channel]; layer_norm: [b][position]. S each.
  void* mean;
  void* rstd;
  double eps;
  bool have_statistics;  // layer_norm: mean and rstd are given (backward)
  TileMoments* moments;  // group_norm: [item][groups in the tile]
  // Backward
  double* sums;  // [slot][b * position_blocks + run][channel]
  int num_slots;
  int weight_slot, bias_slot;  // of the norm's gradients in sums, or -1
  const void* sum_g;           // group_norm: [b][group] mean of g and of g * normalised; S each
  const void* sum_gx;
};

enum class FinishStage { moments, apply, grad_sums, grad_apply };

struct FinishLoops {
  void (*run)(const FinishTask&, FinishStage, std::int64_t item, void* scratch);
};

std::int64_t finish_scratch_bytes(const FinishTask& task);
inline constexpr int kMaxSumSlots = kMaxOperands + 2;
inline constexpr std::int64_t kFinishChunk = 256;  // elements of a row that run through the chain together

Fit fit_finish(const Problem&, const Epilogue&, const Device&, Isa target);
void launch_finish(const Step&, const Tensors&, Stream, const FinishLoops&);

}  // namespace tconv::cpu
