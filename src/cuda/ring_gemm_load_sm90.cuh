// ring_gemm_load_sm90.cuh — how the loading warps of ring_gemm_sm90 stage a tile; needs what stands before its include there.
//
// contiguous      see ring_gemm_rows_sm90.cuh; tensors that the copy engine cannot take: pieces of one unit of channels at twice 4 neighbouring columns, turned on the way ("vector"), or, where
//                 planes have odd sizes, at single positions ("gathered")
// channels_last   pieces of one unit of channels at 8 positions; 16-bit ones are copied straight to the tile
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "stage_sm90.cuh"

// Where a piece begins, relative to the tile's first position: elements; staged row << 16 | source column. Worked out
// once per block: the divisions took longer than the loads.
struct Place {
  int offset;
  unsigned where;
};

// Depth and height of a staged row, relative to the tile's first position.
__device__ __forceinline__ void row_at(int row, int& d, int& h) {
  const int d_row = row / kRowsH, h_row = row % kRowsH;
  d = rg_planes_d[d_row / RG_JD] + d_row % RG_JD * RG_SRC_D;
  h = rg_planes_h[h_row / RG_JH] + h_row % RG_JH * RG_SRC_H;
}
__device__ __forceinline__ int row_offset(const RingGemmArgs& a, int row) {
  int d, h;
  row_at(row, d, h);
  return static_cast<int>(d * a.source_slab + h * a.source_row);
}
// (depth - RG_LOW_D) << 16 | (height - RG_LOW_H)
__device__ __forceinline__ int row_reach(int row) {
  int d, h;
  row_at(row, d, h);
  return (d - RG_LOW_D) << 16 | (h - RG_LOW_H);
}
// Of a staged position, for pieces that are located position by position.
__device__ __forceinline__ Place position_place(const RingGemmArgs& a, int p) {
  const int row = p / RG_JW % kRows, w = rg_planes_w[p / (RG_JW * kRows)] + p % RG_JW * RG_SRC_W;
  return {static_cast<int>(row_offset(a, row) + w * (TCONV_CHANNELS_LAST ? a.source_inner : 1)),
          static_cast<unsigned>(row << 16 | (w - RG_SPAN_BEGIN))};
}

// kSlots pieces of 128 bytes are on their way per thread, asynchronously to the thread's own place in shared memory, while
// earlier ones are rounded, transposed and stored in the tile; the cursor of the copies runs one round (kSlots pieces)
// ahead of the cursor of the stores, across stages and items, so the flow never drains. Loads to registers cannot do
// this: the compiler makes one counter of all of them, and the first use waits for the last.
struct Cursor {
  Items items;
  int load, loads, round;
  int d0, h0, w0, channel;   // of the tile's first position; first channel of the chunk
  const storage_t* origin;   // element of that position and channel; may lie outside the tensor
  int image, first_channel;  // of the item, for boxes
  const storage_t* unit;     // contiguous: of the thread's unit of channels, which is that of all its vector pieces
  bool valid, interior;      // interior: nothing that is staged or read along with it lies outside its row

