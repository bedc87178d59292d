// box_gemm_grad_weight_emulation.h — main program of an emulated box_gemm_grad_weight_sm90: small whole numbers as data,
// every weight compared exactly with plain loops. Included behind the device source; EMULATED_* are given by
// emulation_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_weights.h"

int main() {
  const long long batch = kBatch, *const input = kInputSize, *const output = kOutputSize;
  const int kernel[3] = {TCONV_K0, TCONV_K1, TCONV_K2}, stride[3] = {TCONV_S0, TCONV_S1, TCONV_S2};
  const int padding[3] = {TCONV_P0, TCONV_P1, TCONV_P2}, dilation[3] = {TCONV_D0, TCONV_D1, TCONV_D2};
  const int in_channels = kInChannels, out_channels = kOutChannels;
  const long long input_plane = kInputPlane, output_plane = kOutputPlane;
  constexpr bool last = TCONV_CHANNELS_LAST;
  constexpr long long kSize = sizeof(storage_t);

  Buffer<storage_t> x(batch * in_channels * input_plane), grad(batch * out_channels * output_plane);
  fill(x, batch * in_channels * input_plane);
  fill(grad, batch * out_channels * output_plane);

  BoxGemmArgs a{};
  a.input = x.first, a.grad_output = grad.first, a.batch = static_cast<int>(batch);
  const int tile[3] = {BW_TD, BW_TH, BW_TW};
  for (int dim = 0; dim < 3; ++dim) {
    a.input_size[dim] = static_cast<int>(input[dim]), a.grad_size[dim] = static_cast<int>(output[dim]);
    a.tiles[dim] = static_cast<int>((input[dim] + tile[dim] - 1) / tile[dim]);
  }
  a.num_tiles = static_cast<long long>(a.tiles[0]) * a.tiles[1] * a.tiles[2] * ((batch + BW_TB - 1) / BW_TB);
  constexpr int kInputWidth = BW_INPUT_ROWS ? 64 : BW_N, kGradWidth = BW_INPUT_ROWS ? BW_N : 64;
  constexpr int kInputLine = BW_POSITIONS_INNER || BW_INPUT_ROWS ? 128 : BW_LINE;
  constexpr int kGradLine = BW_POSITIONS_INNER || !BW_INPUT_ROWS ? 128 : BW_LINE;
#if BW_PACKED
  int low[2], high[2];  // of the rows and slabs that taps reach, in strides
  for (int dim = 0; dim < 2; ++dim) {
    low[dim] = 1 << 20, high[dim] = -(1 << 20);
    for (int t = 0; t < kernel[dim]; ++t) {
      const int q = static_cast<int>(std::floor(double(dilation[dim] * t - padding[dim]) / stride[dim]));
      low[dim] = std::min(low[dim], q), high[dim] = std::max(high[dim], q);
    }
  }
  pack::PackArgs p{};
  p.extent[0] = static_cast<int>(input[0]) + high[0] - low[0],
  p.extent[1] = static_cast<int>(input[1]) + high[1] - low[1];
  p.extent[2] = static_cast<int>((input[2] + 3) / 4 * 4);
  p.width = static_cast<int>(input[2]);
  const long long length = batch * p.extent[0] * p.extent[1] * p.extent[2];
  p.rows = static_cast<int>(batch * p.extent[0] * p.extent[1]), p.strips = (p.extent[2] + BP_TW - 1) / BP_TW;
  const long long pitches[2] = {TCONV_GROUPS * BW_INPUT_PITCH, TCONV_GROUPS * BW_GRAD_PITCH};
  Buffer<storage_t> copies[2] = {Buffer<storage_t>(pitches[0] * length + 8),
                                 Buffer<storage_t>(pitches[1] * length + 8)};
  EmulatedTensor tensors[2];
  for (int side = 0; side < 2; ++side) {
    storage_t* const copy = copies[side].first - EMULATED_OFFSET;
    pack::PackSide& to = side == 0 ? p.input : p.grad;
    const long long channels = side == 0 ? in_channels : out_channels, plane = side == 0 ? input_plane : output_plane;
    to.from = side == 0 ? x.first : grad.first, to.to = copy;
    to.image = channels * plane, to.channel = last && channels > 1 ? channels : plane;
    to.pitch = BW_POSITIONS_INNER ? length : pitches[side];
    for (int dim = 0; dim < 3; ++dim) to.size[dim] = static_cast<int>(side == 0 ? input[dim] : output[dim]);
    const long long lots = side == 0 ? (TCONV_CI + BP_INPUT_LOT - 1) / BP_INPUT_LOT
                                     : BW_CLASSES * ((TCONV_CO + BP_GRAD_LOT - 1) / BP_GRAD_LOT);
    to.blocks = static_cast<unsigned>((p.rows + BP_ROWS - 1) / BP_ROWS * p.strips * TCONV_GROUPS * lots);
    to.wide = EMULATED_OFFSET == 0 && (last && channels > 1 ? channels / TCONV_GROUPS : to.size[2]) % (16 / kSize) == 0;
    const long long inner = BW_POSITIONS_INNER ? length : pitches[side],
                    rows = BW_POSITIONS_INNER ? pitches[side] : length;
    const int width = side == 0 ? kInputWidth : kGradWidth;
    tensors[side] = {reinterpret_cast<const unsigned char*>(copy),
                     kSize,
                     side == 0 ? kInputLine : kGradLine,
                     {inner, rows, 1, 1, 1},
                     {inner * kSize, inner * kSize, inner * kSize, inner * kSize},
                     {BW_POSITIONS_INNER ? BW_POSITIONS : width, BW_POSITIONS_INNER ? width : BW_POSITIONS, 1, 1, 1},
                     {1, 1, 1, 1, 1}};
  }
  emulated_launch(3, 256, 1, [&] { pack::box_gemm_pack(p, 1); });
  a.tensor = 1;
  a.num_tiles = (length + BW_POSITIONS - 1) / BW_POSITIONS;
#else
  a.tensor = EMULATED_OFFSET == 0;
  EmulatedTensor tensors[2];
  for (int side = 0; side < 2; ++side) {
    const long long* size = side == 0 ? input : output;
    const long long channels = side == 0 ? in_channels : out_channels;
    tensors[side] = {reinterpret_cast<const unsigned char*>(side == 0 ? x.first : grad.first),
                     kSize,
                     side == 0 ? kInputLine : kGradLine,
                     {channels, size[2], size[1], size[0], batch},
                     {channels * kSize, channels * kSize * size[2], channels * kSize * size[2] * size[1],
                      channels * kSize * size[2] * size[1] * size[0]},
                     {side == 0 ? kInputWidth : kGradWidth, BW_TW, BW_TH, BW_TD, BW_TB},
                     {1, 1, 1, 1, 1}};
    if (side == 1)
      for (int dim = 0; dim < 3; ++dim) tensors[side].step[3 - dim] = stride[dim];
  }
#endif
  a.input_map.word[0] = reinterpret_cast<std::uintptr_t>(&tensors[0]);
  a.grad_map.word[0] = reinterpret_cast<std::uintptr_t>(&tensors[1]);
  a.shares = static_cast<int>(std::min(3ll, a.num_tiles));
  constexpr int kSums = TCONV_GROUPS * BW_BLOCKS_M * BW_BLOCKS_N;
  std::vector<float> partial(static_cast<std::size_t>(kSums) * a.shares * TG_BLOCK_FLOATS, NAN);
  a.partial = partial.data();
  emulated_launch(kSums * a.shares, kThreads, 1, [&] { box_gemm_grad_weight(a); });

  std::vector<storage_t> got(static_cast<std::size_t>(in_channels) * TCONV_CO * kTaps);
  std::memset(static_cast<void*>(got.data()), 0xff, got.size() * sizeof(storage_t));
#if EMULATED_BY_FRAGMENTS
  constexpr int kInputs = (TCONV_CI + finish::kInputs - 1) / finish::kInputs, kOutputs = TCONV_CO / finish::kOutputs;
  emulated_launch(TCONV_GROUPS * kInputs * kOutputs, BW_FINISH_THREADS, 1, [&] {
    finish::box_gemm_finish(reinterpret_cast<const float4*>(partial.data()), got.data(), a.shares);
  });
#else
  const unsigned fragments = static_cast<unsigned>(static_cast<long long>(kSums) * TG_BLOCK_FLOATS / 4);
  const int lanes = a.shares == 1 ? 1 : a.shares == 2 ? 2 : 4;
  emulated_launch((fragments * lanes + 255) / 256, 256, 1, [&] {
    finish::tap_gemm_finish(reinterpret_cast<const float4*>(partial.data()), got.data(), a.shares, fragments, lanes);
  });
#endif

  long long differ = weights_that_differ(x.first, grad.first, got);

  // The bias gradient that goes with it, in three segments.
  constexpr int kSegments = 3, kAll = TCONV_CO * TCONV_GROUPS;
  const int count = static_cast<int>(batch) * kSegments;
  std::vector<float> segment_sums(static_cast<std::size_t>(kAll) * count, NAN);
  std::vector<storage_t> grad_bias(kAll);
  std::memset(static_cast<void*>(grad_bias.data()), 0xff, kAll * sizeof(storage_t));
  constexpr int kStrips = TCONV_CHANNELS_LAST && kAll > 1 ? (kAll + 31) / 32 : kAll;
  emulated_launch(kStrips * count, 256, 1, [&] {
    bias::channel_sum(grad.first, segment_sums.data(), output_plane, kSegments,
                      (output_plane + kSegments - 1) / kSegments);
  });
  emulated_launch(kAll, 32, 1, [&] { bias::channel_sum_finish(segment_sums.data(), grad_bias.data(), count); });
  for (int c = 0; c < kAll; ++c) {
    double sum = 0;
    for (long long b = 0; b < batch; ++b)
      for (long long i = 0; i < output_plane; ++i) {
        const long long o[3] = {i / (output[1] * output[2]), i / output[2] % output[1], i % output[2]};
        sum += widen(grad.first[element_at(kOutputSize, kOutChannels, b, c, o)]);
      }
    if (!(widen(grad_bias[c]) == widen(narrow<storage_t>(static_cast<float>(sum)))) && differ++ < 3)
      std::printf("bias of channel %d: got %g, expected %g\n", c, widen(grad_bias[c]), sum);
  }
  return differ != 0;
}
