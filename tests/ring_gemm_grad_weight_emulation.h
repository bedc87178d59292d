// ring_gemm_grad_weight_emulation.h — main program of an emulated ring_gemm_grad_weight_sm90: small whole numbers as data,
// every sum compared exactly with plain loops. Included behind the device source; EMULATED_* are given by
// emulation_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_data.h"

int main() {
  const long long batch = EMULATED_BATCH, input[3] = {EMULATED_INPUT}, output[3] = {EMULATED_OUTPUT};
  const int kernel[3] = {TCONV_K0, TCONV_K1, TCONV_K2}, stride[3] = {TCONV_S0, TCONV_S1, TCONV_S2};
  const int padding[3] = {TCONV_P0, TCONV_P1, TCONV_P2}, dilation[3] = {TCONV_D0, TCONV_D1, TCONV_D2};
  const bool images = TCONV_RANK == 1;
  const int in_channels = TCONV_CI * TCONV_GROUPS, out_channels = TCONV_CO * TCONV_GROUPS;
  const long long input_plane = input[0] * input[1] * input[2], output_plane = output[0] * output[1] * output[2];
  constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;

  Buffer<float> x(batch * in_channels * input_plane), grad(batch * out_channels * output_plane);
  for (long long i = 0; i < batch * in_channels * input_plane; ++i) x.first[i] = small_number();
  for (long long i = 0; i < batch * out_channels * output_plane; ++i) grad.first[i] = small_number();

  RingGradArgs a{};
  a.input = x.first, a.grad_output = grad.first;
  a.input_channel = input_plane, a.grad_channel = output_plane;
  a.input_image = input_plane * in_channels, a.grad_image = output_plane * out_channels;
  a.input_slab = input[1] * input[2], a.grad_slab = output[1] * output[2];
  a.input_row = images ? a.input_image : input[2], a.grad_row = images ? a.grad_image : output[2];
  a.input_d = input[0], a.input_h = images ? batch : input[1], a.input_w = input[2];
  a.grad_d = output[0], a.grad_h = images ? batch : output[1], a.grad_w = output[2];
  a.strips = (a.input_w + RW_TILE - 1) / RW_TILE;
  a.item_steps = a.input_h + RW_SPAN;
  a.steps = static_cast<long long>(a.strips) * (images ? 1 : input[0] * batch) * a.item_steps;
  a.shares = 3;
  a.copy_bytes = 16;
  while (reinterpret_cast<std::uintptr_t>(x.first) % a.copy_bytes != 0 || input[2] * 4 % a.copy_bytes != 0)
    a.copy_bytes /= 2;

  // The sums as tap_gemm_finish finds them: [block][share][set][8 columns][warp][lane][4].
  constexpr int kMBlocks = RW_BLOCKS_M * RW_M_BLOCKS;
  constexpr long long kBlockFloats = static_cast<long long>(RW_SETS) * RW_TAPS_H * 64 * RW_N;
  const int blocks = TCONV_GROUPS * RW_BLOCKS_M * RW_BLOCKS_N * RW_SLICES;
  std::vector<float> partial(static_cast<std::size_t>(blocks * RW_M_BLOCKS * a.shares * kBlockFloats), NAN);
  a.partial = partial.data();
  emulated_launch(blocks * a.shares, kThreads, kLoaders, [&] { ring_gemm_grad_weight(a); });

  const int slice_tap[] = {TG_SLICE_TAP};
  std::vector<float> got(static_cast<std::size_t>(in_channels) * TCONV_CO * kTaps, NAN);
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

  long long differ = 0;
  for (int c = 0; c < in_channels; ++c)
    for (int co = 0; co < TCONV_CO; ++co)
      for (int tap = 0; tap < kTaps; ++tap) {
        const int t[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
        double sum = 0;
        for (long long b = 0; b < batch; ++b)
          for (long long i = 0; i < input_plane; ++i) {
            const long long at[3] = {i / (input[1] * input[2]), i / input[2] % input[1], i % input[2]};
            long long o[3];
            bool inside = true;
            for (int dim = 0; dim < 3; ++dim) {
              o[dim] = at[dim] * stride[dim] + t[dim] * dilation[dim] - padding[dim];
              inside = inside && o[dim] >= 0 && o[dim] < output[dim];
            }
            if (!inside) continue;
            const long long channel = b * out_channels + c / TCONV_CI * TCONV_CO + co;
            sum += static_cast<double>(x.first[(b * in_channels + c) * input_plane + i]) *
                   grad.first[channel * output_plane + (o[0] * output[1] + o[1]) * output[2] + o[2]];
          }
        const float value = got[static_cast<std::size_t>((static_cast<long long>(c) * TCONV_CO + co) * kTaps + tap)];
        if (!(value == static_cast<float>(sum)) && differ++ < 3)
          std::printf("[ci=%d, co=%d, tap %d]: got %g, expected %g\n", c, co, tap, value, sum);
      }
  std::printf("%lld of %zu differ\n", differ, got.size());
  return differ != 0;
}
