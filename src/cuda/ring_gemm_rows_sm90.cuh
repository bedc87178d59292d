// ring_gemm_rows_sm90.cuh — how the loading warps of ring_gemm_sm90 stage contiguous tensors whose rows are multiples of 16
// bytes: the copy engine brings rows of a chunk of channels, the warps turn them into units of channels.
//
// A box is RG_RAW_ROWS rows of RG_RAW_WIDE 16-byte columns for RG_RAW_UNITS units of channels, zeros outside the tensor.
// Every warp has RG_RAW_SLOTS boxes of its own under way, so that warps meet only at the stages. A box starts on a 16-byte boundary of its row (the engine refuses others), up to 3 fp32 or 7 16-bit
// columns early. Rows and columns are odd, so that the same columns of 8 neighbouring channels lie in different banks.
// fp32 values are rounded on the way; 16-bit ones turn 8 channels x 8 columns by ldmatrix and stmatrix.
// SPDX-License-Identifier: Apache-2.0
#pragma once

constexpr int kRowChunks = (RG_JH + RG_RAW_ROWS - 1) / RG_RAW_ROWS;
constexpr int kUnitParts = kUnits / RG_RAW_UNITS;
constexpr int kRawBoxes = RG_NPW * kRowsD * RG_NPH * kRowChunks * kUnitParts;  // of a stage
constexpr int kRawPitch = RG_RAW_ROWS * RG_RAW_WIDE;                           // units between channels
constexpr int kRawUnits = RG_RAW_UNITS * kPerUnit * kRawPitch;
constexpr int kColumnsOfUnit = kPerUnit;

#if TCONV_DTYPE_f32
__device__ __forceinline__ void turn_box(const uint4* raw, uint4* tile, uint4*, int rows, int early, int lane) {
  // 8 lanes that store together: neighbouring planes and every fourth position, all in different banks. The four eights of
  // a warp take the box's other units, then further columns.
  constexpr int kAcross = RG_RAW_UNITS < 4 ? RG_RAW_UNITS : 4, kUnitGroups = RG_RAW_UNITS / kAcross;
  constexpr int kAlong = 8 / kAcross, kStep = kAlong * (4 / kUnitGroups);
  const int u = lane % kAcross + lane / 8 % kUnitGroups * kAcross;
  const int g0 = lane / 8 / kUnitGroups * kAlong + lane % 8 / kAcross;
  raw += u * 4 * kRawPitch;
  tile += u * kPlane - early;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
#pragma unroll 2
    for (int g = g0; g < RG_RAW_WIDE; g += kStep) {
      const uint4* from = raw + g;
      const uint4 a = from[0], b = from[kRawPitch], c = from[2 * kRawPitch], d = from[3 * kRawPitch];
      const int column = 4 * g - early;
      uint4* to = tile + 4 * g;
      if ((unsigned)column < RG_JW) to[0] = rounded(a.x, b.x, c.x, d.x);
      if ((unsigned)(column + 1) < RG_JW) to[1] = rounded(a.y, b.y, c.y, d.y);
      if ((unsigned)(column + 2) < RG_JW) to[2] = rounded(a.z, b.z, c.z, d.z);
      if ((unsigned)(column + 3) < RG_JW) to[3] = rounded(a.w, b.w, c.w, d.w);
    }
    raw += RG_RAW_WIDE, tile += RG_JW;
  }
}
#else
// Four matrices at a time, neighbouring units of channels and then columns; a lane names a line of one of them, so an
// instruction's addresses are those of the one before plus a constant. Several are read before the first is written.
__device__ __forceinline__ void turn_box(const uint4* raw, uint4* tile, uint4* nowhere, int rows, int early, int lane) {
  constexpr int kAcross = RG_RAW_UNITS < 4 ? RG_RAW_UNITS : 4, kAlong = 4 / kAcross, kTurns = RG_RAW_UNITS / kAcross;
  constexpr int kAtOnce = 4;
  const int line = lane % 8, u = lane / 8 % kAcross, g0 = lane / 8 / kAcross;
  raw += (u * 8 + line) * kRawPitch + g0;
  const int column0 = g0 * 8 + line - early;
  tile += u * kPlane + column0;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
#pragma unroll(kTurns*((RG_RAW_WIDE + kAlong * kAtOnce - 1) / (kAlong * kAtOnce)) <= 4 ? 4 : 1)
    for (int g = 0; g < RG_RAW_WIDE; g += kAlong * kAtOnce) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        unsigned matrix[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = g + i * kAlong;
          if (RG_RAW_WIDE % (kAlong * kAtOnce) != 0 && at >= RG_RAW_WIDE) break;
          const bool exists = kAlong == 1 || at + g0 < RG_RAW_WIDE;
          load_turned_matrices(exists ? raw + turn * (kAcross * 8 * kRawPitch) + at : raw, matrix[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = g + i * kAlong;
          if (RG_RAW_WIDE % (kAlong * kAtOnce) != 0 && at >= RG_RAW_WIDE) break;
          const bool exists = (kAlong == 1 || at + g0 < RG_RAW_WIDE) && (unsigned)(column0 + at * 8) < RG_JW;
          store_matrices<false>(exists ? tile + turn * (kAcross * kPlane) + at * 8 : nowhere, matrix[i][0],
                                matrix[i][1], matrix[i][2], matrix[i][3]);
        }
      }
    }
    raw += RG_RAW_WIDE, tile += RG_JW;
  }
}
#endif

