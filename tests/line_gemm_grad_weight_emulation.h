// line_gemm_grad_weight_emulation.h — main program of an emulated line_gemm_grad_weight_sm90: small whole numbers as data,
// every weight compared exactly with plain loops. Included behind the device source; EMULATED_* are given by
// emulation_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_weights.h"

int main() {
  Buffer<storage_t> x(kBatch * kInChannels * kInputPlane), grad(kBatch * kOutChannels * kOutputPlane);
  fill(x, kBatch * kInChannels * kInputPlane);
  fill(grad, kBatch * kOutChannels * kOutputPlane);

  // Segments of two rows, so that blocks walk several of them, the last one shorter.
  LineGemmArgs a{};
  a.input = x.first, a.grad_output = grad.first;
  for (int dim = 0; dim < 3; ++dim)
    a.input_size[dim] = static_cast<int>(kInputSize[dim]), a.grad_size[dim] = static_cast<int>(kOutputSize[dim]);
  const long long whole = kOutputSize[2] / TCONV_S2, rest = kOutputSize[2] % TCONV_S2;
  a.tensor = EMULATED_OFFSET == 0 && whole > 0;
  a.tail = rest > 0 ? static_cast<int>(whole) : -1;
  a.tiles_d = (a.input_size[0] + LG_TD - 1) / LG_TD, a.tiles_w = (a.input_size[2] + LG_TW - 1) / LG_TW;
  a.segment = 2, a.segments_h = (a.input_size[1] + 1) / 2;
  a.segments = static_cast<unsigned>(kBatch * a.segments_h * a.tiles_d * a.tiles_w);
  a.shares = static_cast<int>(std::min(3u, a.segments));

  const long long row = kOutputSize[2] * kOutChannels;
  auto tensor = [](const void* first, int exchange, long long elements, long long line, long long lines, long long row,
                   const long long (&size)[3], int width, int box_lines, int depths) {
    const long long slab = row * size[1];
    return EmulatedTensor{static_cast<const unsigned char*>(first),
                          2,
                          exchange,
                          {elements, lines, size[1], size[0], kBatch},
                          {line * 2, row * 2, slab * 2, slab * size[0] * 2},
                          {width, box_lines, 1, depths, 1},
                          {1, 1, 1, 1, 1}};
  };
  const EmulatedTensor tensors[] = {
      tensor(x.first, LG_LINE, kInChannels, kInChannels, kInputSize[2], kInputSize[2] * kInChannels, kInputSize, LG_N,
             LG_TW, LG_TD),
      tensor(grad.first, 128, kLineElements, kLineElements, whole, row, kOutputSize, 64, LG_LINES, 1),
      tensor(grad.first, 128, rest * kOutChannels, kLineElements, whole + 1, row, kOutputSize, 64, 1, 1)};
  a.input_map.word[0] = reinterpret_cast<std::uintptr_t>(&tensors[0]);
  a.grad_map.word[0] = reinterpret_cast<std::uintptr_t>(&tensors[1]);
  a.tail_map.word[0] = reinterpret_cast<std::uintptr_t>(&tensors[2]);

  constexpr int kBlocks = LG_BLOCKS_N * LG_SLICES;
  std::vector<float> partial(static_cast<std::size_t>(kBlocks) * a.shares * TG_BLOCK_FLOATS, NAN);
  a.partial = partial.data();
  emulated_launch(kBlocks * a.shares, kThreads, 1, [&] { line_gemm_grad_weight(a); });

  std::vector<storage_t> got(static_cast<std::size_t>(kInChannels) * kOutChannels * kTaps);
  std::memset(static_cast<void*>(got.data()), 0xff, got.size() * sizeof(storage_t));
  const unsigned fragments = static_cast<unsigned>(static_cast<long long>(kBlocks) * TG_BLOCK_FLOATS / 4);
  const int lanes = a.shares == 1 ? 1 : a.shares == 2 ? 2 : 4;
  emulated_launch((fragments * lanes + 255) / 256, 256, 1, [&] {
    finish::tap_gemm_finish(reinterpret_cast<const float4*>(partial.data()), got.data(), a.shares, fragments, lanes);
  });
  return weights_that_differ(x.first, grad.first, got) != 0;
}
