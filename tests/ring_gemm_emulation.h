// ring_gemm_emulation.h — main program of an emulated ring_gemm_sm90: small whole numbers as data, every result compared
// exactly with plain loops, results filled with NaN before. Included behind the device source; EMULATED_* are given on
// the command line of the compiler by emulation_test.cpp.
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

}  // namespace

int main() {
  const long long batch = EMULATED_BATCH;
  long long input[3] = {EMULATED_INPUT}, output[3] = {EMULATED_OUTPUT};
  if (RG_WINDOW > 0 && input[0] == 1) {  // a 2d layer whose height is walked as a depth
    std::swap(input[0], input[1]);
    std::swap(output[0], output[1]);
  }
  const int kernel[3] = {TCONV_K0, TCONV_K1, TCONV_K2}, stride[3] = {TCONV_S0, TCONV_S1, TCONV_S2};
  const int padding[3] = {TCONV_P0, TCONV_P1, TCONV_P2}, dilation[3] = {TCONV_D0, TCONV_D1, TCONV_D2};
  const bool forward = RG_FORWARD, last = TCONV_CHANNELS_LAST, images = TCONV_RANK == 1;
  const long long* const source = forward ? input : output;
  const long long* const result = forward ? output : input;
  const int source_channels = (forward ? TCONV_CI : TCONV_CO) * TCONV_GROUPS;
  const int result_channels = (forward ? TCONV_CO : TCONV_CI) * TCONV_GROUPS;
  const long long source_plane = source[0] * source[1] * source[2], result_plane = result[0] * result[1] * result[2];
  const long long weights = static_cast<long long>(TCONV_CI) * TCONV_GROUPS * TCONV_CO * RG_NUM_TAPS;

  Buffer<storage_t> x(batch * source_channels * source_plane), bias(result_channels);
  Buffer<operand_t> operand(result_channels);  // of an operation with a value per channel
  Buffer<output_t> y(batch * result_channels * result_plane);
  std::vector<storage_t> w(static_cast<std::size_t>(weights));
  for (long long i = 0; i < batch * source_channels * source_plane; ++i) assign(x.first[i], small_number());
  for (storage_t& weight : w) assign(weight, small_number());
  for (int c = 0; c < result_channels; ++c) {
    assign(bias.first[c], c % 7 - 3);
    assign(operand.first[c], c % 5 - 2);
  }

  RingGemmArgs a{};
  a.source = x.first, a.bias = bias.first, a.result = y.first, a.operands.at[0] = operand.first;
  auto strides = [&](long long& image, long long& slab, long long& row, long long& inner, const long long* size,
                     int channels, long long plane) {
    image = channels * plane;
    row = images ? image : size[2] * (last ? channels : 1);
    slab = size[1] * size[2] * (last ? channels : 1);
    inner = last ? channels : plane;
  };
  strides(a.source_image, a.source_slab, a.source_row, a.source_inner, source, source_channels, source_plane);
  strides(a.result_image, a.result_slab, a.result_row, a.result_inner, result, result_channels, result_plane);
  a.source_d = source[0], a.source_h = images ? batch : source[1], a.source_w = source[2];
  a.result_d = result[0], a.result_h = images ? batch : result[1], a.result_w = result[2];
  auto tiles = [](long long size, int step, int tile) {
    return static_cast<int>(((size + step - 1) / step + tile - 1) / tile);
  };
  a.tiles_d = tiles(a.result_d, RG_OUT_D, 1), a.tiles_h = tiles(a.result_h, RG_OUT_H, RG_TILE_H);
  a.tiles_w = tiles(a.result_w, RG_OUT_W, RG_TILE_W);
  constexpr int kRowItems = (RG_ROW_BLOCKS + RG_ROW_GROUPS - 1) / RG_ROW_GROUPS;
  a.segment = RG_WINDOW > 0 ? std::max(1, a.tiles_d * 2 / 3) : 1;
  a.segments_d = (a.tiles_d + a.segment - 1) / a.segment;
  a.segments_behind = a.tiles_h * a.tiles_w * kRowItems;
  a.items = static_cast<unsigned>(a.segments_d * a.tiles_h * a.tiles_w * (images ? 1 : batch)) * TCONV_GROUPS *
            kRowItems * (RG_PASS_PER_ITEM ? RG_NUM_PASSES : 1);
  constexpr int kWide = 16 / sizeof(output_t);
  alignas(16) static unsigned packed[TCONV_GROUPS * RG_ROW_BLOCKS * RG_NUM_ENTRIES * RG_CHUNKS * RG_KC * 64];
  constexpr unsigned kPackBlocks = TCONV_GROUPS * RG_ROW_BLOCKS * RG_CHUNKS * ((RG_KC / 4 + 3) / 4);
#if RG_PACK_SOURCE
  constexpr long long kChannels = RG_CHUNKS * RG_KC * 4 / sizeof(storage_t);
  std::vector<uint4> copy(
      static_cast<std::size_t>(batch * TCONV_GROUPS * source_plane * kChannels * sizeof(storage_t) / 16));
  const bool pairs = source_plane % 2 == 0 && reinterpret_cast<std::uintptr_t>(x.first) % 4 == 0;
  pack::SourcePack source_pack{x.first,        copy.data(),
                               a.source_image, a.source_inner,
                               source_plane,   static_cast<int>((source_plane + pack::kTile - 1) / pack::kTile),
                               pairs,          0};
  source_pack.blocks = static_cast<unsigned>(batch * TCONV_GROUPS * source_pack.tiles * RG_CHUNKS);
  emulated_launch(3, 256, 1, [&] { pack::ring_gemm_pack(w.data(), packed, kPackBlocks, 0, 1, source_pack); });
#else
  emulated_launch(1, 256, 1, [&] { pack::ring_gemm_pack(w.data(), packed, kPackBlocks, 0); });
#endif
  a.weights = packed;
#if RG_TENSOR
  const long long size = sizeof(storage_t), channels = RG_PACK_SOURCE ? RG_CHUNKS * RG_KC * 4 / size : source_channels;
  const long long copies = RG_PACK_SOURCE ? TCONV_GROUPS : 1, position = channels * size;
  EmulatedTensor tensor{reinterpret_cast<const unsigned char*>(x.first),
                        sizeof(storage_t),
                        RG_KC * 4,
                        {channels, source[2], images ? batch : source[1], source[0], images ? copies : batch * copies},
                        {position, position * source[2] * (images ? copies : 1), position * source[2] * source[1],
                         position * source_plane},
                        {static_cast<int>(RG_KC * 4 / size), RG_JW, RG_JH, 1, 1},
                        {1, RG_SRC_W, RG_SRC_H, 1, 1}};
#if RG_PACK_SOURCE
  tensor.first = reinterpret_cast<const unsigned char*>(copy.data());
#endif
  a.tensor = reinterpret_cast<std::uintptr_t>(tensor.first) % 16 == 0;
  a.tensor_channels = RG_PACK_SOURCE ? 0 : RG_K, a.tensor_groups = RG_PACK_SOURCE;
  a.tensor_images = RG_PACK_SOURCE && !images ? TCONV_GROUPS : 1;
  a.map.word[0] = reinterpret_cast<std::uintptr_t>(&tensor);
#endif
#if RG_ROWS
  const long long size = sizeof(storage_t);
  EmulatedTensor tensor{
      reinterpret_cast<const unsigned char*>(x.first),
      sizeof(storage_t),
      0,
      {source[2], images ? batch : source[1], source[0], source_channels, images ? 1 : batch},
      {a.source_row * size, a.source_slab * size, a.source_inner * size, a.source_image * size},
      {static_cast<int>(RG_RAW_WIDE * 16 / size), RG_RAW_ROWS, 1, static_cast<int>(RG_RAW_UNITS * 16 / size), 1},
      {RG_SRC_W, RG_SRC_H, 1, 1, 1}};
  a.map.word[0] = reinterpret_cast<std::uintptr_t>(&tensor);
#endif
  const auto to = reinterpret_cast<std::uintptr_t>(y.first);
  a.wide_stores =
      last ? to % 16 == 0 && RG_N_CHANNELS % kWide == 0 && RG_CHANNELS % kWide == 0 : to % 4 == 0 && result[2] % 2 == 0;
  emulated_launch(std::min(2u, a.items), kThreads, kLoaders, [&] { ring_gemm(a); });

  auto at = [&](const long long* size, int channels, long long b, long long c, long long d, long long h, long long v) {
    return last ? (((b * size[0] + d) * size[1] + h) * size[2] + v) * channels + c
                : (((b * channels + c) * size[0] + d) * size[1] + h) * size[2] + v;
  };
  long long differ = 0;
  for (long long index = 0; index < batch * result_channels * result_plane; ++index) {
    long long rest = index;
    const long long where[3] = {rest / (result[1] * result[2]) % result[0], rest / result[2] % result[1],
                                rest % result[2]};
    rest /= result_plane;
    const int c = static_cast<int>(rest % result_channels);
    const long long b = rest / result_channels;
    const int group = c / (result_channels / TCONV_GROUPS);
    float sum = TCONV_BIAS ? value_of(bias.first[c]) : 0.f;
    for (int tap = 0; tap < RG_NUM_TAPS; ++tap) {
      const int t[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
      long long q[3];
      bool inside = true;
      for (int dim = 0; dim < 3; ++dim) {
        const long long offset = static_cast<long long>(dilation[dim]) * t[dim] - padding[dim];
        const long long reached = forward ? where[dim] - offset : where[dim] * stride[dim] + offset;
        q[dim] = forward ? reached / stride[dim] : reached;
        inside = inside && reached >= 0 && (!forward || reached % stride[dim] == 0) && q[dim] < source[dim];
      }
      if (!inside) continue;
      for (int k = 0; k < source_channels / TCONV_GROUPS; ++k) {
        const long long ci = forward ? group * TCONV_CI + k : c, co = forward ? c % TCONV_CO : k;
        sum += value_of(w[static_cast<std::size_t>((ci * TCONV_CO + co) * RG_NUM_TAPS + tap)]) *
               value_of(x.first[at(source, source_channels, b, group * (source_channels / TCONV_GROUPS) + k, q[0], q[1],
                                   q[2])]);
      }
    }
    output_t rounded;
    assign(rounded, tconv_epilogue<float>(sum, c, 0, a.operands));
    const float got = value_of(y.first[at(result, result_channels, b, c, where[0], where[1], where[2])]);
    if (!(got == value_of(rounded)) && differ++ < 3)
      std::printf("[b=%lld, c=%d, %lld, %lld, %lld]: got %g, expected %g\n", b, c, where[0], where[1], where[2], got,
                  value_of(rounded));
  }
  std::printf("%lld of %lld differ\n", differ, batch * result_channels * result_plane);
  return differ != 0;
}
