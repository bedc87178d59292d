// ring_gemm_emulation.h — main program of an emulated ring_gemm_sm90: small whole numbers as data, every result compared
// exactly with plain loops, results filled with NaN before. Included behind the device source; EMULATED_* are given on
// the command line of the compiler by emulation_test.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tuple>

#include "emulation_reference.h"

int main() {
  const bool last = TCONV_CHANNELS_LAST, images = TCONV_RANK == 1;
  const Convolution given(RG_FORWARD);
  const auto& [x, bias, operand, y, w] = std::tie(given.x, given.bias, given.operand, given.y, given.w);
  const long long batch = given.batch, source_plane = given.source_plane, result_plane = given.result_plane;
  const long long* const source = given.source();
  const long long* const result = given.result();
  const int source_channels = given.source_channels, result_channels = given.result_channels;

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
  a.items = static_cast<unsigned>(a.tiles_d * a.tiles_h * a.tiles_w * (images ? 1 : batch)) * TCONV_GROUPS *
            ((RG_ROW_BLOCKS + RG_ROW_GROUPS - 1) / RG_ROW_GROUPS) * (RG_PASS_PER_ITEM ? RG_NUM_PASSES : 1);
  constexpr int kUnit = 16 / sizeof(storage_t), kWide = 16 / sizeof(output_t);
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
  a.tensor = reinterpret_cast<std::uintptr_t>(x.first) % 16 == 0 && source[2] * size % 16 == 0 &&
             (TCONV_GROUPS == 1 || RG_K * size % (RG_KC * 4) == 0);
  a.map.word[0] = reinterpret_cast<std::uintptr_t>(&tensor);
#endif
  const auto from = reinterpret_cast<std::uintptr_t>(x.first), to = reinterpret_cast<std::uintptr_t>(y.first);
  a.vector_loads = last ? from % 16 == 0 && RG_K % kUnit == 0 : source_plane % 4 == 0;
  a.wide_stores =
      last ? to % 16 == 0 && RG_N_CHANNELS % kWide == 0 && RG_CHANNELS % kWide == 0 : to % 4 == 0 && result[2] % 2 == 0;
  emulated_launch(std::min(2u, a.items), kThreads, kLoaders, [&] { ring_gemm(a); });

  return given.compare(a.operands) != 0;
}