  __device__ __forceinline__ explicit Cursor(const RingGemmArgs& a) : items(a) { find(a); }
  __device__ __forceinline__ void find_interior(const RingGemmArgs& a) {
    constexpr int kAlong = TCONV_CHANNELS_LAST ? 0 : 3;  // a vector may begin so many elements early, or end late
    interior = d0 + RG_LOW_D >= 0 && d0 + RG_HIGH_D < a.source_d && h0 + RG_LOW_H >= 0 && h0 + RG_HIGH_H < a.source_h &&
               w0 + RG_SPAN_BEGIN - kAlong >= 0 && w0 + RG_SPAN_BEGIN + RG_SPAN + kAlong <= a.source_w;
  }
  __device__ __forceinline__ void find(const RingGemmArgs& a) {
    valid = false;
    for (; items.any(); items.advance(a)) {
      const Item at = locate(a, items);
#if RG_WINDOW
      const int rows = items.at == 0 ? RG_WINDOW : RG_SRC_D;
      loads = rows * RG_CHUNKS;
      d0 = at.q_d * RG_SRC_D + RG_WINDOW - rows;
#else
      loads = loads_of(at);
      if (loads == 0) continue;
      d0 = at.q_d * RG_SRC_D;
#endif
      h0 = at.q_h * RG_SRC_H, w0 = at.q_w * RG_SRC_W;
      image = static_cast<int>(at.b), first_channel = at.group * RG_K;
      origin = a.source + at.b * a.source_image + d0 * a.source_slab + h0 * a.source_row;
      origin += TCONV_CHANNELS_LAST ? w0 * a.source_inner + (long long)at.group * RG_K
                                    : w0 + (long long)at.group * RG_K * a.source_inner;
      find_interior(a);
      load = round = channel = 0;
      unit = origin + threadIdx.x % kUnits * kPerUnit * a.source_inner;
      valid = true;
      return;
    }
  }
  __device__ __forceinline__ void advance(const RingGemmArgs& a, int rounds) {
    if (++round < rounds) return;
    round = 0;
    if (++load < loads) {
      const int next = load % RG_CHUNKS * (kUnits * kPerUnit);
      origin += (next - channel) * (TCONV_CHANNELS_LAST ? 1 : a.source_inner);
      if (RG_WINDOW && load % RG_CHUNKS == 0) {
        ++d0;
        origin += a.source_slab;
        find_interior(a);
      }
      unit = origin + threadIdx.x % kUnits * kPerUnit * a.source_inner;
      channel = next;
      return;
    }
    items.advance(a);
    find(a);
  }
  __device__ __forceinline__ bool row_inside(const RingGemmArgs& a, int reach) const {
    return (unsigned)(d0 + RG_LOW_D + (reach >> 16)) < (unsigned)a.source_d &&
           (unsigned)(h0 + RG_LOW_H + (reach & 0xffff)) < (unsigned)a.source_h;
  }
  __device__ __forceinline__ bool channel_exists(int c) const {
    return RG_K % (kUnits * kPerUnit) == 0 || channel + c < RG_K;
  }
};

// The i-th 16 bytes of a thread's piece; neighbouring threads lie side by side.
__device__ __forceinline__ uint4* landing(uint4* raw, int slot, int i, int thread) {
  return raw + (slot * 8 + i) * kLoaders + thread;
}
// And a word with it, for vector pieces: where the row begins in the tile << 16 | source column of the first element,
// relative to the staged span, + 4; all ones: no piece.
__device__ __forceinline__ unsigned* landing_place(uint4* raw, int slot, int thread) {
  return reinterpret_cast<unsigned*>(raw + kSlots * 8 * kLoaders) + slot * kLoaders + thread;
}
// Zeros when not valid; nothing is read then.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  copy_part<kBytes>(to, from, valid ? kBytes : 0);
}

__device__ __forceinline__ unsigned nearest(unsigned x) {
#if TCONV_DTYPE_f32
  return nearest_tf32(x);
#else
  return x;
#endif
}
__device__ __forceinline__ uint4 rounded(unsigned x, unsigned y, unsigned z, unsigned w) {
  return make_uint4(nearest(x), nearest(y), nearest(z), nearest(w));
}

#if TCONV_CHANNELS_LAST

// A piece is one unit of 8 positions. Lanes run along the units of a position, so that a warp reads whole sectors: copies
// past L1 fetch a sector for every 16 bytes that stand alone.
constexpr int kApart = 8;
constexpr int kPieces = ((kPositions * kUnits + 31) / 32 + kApart - 1) / kApart * 32;

__device__ __forceinline__ int position_of(int piece, int i) {
  return ((piece / 32 * kApart + i) * 32 + piece % 32) / kUnits;
}

// Where position p lies in the source; false where it is outside.
__device__ __forceinline__ bool find_position(const RingGemmArgs& a, const Cursor& at, const Place* places,
                                              const int* reaches, int p, const storage_t*& from) {
  const Place place = places[p < kPositions ? p : 0];
  from = at.origin + place.offset;
  return at.valid && p < kPositions &&
         (at.interior || (at.row_inside(a, reaches[place.where >> 16]) &&
                          (unsigned)(at.w0 + RG_SPAN_BEGIN + (int)(place.where & 0xffff)) < (unsigned)a.source_w));
}

