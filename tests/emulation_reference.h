// emulation_reference.h — a forward pass or input gradient in plain loops, compared exactly with what an emulated kernel has
// stored: small whole numbers as data, results filled with NaN before. Needs the layer's definitions (TCONV_*).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "emulation_data.h"

namespace {

float value_of(float x) { return x; }
float value_of(f16_t x) { return emulated_f16(x.bits); }
float value_of(bf16_t x) { return emulated_bf16(x.bits); }
void assign(float& to, float x) { to = x; }
void assign(f16_t& to, float x) { to.bits = emulated_f16_of(x); }
void assign(bf16_t& to, float x) { to.bits = emulated_bf16_of(x); }

struct Convolution {
  static constexpr int kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;
  bool forward;
  long long batch = EMULATED_BATCH, input[3] = {EMULATED_INPUT}, output[3] = {EMULATED_OUTPUT};
  int source_channels, result_channels;
  long long source_plane, result_plane;
  Buffer<storage_t> x, bias;
  Buffer<operand_t> operand;  // of an operation with a value per channel
  Buffer<output_t> y;
  std::vector<storage_t> w;

  explicit Convolution(bool is_forward)
      : forward(is_forward),
        source_channels((forward ? TCONV_CI : TCONV_CO) * TCONV_GROUPS),
        result_channels((forward ? TCONV_CO : TCONV_CI) * TCONV_GROUPS),
        source_plane(source()[0] * source()[1] * source()[2]),
        result_plane(result()[0] * result()[1] * result()[2]),
        x(batch * source_channels * source_plane),
        bias(result_channels),
        operand(result_channels),
        y(batch * result_channels * result_plane),
        w(static_cast<std::size_t>(TCONV_CI) * TCONV_GROUPS * TCONV_CO * kTaps) {
    for (long long i = 0; i < batch * source_channels * source_plane; ++i) assign(x.first[i], small_number());
    for (storage_t& weight : w) assign(weight, small_number());
    for (int c = 0; c < result_channels; ++c) {
      assign(bias.first[c], c % 7 - 3);
      assign(operand.first[c], c % 5 - 2);
    }
  }
  const long long* source() const { return forward ? input : output; }
  const long long* result() const { return forward ? output : input; }

  static long long element(const long long* size, int channels, long long b, long long c, long long d, long long h,
                           long long v) {
    return TCONV_CHANNELS_LAST ? (((b * size[0] + d) * size[1] + h) * size[2] + v) * channels + c
                               : (((b * channels + c) * size[0] + d) * size[1] + h) * size[2] + v;
  }
  float expected(long long b, int c, const long long (&where)[3], const Operands& operands) const {
    const int kernel[3] = {TCONV_K0, TCONV_K1, TCONV_K2}, stride[3] = {TCONV_S0, TCONV_S1, TCONV_S2};
    const int padding[3] = {TCONV_P0, TCONV_P1, TCONV_P2}, dilation[3] = {TCONV_D0, TCONV_D1, TCONV_D2};
    const int group = c / (result_channels / TCONV_GROUPS), k_group = source_channels / TCONV_GROUPS;
    float sum = TCONV_BIAS ? value_of(bias.first[c]) : 0.f;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int t[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
      long long q[3];
      bool inside = true;
      for (int dim = 0; dim < 3; ++dim) {
        const long long offset = static_cast<long long>(dilation[dim]) * t[dim] - padding[dim];
        const long long reached = forward ? where[dim] - offset : where[dim] * stride[dim] + offset;
        q[dim] = forward ? reached / stride[dim] : reached;
        inside = inside && reached >= 0 && (!forward || reached % stride[dim] == 0) && q[dim] < source()[dim];
      }
      if (!inside) continue;
      for (int k = 0; k < k_group; ++k) {
        const long long ci = forward ? group * TCONV_CI + k : c, co = forward ? c % TCONV_CO : k;
        sum += value_of(w[static_cast<std::size_t>((ci * TCONV_CO + co) * kTaps + tap)]) *
               value_of(x.first[element(source(), source_channels, b, group * k_group + k, q[0], q[1], q[2])]);
      }
    }
    output_t rounded;
    assign(rounded, tconv_epilogue<float>(sum, c, 0, operands));
    return value_of(rounded);
  }
  // How many results differ; the first few are printed.
  long long compare(const Operands& operands) const {
    const long long* const size = result();
    long long differ = 0;
    for (long long index = 0; index < batch * result_channels * result_plane; ++index) {
      const long long where[3] = {index / (size[1] * size[2]) % size[0], index / size[2] % size[1], index % size[2]};
      const int c = static_cast<int>(index / result_plane % result_channels);
      const long long b = index / result_plane / result_channels;
      const float want = expected(b, c, where, operands);
      const float got = value_of(y.first[element(size, result_channels, b, c, where[0], where[1], where[2])]);
      if (!(got == want) && differ++ < 3)
        std::printf("[b=%lld, c=%d, %lld, %lld, %lld]: got %g, expected %g\n", b, c, where[0], where[1], where[2], got,
                    want);
    }
    std::printf("%lld of %lld differ\n", differ, batch * result_channels * result_plane);
    return differ;
  }
};

}  // namespace
