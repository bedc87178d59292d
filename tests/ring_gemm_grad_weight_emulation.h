// ring_gemm_grad_weight_emulation.h — main program of an emulated ring_gemm_grad_weight_sm90: small whole numbers as data,
// every sum compared exactly with plain loops. Included behind the device source; EMULATED_* are given by
// emulation_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_weights.h"

int main() {
  const long long *const input = kInputSize, *const output = kOutputSize;
  const bool images = TCONV_RANK == 1;

  Buffer<float> x(kBatch * kInChannels * kInputPlane), grad(kBatch * kOutChannels * kOutputPlane);
  fill(x, kBatch * kInChannels * kInputPlane);
  fill(grad, kBatch * kOutChannels * kOutputPlane);

  RingGradArgs a{};
  a.input = x.first, a.grad_output = grad.first;
  a.input_channel = kInputPlane, a.grad_channel = kOutputPlane;
  a.input_image = kInputPlane * kInChannels, a.grad_image = kOutputPlane * kOutChannels;
  a.input_slab = input[1] * input[2], a.grad_slab = output[1] * output[2];
  a.input_row = images ? a.input_image : input[2], a.grad_row = images ? a.grad_image : output[2];
  a.input_d = input[0], a.input_h = images ? kBatch : input[1], a.input_w = input[2];
  a.grad_d = output[0], a.grad_h = images ? kBatch : output[1], a.grad_w = output[2];
  a.strips = (a.input_w + RW_TILE - 1) / RW_TILE;
  a.item_steps = a.input_h + RW_SPAN;
  a.steps = static_cast<long long>(a.strips) * (images ? 1 : input[0] * kBatch) * a.item_steps;
  a.shares = 3;

  // The sums as tap_gemm_finish finds them: [block][share][set][8 columns][warp][lane][4].
  constexpr int kMBlocks = RW_BLOCKS_M * RW_M_BLOCKS;
  constexpr long long kBlockFloats = static_cast<long long>(RW_SETS) * RW_TAPS_H * 64 * RW_N;
  const int blocks = TCONV_GROUPS * RW_BLOCKS_M * RW_BLOCKS_N * RW_SLICES;
  std::vector<float> partial(static_cast<std::size_t>(blocks * RW_M_BLOCKS * a.shares * kBlockFloats), NAN);
  a.partial = partial.data();
  emulated_launch(blocks * a.shares, kThreads, kLoaders, [&] { ring_gemm_grad_weight(a); });

  const int slice_tap[] = {TG_SLICE_TAP};
  std::vector<float> got(static_cast<std::size_t>(kInChannels) * TCONV_CO * kTaps, NAN);
  for (long long element = 0; element < blocks * RW_M_BLOCKS * kBlockFloats; ++element) {
    const long long block = element / kBlockFloats;
    const int slice = block % RW_SLICES, block_n = block / RW_SLICES % RW_BLOCKS_N;
    const int block_m = block / RW_SLICES / RW_BLOCKS_N % kMBlocks, group = block / RW_SLICES / RW_BLOCKS_N / kMBlocks;
    int rest = static_cast<int>(element % kBlockFloats);
    const int r = rest % 4, lane = rest / 4 % 32, warp = rest / 128 % 4;
    rest /= 512;
    const int row = warp * 16 + lane / 4 + r / 2 * 8, column = rest % (RW_N / 8) * 8 + lane % 4 * 2 + r % 2;
    const int t = rest / (RW_N / 8) * (64 / RW_CHANNELS) + row / RW_CHANNELS;
    const int co = block_m * RW_CHANNELS + row % RW_CHANNELS, ci = block_n * RW_N + column;
    const int tap = slice_tap[slice * TG_TAPS + t];
    if (ci >= TCONV_CI || co >= TCONV_CO || tap < 0) continue;
    float sum = 0;
    for (int share = 0; share < a.shares; ++share)
      sum += partial[static_cast<std::size_t>((block * a.shares + share) * kBlockFloats + element % kBlockFloats)];
    got[static_cast<std::size_t>(((group * TCONV_CI + ci) * TCONV_CO + co) * kTaps + tap)] = sum;
  }

  return weights_that_differ(x.first, grad.first, got) != 0;
}