template <bool kVector>
__device__ __forceinline__ void load_piece(uint4* raw, int k, const RingGemmArgs& a, const Cursor& at,
                                           const Place* places, const int* reaches, int piece, int thread) {
  const int u = piece % kUnits;
#pragma unroll
  for (int i = 0; i < kApart; ++i) {
    const storage_t* from;
    const bool inside = find_position(a, at, places, reaches, position_of(piece, i), from);
    from += u * kPerUnit;
    if (kVector) {
      copy_async<16>(landing(raw, k, i, thread), from, inside && at.channel_exists(u * kPerUnit));
    } else {
      storage_t* element = reinterpret_cast<storage_t*>(landing(raw, k, i, thread));
#pragma unroll
      for (int e = 0; e < kPerUnit; ++e)
        element[e] = inside && at.channel_exists(u * kPerUnit + e) ? from[e] : storage_t();
    }
  }
}

template <bool kVector>
__device__ __forceinline__ void store_piece(uint4* raw, int k, const RingGemmArgs&, const Cursor&, int piece,
                                            int thread, uint4* tile) {
#pragma unroll
  for (int i = 0; i < kApart; ++i) {
    const int p = position_of(piece, i);
    if (p >= kPositions) break;
    const uint4 four = *landing(raw, k, i, thread);
    tile[piece % kUnits * kPlane + p] = rounded(four.x, four.y, four.z, four.w);
  }
}

// 16-bit units need no rounding: copied to where they belong. A stage is handed over once kLag later ones are under way.
__device__ __forceinline__ void copy_tiles(const RingGemmArgs& a, const Place* places, const int* reaches, uint4* tiles,
                                           Barrier* full, Barrier* empty, int thread) {
  // Chunks that stay for all passes, or a window, are only given back when all of them have been handed over, so they must
  // be before the wait for a place behind them.
  constexpr int kMost = RG_WINDOW     ? RG_STAGES - RG_WINDOW * RG_CHUNKS
                        : RG_RESIDENT ? RG_STAGES - RG_CHUNKS
                                      : RG_STAGES - 2;
  constexpr int kLag = kMost < 2 ? kMost : 2;
  Cursor now(a);
  RingPlace<RG_STAGES> at, behind;
  int filled = 0;
  auto hand_over = [&]() {
    barrier_arrive(full + behind.stage);
    behind.advance();
  };
  for (; now.valid; now.advance(a, 1)) {
    barrier_wait(empty + at.stage, at.parity ^ 1);
    uint4* tile = tiles + at.stage * kStageUnits;
#pragma unroll 1
    for (int piece = thread; piece < kPieces; piece += kLoaders) {
      const int u = piece % kUnits;
#pragma unroll
      for (int i = 0; i < kApart; ++i) {
        const int p = position_of(piece, i);
        const storage_t* from;
        const bool inside = find_position(a, now, places, reaches, p, from);
        if (p < kPositions)
          copy_async<16>(tile + u * kPlane + p, from + u * kPerUnit, inside && now.channel_exists(u * kPerUnit));
      }
    }
    copy_async_commit();
    at.advance();
    if (++filled > kLag) {
      copy_async_wait<kLag>();
      hand_over();
    }
  }
  copy_async_wait<0>();
  for (int left = min(filled, kLag); left > 0; --left) hand_over();
}

#else                                           // contiguous

// Vector pieces: one unit of channels at twice 4 neighbouring source columns that start on a 4-element boundary, half a
// row apart, so that lanes read neighbouring vectors.
constexpr int kSpanChunks = ((RG_SPAN + 3 + 3) / 4 + 1) / 2;  // of half a row, wherever it starts
constexpr int kVectorPieces = kRows * kSpanChunks * kUnits;

__device__ __forceinline__ Place vector_place(const RingGemmArgs& a, int index) {
  const int row = index / kSpanChunks, x = index % kSpanChunks;
  return {row_offset(a, row) + RG_SPAN_BEGIN + 4 * x, static_cast<unsigned>(row << 16 | 4 * x)};
}

