// emulation_weights.h — the weight gradient in plain loops, for the main programs of emulated kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_data.h"

namespace {

constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;
constexpr int kInChannels = TCONV_CI * TCONV_GROUPS, kOutChannels = TCONV_CO * TCONV_GROUPS;
constexpr long long kBatch = EMULATED_BATCH, kInputSize[3] = {EMULATED_INPUT}, kOutputSize[3] = {EMULATED_OUTPUT};
constexpr long long kInputPlane = kInputSize[0] * kInputSize[1] * kInputSize[2];
constexpr long long kOutputPlane = kOutputSize[0] * kOutputSize[1] * kOutputSize[2];

// Where an element of the input or of grad_output lies.
long long element_at(const long long (&size)[3], int channels, long long b, long long c, const long long (&o)[3]) {
  const long long plane = size[0] * size[1] * size[2], position = (o[0] * size[1] + o[1]) * size[2] + o[2];
  return TCONV_CHANNELS_LAST ? (b * plane + position) * channels + c : (b * channels + c) * plane + position;
}

void fill(Buffer<storage_t>& tensor, long long elements) {
  for (long long i = 0; i < elements; ++i) tensor.first[i] = narrow<storage_t>(static_cast<float>(small_number()));
}

// Elements of grad_weight that are not those of the loops; prints the first.
template <typename T>
long long weights_that_differ(const storage_t* x, const storage_t* grad, const std::vector<T>& got) {
  const int kernel[3] = {TCONV_K0, TCONV_K1, TCONV_K2}, stride[3] = {TCONV_S0, TCONV_S1, TCONV_S2};
  const int padding[3] = {TCONV_P0, TCONV_P1, TCONV_P2}, dilation[3] = {TCONV_D0, TCONV_D1, TCONV_D2};
  long long differ = 0;
  for (int c = 0; c < kInChannels; ++c)
    for (int co = 0; co < TCONV_CO; ++co)
      for (int tap = 0; tap < kTaps; ++tap) {
        const int t[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
        double sum = 0;
        for (long long b = 0; b < kBatch; ++b)
          for (long long i = 0; i < kInputPlane; ++i) {
            const long long from[3] = {i / (kInputSize[1] * kInputSize[2]), i / kInputSize[2] % kInputSize[1],
                                       i % kInputSize[2]};
            long long o[3];
            bool inside = true;
            for (int dim = 0; dim < 3; ++dim) {
              o[dim] = from[dim] * stride[dim] + t[dim] * dilation[dim] - padding[dim];
              inside = inside && o[dim] >= 0 && o[dim] < kOutputSize[dim];
            }
            if (inside)
              sum += static_cast<double>(widen(x[element_at(kInputSize, kInChannels, b, c, from)])) *
                     widen(grad[element_at(kOutputSize, kOutChannels, b, c / TCONV_CI * TCONV_CO + co, o)]);
          }
        const T value = got[static_cast<std::size_t>((static_cast<long long>(c) * TCONV_CO + co) * kTaps + tap)];
        if (!(widen(value) == widen(narrow<T>(static_cast<float>(sum)))) && differ++ < 3)
          std::printf("[ci=%d, co=%d, tap %d]: got %g, expected %g\n", c, co, tap, widen(value), sum);
      }
  std::printf("%lld of %zu weights differ\n", differ, got.size());
  return differ;
}

}  // namespace
