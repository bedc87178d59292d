// ring_gemm_rows_sm90.cuh — how the loading warps of ring_gemm_sm90 stage contiguous tensors whose rows are multiples of 16
// bytes: the copy engine brings rows of a chunk of channels, the warps turn them into units of channels.
//
// A box is RG_RAW_ROWS rows of RG_RAW_WIDE 16-byte units for every channel of the chunk, zeros outside the tensor, in one
// of RG_RAW_SLOTS places. It starts on a 16-byte boundary of its row (the engine refuses others), up to 3 fp32 or 7 16-bit
// columns early. Both numbers are odd, so that the same units of 8 neighbouring channels lie in different banks.
// fp32 values are rounded on the way; 16-bit ones turn 8 channels x 8 columns by ldmatrix and stmatrix.
// SPDX-License-Identifier: Apache-2.0
#pragma once

constexpr int kRowChunks = (RG_JH + RG_RAW_ROWS - 1) / RG_RAW_ROWS;
constexpr int kRawBoxes = RG_NPW * kRowsD * RG_NPH * kRowChunks;
constexpr int kChunkChannels = kUnits * kPerUnit;
constexpr int kRawPitch = RG_RAW_ROWS * RG_RAW_WIDE;  // units between channels
constexpr int kRawUnits = kChunkChannels * kRawPitch;
constexpr int kColumnsOfUnit = kPerUnit;

#if TCONV_DTYPE_f32
__device__ __forceinline__ void turn_box(const uint4* raw, uint4* tile, uint4*, int rows, int early, int thread) {
  // 8 lanes that store together: neighbouring planes and every fourth position, all in different banks.
  constexpr int kAcross = kUnits < 4 ? kUnits : 4, kAlong = 8 / kAcross;
  constexpr int kGroups = (RG_RAW_WIDE + kAlong - 1) / kAlong;
  const int count = rows * kGroups * kUnits * kAlong;
#pragma unroll 2
  for (int i = thread; i < count; i += kLoaders) {
    const int u = i % kAcross + i / 8 % (kUnits / kAcross) * kAcross, rest = i / 8 / (kUnits / kAcross);
    const int g = rest % kGroups * kAlong + i % 8 / kAcross, row = rest / kGroups;
    if (g >= RG_RAW_WIDE) continue;
    const uint4* from = raw + u * 4 * kRawPitch + row * RG_RAW_WIDE + g;
    const uint4 a = from[0], b = from[kRawPitch], c = from[2 * kRawPitch], d = from[3 * kRawPitch];
    const int column = 4 * g - early;
    uint4* to = tile + u * kPlane + row * RG_JW + column;
    if ((unsigned)column < RG_JW) to[0] = rounded(a.x, b.x, c.x, d.x);
    if ((unsigned)(column + 1) < RG_JW) to[1] = rounded(a.y, b.y, c.y, d.y);
    if ((unsigned)(column + 2) < RG_JW) to[2] = rounded(a.z, b.z, c.z, d.z);
    if ((unsigned)(column + 3) < RG_JW) to[3] = rounded(a.w, b.w, c.w, d.w);
  }
}
#else
// Four matrices of 8 x 8 16-bit elements, turned; a lane names one row of one of them on both sides.
__device__ __forceinline__ void turn_matrices(const void* from, void* to) {
  unsigned a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(shared_address(from))
               : "memory");
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void turn_box(const uint4* raw, uint4* tile, uint4* nowhere, int rows, int early,
                                         int thread) {
  const int count = rows * RG_RAW_WIDE * kUnits, row = thread % 8;
#pragma unroll 2
  for (int first = thread / 32 * 4; first < count; first += kLoaders / 8) {
    const int i = first + thread % 32 / 8, u = i % kUnits, g = i / kUnits % RG_RAW_WIDE, h = i / (kUnits * RG_RAW_WIDE);
    const bool exists = i < count;
    const int column = g * 8 + row - early;
    turn_matrices(exists ? raw + (u * 8 + row) * kRawPitch + h * RG_RAW_WIDE + g : raw,
                  exists && (unsigned)column < RG_JW ? tile + u * kPlane + h * RG_JW + column : nowhere);
  }
}
#endif

// The first thread of the loading warps also tells the copy engine what to bring, RG_RAW_SLOTS boxes ahead.
__device__ __forceinline__ void load_rows(const RingGemmArgs& a, uint4* raw, uint4* tiles, Barrier* arrived, Barrier* full,
                                          Barrier* empty, int thread) {
  Cursor ahead;
  ahead.item = blockIdx.x;
  ahead.find(a);
  Cursor now = ahead;
  uint4* const nowhere = raw + RG_RAW_SLOTS * kRawUnits;
  auto bring = [&](int slot) {
    if (!ahead.valid) return;
    const int box = ahead.round, chunk = box % kRowChunks, ph = box / kRowChunks % RG_NPH;
    const int d_row = box / (kRowChunks * RG_NPH) % kRowsD, pw = box / (kRowChunks * RG_NPH * kRowsD);
    barrier_expect(arrived + slot, kRawUnits * 16);
    copy_box(raw + slot * kRawUnits, a.map, (ahead.w0 + rg_planes_w[pw]) & -kColumnsOfUnit,
             ahead.h0 + rg_planes_h[ph] + chunk * (RG_RAW_ROWS * RG_SRC_H),
             ahead.d0 + rg_planes_d[d_row / RG_JD] + d_row % RG_JD * RG_SRC_D, ahead.first_channel + ahead.channel,
             ahead.image, arrived + slot);
    ahead.advance(a, kRawBoxes);
  };
  if (thread == 0)
    for (int slot = 0; slot < RG_RAW_SLOTS; ++slot) bring(slot);
  RingPlace<RG_STAGES> at;
  RingPlace<RG_RAW_SLOTS> raw_at;
  while (now.valid) {
    if (now.round == 0) barrier_wait(empty + at.stage, at.parity ^ 1);
    const int chunk = now.round % kRowChunks, plane = now.round / kRowChunks;  // of RG_JH rows
    barrier_wait(arrived + raw_at.stage, raw_at.parity);
    const int left = RG_JH - chunk * RG_RAW_ROWS;
    const int early = (now.w0 + rg_planes_w[plane / (RG_NPH * kRowsD)]) & (kColumnsOfUnit - 1);
    turn_box(raw + raw_at.stage * kRawUnits,
             tiles + at.stage * kStageUnits + (plane * RG_JH + chunk * RG_RAW_ROWS) * RG_JW, nowhere,
             left < RG_RAW_ROWS ? left : RG_RAW_ROWS, early, thread);
    loaders_barrier();
    if (thread == 0) bring(raw_at.stage);
    raw_at.advance();
    if (now.round == kRawBoxes - 1) {
      barrier_arrive(full + at.stage);
      at.advance();
    }
    now.advance(a, kRawBoxes);
  }
}