__device__ __forceinline__ void load_vector(uint4* raw, int k, const RingGemmArgs& a, const Cursor& at,
                                            const Place* places, const int* reaches, int piece, int thread) {
  const bool exists = piece < kVectorPieces;
  const Place place = places[exists ? piece / kUnits : 0];
  const storage_t* from = at.unit + place.offset;
  const int early = static_cast<int>(reinterpret_cast<unsigned long long>(from) / sizeof(storage_t)) & 3;
  const int first = static_cast<int>(place.where & 0xffff) - early, row = place.where >> 16;
  *landing_place(raw, k, thread) = exists ? row * RG_JW << 16 | (first + 4) : ~0u;
  from -= early;
  // At the ends of the tensor a vector may reach outside it, within its own 16 bytes; what it reads there is dropped.
  const bool inside = at.valid && exists && (at.interior || at.row_inside(a, reaches[row]));
#pragma unroll(sizeof(storage_t) == 4 ? 2 : 1)  // 16 addresses at once spill
  for (int v = 0; v < 2; ++v) {
    const int column = first + 4 * kSpanChunks * v, w = at.w0 + RG_SPAN_BEGIN + column;
    const bool reached = inside && column < RG_SPAN && (at.interior || (w + 3 >= 0 && w < a.source_w));
    const storage_t* channel = from + 4 * kSpanChunks * v;
#pragma unroll
    for (int c = 0; c < kPerUnit; ++c) {
      const bool valid = reached && at.channel_exists(piece % kUnits * kPerUnit + c);
      constexpr int kBytes = 64 / kPerUnit;
      copy_async<kBytes>(reinterpret_cast<char*>(landing(raw, k, 4 * v + c * kBytes / 16, thread)) + c * kBytes % 16,
                         channel, valid);
      channel += a.source_inner;
    }
  }
}

template <bool kInterior>
__device__ __forceinline__ void store_vector(unsigned place, int v, const unsigned (&raw)[16], const RingGemmArgs& a,
                                             const Cursor& at, int piece, uint4* tile) {
  if (place == ~0u) return;
  const int first = static_cast<int>(place & 0xffff) - 4 + 4 * kSpanChunks * v;
  uint4* to = tile + piece % kUnits * kPlane + (place >> 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int rel = first + i;
    uint4 unit = make_uint4(0, 0, 0, 0);
    if (kInterior || (unsigned)(at.w0 + RG_SPAN_BEGIN + rel) < (unsigned)a.source_w) {
#if TCONV_DTYPE_f32
      unit = rounded(raw[i], raw[4 + i], raw[8 + i], raw[12 + i]);
#else
      const unsigned select = i % 2 ? 0x7632 : 0x5410;  // the high or the low halves
      unit = make_uint4(
          __byte_perm(raw[i / 2], raw[2 + i / 2], select), __byte_perm(raw[4 + i / 2], raw[6 + i / 2], select),
          __byte_perm(raw[8 + i / 2], raw[10 + i / 2], select), __byte_perm(raw[12 + i / 2], raw[14 + i / 2], select));
#endif
    }
    if (RG_SRC_W == 1 && RG_NPW == 1) {
      if ((unsigned)rel < (unsigned)RG_JW) (to + first)[i] = unit;
    } else {
#pragma unroll
      for (int plane = 0; plane < RG_NPW; ++plane) {
        const int past = rel - (rg_planes_w[plane] - RG_SPAN_BEGIN);
        if (past >= 0 && past % RG_SRC_W == 0 && past / RG_SRC_W < RG_JW)
          to[plane * (kRows * RG_JW) + past / RG_SRC_W] = unit;
      }
    }
  }
}

// Gathered pieces, for planes of odd sizes: one unit of channels at kApart positions, one warp apart.
constexpr int kApart = 4;
constexpr int kPieces = ((kPositions + 31) / 32 + kApart - 1) / kApart * 32 * kUnits;

__device__ __forceinline__ int position_of(int piece, int i) {
  return (piece / (32 * kUnits) * kApart + i) * 32 + piece % 32;
}

