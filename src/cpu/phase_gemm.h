// phase_gemm.h — what the portable half (phase_gemm_driver.cpp: tiles, packing, threads) and the target-compiled half
// (phase_gemm.cpp: staging, register tiles, stores) tell each other. Plain data only.
//
// One formulation serves forward and grad_input. A grid of positions q is cut into tiles. Per dimension
//   source coordinate = source_step * (q + shift) + source phase        forward: step 1; grad_input: the stride
//   result coordinate = result_step * q + result phase                  forward: the stride; grad_input: step 1
// A tile's source is staged as planes [source phase][channel][d][h][w] of arithmetic type S with zeros outside, so that
// every tap is an offset into the planes and result[m][q] = sum over taps and k of weight[tap][k][m] * plane[k][q + offset].
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/grad_bias.h"
#include "kernel.h"

namespace tconv::cpu {

struct PhaseOp {
  OpKind kind;
  OperandKind operand;
  double a, b;
  const void* values;  // channel: one S per channel; tensor: elements of the problem's dtype
};

struct PhaseGemmTask {
  DType dtype, result_dtype;
  Layout layout;
  std::int64_t batch, groups, k, m;  // k source and m result channels per group
  std::int64_t rows;                 // staged per source phase: k, or pairs of channels for products of bf16 pairs
  std::int64_t slab;                 // of them, staged and multiplied together, with one result phase only; else all
  std::int64_t source_channels;      // of the whole tensor
  const void* source;
  void* result;
  std::int64_t source_size[3], result_size[3];
  std::int64_t source_step[3], result_step[3];
  // Tiles of the grid; small grids hold several samples, whose planes follow each other
  std::int64_t grid[3], tile[3], tiles[3];
  std::int64_t samples, sample_tiles, sample_pitch;
  std::int64_t m_chunk, m_chunks;  // result channels of one item, a multiple of the register tile
  std::int64_t item_groups;        // groups of one item, one after the other
  // Staged planes
  std::int64_t first_shift[3];      // shift of the planes' first row and column
  std::int64_t plane[3];            // extents of a plane
  std::int64_t plane_pitch;         // elements from one channel's plane to the next
  std::int64_t phase_pitch;         // elements from one source phase's planes to the next phase's
  int num_planes;                   // source phases that are used
  const std::int64_t* plane_phase;  // [plane][3]
  const std::int64_t* plane_rows;   // [plane][depth, height][2]: the first that a tap reads; how many more than n
  // Taps, sorted by result phase
  const int* phase_taps;            // [phase]: first tap; one more entry at the end
  const std::int64_t* tap_offset;   // [tap]: from the plane's origin to the tap's first element
  const std::int64_t* mask_offset;  // [tap]: the same into the mask, which has one plane per phase
  const std::int64_t* tap_source;   // [tap][2]: source depth and row of grid position 0
  std::int64_t num_taps;
  const void*
      weight;   // packed S: [group][slab][m block][phase][tap][k][m of the block], or [k][tap] where taps are innermost
  bool masked;  // a weight is not finite: zeros outside the source must not be multiplied
  // Epilogue
  const PhaseOp* pre;
  int num_pre;
  const void* bias;  // S per channel, or null
  const PhaseOp* ops;
  int num_ops;
};

// Weights in the order that the register tiles read. Of one block and slab, those of (tap, k) are
// tap_first[tap] + k * tap_step[tap] blocks from the start.
struct PackTask {
  DType dtype;
  const void* weight;
  void* packed;
  std::int64_t elements;  // of the weight tensor
  std::int64_t taps, k, rows, slab, m, k_stride, m_stride;
  const std::int64_t *tap_first, *tap_step;
};

struct PhaseGemmLoops {
  Isa target;
  int register_m;                                    // largest register tile
  bool taps_innermost;                               // of the packed weights of a phase
  bool (*pack)(const PackTask&, std::int64_t item);  // item: group, m block; returns whether all are finite
  void (*run)(const PhaseGemmTask&, std::int64_t item, void* scratch);
  std::int64_t (*scratch_bytes)(const PhaseGemmTask&);
};

// Why no kernel of this target computes it, for the kernels of forward and grad_input.
Fit refuse_gemm(const Problem&, const Epilogue&, const Device&, Isa target, bool odd_channels);
Fit fit_phase_gemm(const Problem&, const Epilogue&, const Device&, Isa target);
void prepare_phase_gemm(Step&, Isa target);
void launch_phase_gemm(const Step&, const Tensors&, Stream, const PhaseGemmLoops&);

// grad_weight: the source is grad_output, staged as for grad_input; the input is staged beside it over the same grid, with
// zeros where the planes are wider than the tile. gw[m][k][tap] = sum over positions of x[m][q] * plane[k][q + offset].
struct GradWeightTask {
  PhaseGemmTask gradient;
  PhaseGemmTask input;            // one plane; k is set for each item
  const int* tap_order;           // [sorted tap] -> tap in the weight tensor
  std::int64_t parts, num_tiles;  // tiles (over batch and grid) are dealt to parts in order
  void* partial;                  // S: [part][weight]
  std::int64_t weight_elements;
};

struct GradWeightLoops {
  Isa target;
  void (*run)(const GradWeightTask&, std::int64_t item, void* scratch);
  std::int64_t (*scratch_bytes)(const GradWeightTask&);
  void (*merge)(const GradWeightTask&, std::int64_t first, std::int64_t last, void* result);
  SumBias sum_bias;
};

Fit fit_grad_weight(const Problem&, const Epilogue&, const Device&, Isa target);
void prepare_grad_weight(Step&, Isa target);
void launch_grad_weight(const Step&, const Tensors&, Stream, const GradWeightLoops&);

}  // namespace tconv::cpu