struct Box {
  int part, chunk, ph, d_row, pw;
  __device__ __forceinline__ explicit Box(int box)
      : part(box % kUnitParts),
        chunk(box / kUnitParts % kRowChunks),
        ph(box / (kUnitParts * kRowChunks) % RG_NPH),
        d_row(box / (kUnitParts * kRowChunks * RG_NPH) % kRowsD),
        pw(box / (kUnitParts * kRowChunks * RG_NPH * kRowsD)) {}
};

__device__ __forceinline__ void load_rows(const RingGemmArgs& a, uint4* raw, uint4* tiles, Barrier* arrived,
                                          Barrier* full, Barrier* empty, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  raw += warp * (RG_RAW_SLOTS * kRawUnits);
  arrived += warp * RG_RAW_SLOTS;
  uint4* const nowhere = raw + (RG_LOAD_WARPS - warp) * (RG_RAW_SLOTS * kRawUnits);
  Cursor now(a);
  // Lane 0 tells the copy engine what comes next, RG_RAW_SLOTS boxes ahead.
  Cursor ahead = now;
  int ahead_box = warp;
  auto bring = [&](int slot) {
    if (!ahead.valid) return;
    const Box box(ahead_box);
    barrier_expect(arrived + slot, kRawUnits * 16);
    copy_box(raw + slot * kRawUnits, a.map, (ahead.w0 + rg_planes_w[box.pw]) & -kColumnsOfUnit,
             ahead.h0 + rg_planes_h[box.ph] + box.chunk * (RG_RAW_ROWS * RG_SRC_H),
             ahead.d0 + rg_planes_d[box.d_row / RG_JD] + box.d_row % RG_JD * RG_SRC_D,
             ahead.first_channel + ahead.channel + box.part * (RG_RAW_UNITS * kPerUnit), ahead.image, arrived + slot);
    ahead_box += RG_LOAD_WARPS;
    if (ahead_box >= kRawBoxes) {
      ahead_box = warp;
      ahead.advance(a, 1);
    }
  };
  if (lane == 0 && warp < kRawBoxes)
    for (int slot = 0; slot < RG_RAW_SLOTS; ++slot) bring(slot);
  RingPlace<RG_STAGES> at;
  RingPlace<RG_RAW_SLOTS> raw_at;
  for (; now.valid; now.advance(a, 1)) {
    barrier_wait(empty + at.stage, at.parity ^ 1);
    uint4* const tile = tiles + at.stage * kStageUnits;
#pragma unroll 1
    for (int index = warp; index < kRawBoxes; index += RG_LOAD_WARPS) {
      const Box box(index);
      const int left = RG_JH - box.chunk * RG_RAW_ROWS, early = (now.w0 + rg_planes_w[box.pw]) & (kColumnsOfUnit - 1);
      uint4* const to = tile + box.part * (RG_RAW_UNITS * kPlane) + box.pw * (kRows * RG_JW) +
                        (box.d_row * kRowsH + box.ph * RG_JH + box.chunk * RG_RAW_ROWS) * RG_JW;
      barrier_wait(arrived + raw_at.stage, raw_at.parity);
      turn_box(raw + raw_at.stage * kRawUnits, to, nowhere, left < RG_RAW_ROWS ? left : RG_RAW_ROWS, early, lane);
      __syncwarp();
      if (lane == 0) bring(raw_at.stage);
      raw_at.advance();
    }
    barrier_arrive(full + at.stage);
    at.advance();
  }
}