__device__ __forceinline__ void load_gathered(uint4* raw, int k, const RingGemmArgs& a, const Cursor& at,
                                              const Place* places, const int* reaches, int piece, int thread) {
  const int u = piece / 32 % kUnits;
#pragma unroll
  for (int i = 0; i < kApart; ++i) {
    const int p = position_of(piece, i);
    const Place place = places[p < kPositions ? p : 0];
    const bool inside =
        at.valid && p < kPositions &&
        (at.interior || (at.row_inside(a, reaches[place.where >> 16]) &&
                         (unsigned)(at.w0 + RG_SPAN_BEGIN + (int)(place.where & 0xffff)) < (unsigned)a.source_w));
    const storage_t* from = at.origin + place.offset + u * kPerUnit * a.source_inner;
    storage_t* to = reinterpret_cast<storage_t*>(landing(raw, k, i * kPerUnit * sizeof(storage_t) / 16, thread));
#pragma unroll
    for (int c = 0; c < kPerUnit; ++c) {
      const bool valid = inside && at.channel_exists(u * kPerUnit + c);
#if TCONV_DTYPE_f32
      copy_async<4>(to + c, from, valid);
#else
      to[c] = valid ? *from : storage_t();
#endif
      from += a.source_inner;
    }
  }
}

__device__ __forceinline__ void store_gathered(const unsigned (&raw)[16], int piece, uint4* tile) {
  uint4* to = tile + piece / 32 % kUnits * kPlane;
#pragma unroll
  for (int i = 0; i < kApart; ++i) {
    const int p = position_of(piece, i);
    if (p >= kPositions) break;
    to[p] = rounded(raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]);
  }
}

template <bool kVector>
__device__ __forceinline__ void load_piece(uint4* raw, int k, const RingGemmArgs& a, const Cursor& at,
                                           const Place* places, const int* reaches, int piece, int thread) {
  if (kVector)
    load_vector(raw, k, a, at, places, reaches, piece, thread);
  else
    load_gathered(raw, k, a, at, places, reaches, piece, thread);
}

template <bool kVector>
__device__ __forceinline__ void store_piece(uint4* landed, int k, const RingGemmArgs& a, const Cursor& at, int piece,
                                            int thread, uint4* tile) {
  constexpr int kParts = kVector ? 2 : 1;
  unsigned raw[kParts][16];
#pragma unroll
  for (int i = 0; i < 4 * kParts; ++i) {
    const uint4 four = *landing(landed, k, i, thread);
    unsigned* to = raw[i / 4] + i % 4 * 4;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  if (!kVector) {
    store_gathered(raw[0], piece, tile);
    return;
  }
  const unsigned place = *landing_place(landed, k, thread);
#pragma unroll
  for (int v = 0; v < kParts; ++v) {
    if (at.interior)
      store_vector<true>(place, v, raw[v], a, at, piece, tile);
    else
      store_vector<false>(place, v, raw[v], a, at, piece, tile);
  }
}

#endif

template <bool kVector>
__device__ __forceinline__ void load_tiles(const RingGemmArgs& a, const Place* places, const int* reaches, uint4* raw,
                                           uint4* tiles, Barrier* full, Barrier* empty, int thread) {
#if TCONV_CHANNELS_LAST
  constexpr int kCount = kPieces;
#else
  constexpr int kCount = kVector ? kVectorPieces : kPieces;
#endif
  constexpr int kRound = kSlots * kLoaders, kRounds = (kCount + kRound - 1) / kRound;
  Cursor ahead(a), now = ahead;
  RingPlace<RG_STAGES> at;
#pragma unroll 1
  for (int k = 0; k < kSlots; ++k) {
    load_piece<kVector>(raw, k, a, ahead, places, reaches, k * kLoaders + thread, thread);
    copy_async_commit();
  }
  if (ahead.valid) ahead.advance(a, kRounds);
  while (now.valid) {
    if (now.round == 0) barrier_wait(empty + at.stage, at.parity ^ 1);
    uint4* tile = tiles + at.stage * kStageUnits;
#pragma unroll 1
    for (int k = 0; k < kSlots; ++k) {
      const int piece = k * kLoaders + thread;
      copy_async_wait<kSlots - 1>();  // the oldest piece has landed
      store_piece<kVector>(raw, k, a, now, now.round * kRound + piece, thread, tile);
      load_piece<kVector>(raw, k, a, ahead, places, reaches, ahead.round * kRound + piece, thread);
      copy_async_commit();
    }
    if (now.round == kRounds - 1) {
      barrier_arrive(full + at.stage);
      at.advance();
    }
    if (ahead.valid) ahead.advance(a, kRounds);
    now.advance(a, kRounds);
  }
}
