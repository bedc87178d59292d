// tap_tiling.h — what the tap_gemm_grad_weight kernels share on the host: slices of taps, tiles of positions, arguments,
// and the bias gradient that goes with the weight gradient.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>

#include "driver.h"
#include "tile_geometry.h"

namespace tconv::cuda {

// A slice is the set of taps that a block sums: as many whole trailing dimensions of the kernel as a limit allows, else a
// part of the width.
struct TapSlices {
  int num_taps = 1, slices = 1, taps = 1;  // of the kernel; slices; taps of a slice, repeated ones included
  int fixed = 0;                           // leading kernel dimensions that a slice fixes
  int width_parts = 1, width_taps = 1;
  std::vector<int> offset[3];                // d * t - p
  std::vector<int> slice_offset, slice_tap;  // [slice][2] depth and height; [slice][taps] packed tap, -1: repeated

  // The offsets that a slice's tile covers.
  std::vector<int> staged(int dim) const;
  // [slice][taps]: where a tap finds a tile's first position, with rows of row_words words.
  std::vector<int> tap_words(const Rows& rows_d, const Rows& rows_h, const std::vector<int>& column_word,
                             int row_words) const;
};
// At most `limit` taps a slice, a multiple of `multiple` (repeated taps fill it up).
TapSlices tap_slices(const Problem& problem, int limit, int multiple);

// Slices and the input positions that a block stages at a time.
struct TapTiling : TapSlices {
  int tile[3] = {0, 0, 0};  // positions per dimension; 0: no tile fits
  Rows rows[2];
  Columns columns;
  int grad_positions = 0, grad_pitch = 0;  // staged positions of grad_output; = 4 mod 32 words apart per channel
  std::vector<int> tap_word;
  std::size_t shared_bytes = 0;
  std::int64_t tiles[3] = {1, 1, 1}, num_tiles = 0;
};

// Slices as above; the tile of block_positions that moves the fewest words of input_channels and grad_channels and whose
// shared_bytes(grad_pitch) stays within the limit.
TapTiling tap_tiling(const Problem& problem, int block_positions, int limit, int multiple, int input_channels,
                     int grad_channels, const std::function<std::size_t(int)>& shared_bytes, std::size_t shared_limit);

// The #define lines of a tiling.
std::string tiling_text(const TapTiling& tiling);

// Kernel parameters of tap_gemm_grad_weight.
struct TapArguments {
  const void* input = nullptr;
  const void* grad_output = nullptr;
  void* partial = nullptr;
  int input_size[3] = {}, grad_size[3] = {}, tiles[3] = {};
  int shares = 1;
  long long num_tiles = 0;
};
TapArguments tap_arguments(const Problem& problem, const Tensors& tensors, const TapTiling& tiling, int shares);

// How many blocks share the positions where there are `others` of one each and one block a multiprocessor: as fills whole
// waves of them best; at least 1, at most `most`.
int shares_of(std::int64_t others, std::int64_t most, int multiprocessors);

// What follows the partial sums of `elements` weights, `summands` of each, that lie first in the workspace: the weight
// gradient by tap_gemm_finish.cu, the bias gradient by channel_sum.cu (functions 1 to 3 of the step), the latter with
// bias_floats(problem) floats behind partial_floats.
std::size_t bias_floats(const Problem& problem);
void launch_sums(const Step& step, const Tensors& tensors, Stream stream, std::int64_t elements, int summands,
                 std::size_t partial_floats);
// The bias gradient alone, where there is one.
void launch_bias_sums(const Step& step, const Tensors& tensors, Stream stream, std::size_t partial_floats);

}  // namespace tconv::cuda
