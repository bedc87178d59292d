// ring_gemm_tensor_sm90.cuh — how the loading warp of ring_gemm_sm90 has the copy engine stage a tile; needs what stands
// before its include there.
//
// The source is seen as [image][depth][height][width][channel] with strides in 16 bytes: 16-bit channels_last tensors as
// they are, all others from a copy that ring_gemm_pack_sm90 makes. A box is RG_JH rows of RG_JW positions (every
// RG_SRC_H-th, RG_SRC_W-th) times a chunk of channels; one instruction stages it and fills with zeros what is outside.
// SPDX-License-Identifier: Apache-2.0
#pragma once

constexpr int kChunkChannels = kUnits * kPerUnit;

// Where box number `box` of a tile begins, relative to the tile's first position.
__device__ __forceinline__ void box_at(int box, int& d, int& h, int& w) {
  const int d_row = box / RG_NPH % kRowsD;
  d = rg_planes_d[d_row / RG_JD] + d_row % RG_JD * RG_SRC_D;
  h = rg_planes_h[box % RG_NPH];
  w = rg_planes_w[box / (RG_NPH * kRowsD)];
}

// A tensor that the copy engine cannot take (its first element is not on a 16-byte boundary), unit by unit, where the engine
// would put them. Slow, and rare.
__device__ __forceinline__ void gather_box(const RingGemmArgs& a, const Item& item, int d, int h, int w, int channel,
                                           uint4* to, int lane) {
  const storage_t* from = a.source + item.b * a.source_image + d * a.source_slab + item.group * RG_K;
  for (int i = lane; i < RG_JH * RG_JW * kUnits; i += 32) {
    const int p = i / kUnits, u = i % kUnits, row = h + p / RG_JW * RG_SRC_H, column = w + p % RG_JW * RG_SRC_W;
    const bool inside = (unsigned)d < (unsigned)a.source_d && (unsigned)row < (unsigned)a.source_h &&
                        (unsigned)column < (unsigned)a.source_w;
    storage_t unit[kPerUnit];
#pragma unroll
    for (int e = 0; e < kPerUnit; ++e) {
      const int c = channel + u * kPerUnit + e;
      unit[e] = inside && c < RG_K ? from[row * a.source_row + column * a.source_inner + c] : storage_t();
    }
    const int exchanged = u ^ (p * kUnits / 8 & (kUnits - 1));
    to[p * kUnits + exchanged] = unit_of(unit);
  }
}

__device__ __forceinline__ void load_tiles(const RingGemmArgs& a, uint4* tiles, Barrier* full, Barrier* empty,
                                           int lane) {
  RingPlace<RG_STAGES> at;
  for (Items items(a); items.any(); items.advance(a)) {
    const Item item = locate(a, items);
#if RG_WINDOW
    const int rows = items.at == 0 ? RG_WINDOW : RG_SRC_D;
    const int loads = rows * RG_CHUNKS, first_row = RG_WINDOW - rows;
#else
    const int loads = loads_of(item), first_row = 0;
#endif
    int d0 = item.q_d * RG_SRC_D + first_row;
    const int h0 = item.q_h * RG_SRC_H, w0 = item.q_w * RG_SRC_W;
    const int first = item.group * a.tensor_channels;
    const int image = static_cast<int>(item.b) * a.tensor_images + item.group * a.tensor_groups;
    for (int load = loads; load > 0; --load) {
      const int chunk = RG_CHUNKS == 1 ? 0 : (RG_CHUNKS - load % RG_CHUNKS) % RG_CHUNKS;
      barrier_wait(empty + at.stage, at.parity ^ 1);
      uint4* const tile = tiles + at.stage * kStageUnits;
      if (a.tensor) {
        if (lane == 0) {
          barrier_expect(full + at.stage, kBoxes * RG_JH * RG_JW * kUnits * 16);
#pragma unroll 1
          for (int box = 0; box < kBoxes; ++box) {
            int d, h, w;
            box_at(box, d, h, w);
            copy_box(tile + box * (RG_BOX * kUnits), a.map, first + chunk * kChunkChannels, w0 + w, h0 + h, d0 + d,
                     image, full + at.stage);
          }
        }
      } else {
#pragma unroll 1
        for (int box = 0; box < kBoxes; ++box) {
          int d, h, w;
          box_at(box, d, h, w);
          gather_box(a, item, d0 + d, h0 + h, w0 + w, chunk * kChunkChannels, tile + box * (RG_BOX * kUnits), lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(full + at.stage);
      }
      at.advance();
      if (RG_WINDOW && chunk == RG_CHUNKS - 1) ++d0;
    }
  }
}
