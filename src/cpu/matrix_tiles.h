// matrix_tiles.h — products of pairs of bf16 on the matrix unit (AMX); for files that are compiled for avx512_amx.
//
// A product adds [16 positions][words] times [words][16 result channels] to [16 positions][16 result channels], a word being
// a pair of source channels. Both factors lie in memory as channel_gemm has them anyway. By Intel's manual the unit takes
// one every 16 cycles and its sums are ready after 52, so four sums are kept: two times 16 positions by two vectors of
// result channels, or four times 16 by one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/channel_rows.h"

namespace tconv::cpu {
namespace {

#if defined(__AMX_BF16__)
constexpr bool kMatrices = true;
#else
constexpr bool kMatrices = false;
#endif
constexpr int kMatrixRows = 64;  // most positions at a time

#if defined(__AMX_BF16__)

// Registers: 0 to 3 sums, 4 and 5 positions, 6 and 7 weights.
struct alignas(64) MatrixShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  explicit MatrixShape(int64_t words) {  // of a position in a product, at most 16
    for (int r = 0; r < 8; ++r) row_bytes[r] = 64, rows[r] = 16;
    for (int r = 4; r < 6; ++r) row_bytes[r] = static_cast<uint16_t>(4 * words);
    for (int r = 6; r < 8; ++r) rows[r] = static_cast<uint8_t>(words);
  }
};
inline void begin_matrices(const MatrixShape& shape) { asm volatile("ldtilecfg %0" ::"m"(shape)); }
inline void end_matrices() { asm volatile("tilerelease"); }

// Rows are `step` words apart.
template <int R>
TCONV_INLINE void load_matrix(const float* at, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(step * 4), "n"(R) : "memory");
}
template <int R>
TCONV_INLINE void store_matrix(float* at, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(step * 4), "n"(R) : "memory");
}
template <int Sum, int Positions, int Weights>
TCONV_INLINE void add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(Sum), "n"(Positions), "n"(Weights));
}

template <int Block, int Blocks, int Vectors, bool Load>
TCONV_INLINE void move_sums(float* sums, int64_t width) {
  if constexpr (Block < Blocks) {
    float* at = sums + 16 * Block * width;
    Load ? load_matrix<Block * Vectors>(at, width) : store_matrix<Block * Vectors>(at, width);
    if constexpr (Vectors > 1)
      Load ? load_matrix<Block * Vectors + 1>(at + 16, width) : store_matrix<Block * Vectors + 1>(at + 16, width);
    move_sums<Block + 1, Blocks, Vectors, Load>(sums, width);
  }
}

// Where the rows of 16 positions are: a step apart in memory, or else they are copied.
struct MatrixRows {
  const int64_t* offset;
  int64_t step;
  bool even;
  explicit MatrixRows(const int64_t* the_offset) : offset(the_offset), step(the_offset[1] - the_offset[0]), even(true) {
    for (int i = 2; i < 16; ++i) even = even && offset[i] - offset[i - 1] == step;
  }
};

template <int Block, int Blocks, int Vectors>
TCONV_INLINE void add_products(const MatrixRows* rows, const float* source, int64_t words) {
  if constexpr (Block < Blocks) {
    constexpr int kPositions = 4 + Block % 2;
    const MatrixRows& at = rows[Block];
    if (at.even) {
      load_matrix<kPositions>(source + at.offset[0], at.step);
    } else {
      float copied[16 * 16];
      const __mmask16 live = static_cast<__mmask16>((1u << words) - 1);
      for (int i = 0; i < 16; ++i)
        _mm512_storeu_ps(copied + 16 * i, _mm512_maskz_loadu_ps(live, source + at.offset[i]));
      load_matrix<kPositions>(copied, 16);
    }
    add_product<Block * Vectors, kPositions, 6>();
    if constexpr (Vectors > 1) add_product<Block * Vectors + 1, kPositions, 7>();
    add_products<Block + 1, Blocks, Vectors>(rows, source, words);
  }
}

// sums[position][width] += the runs of `tile`, for Blocks times 16 positions and Vectors vectors; offset[position].
template <int Blocks, int Vectors>
void matrix_tile(const ChannelTile<float>& tile, const int64_t* offset, float* sums, int64_t width, int64_t words) {
  const MatrixRows rows[4] = {MatrixRows(offset), MatrixRows(offset + (Blocks > 1 ? 16 : 0)),
                              MatrixRows(offset + (Blocks > 2 ? 32 : 0)), MatrixRows(offset + (Blocks > 3 ? 48 : 0))};
  move_sums<0, Blocks, Vectors, true>(sums, width);
  for (int64_t run = 0; run < tile.runs; ++run) {
    const float *weights = tile.vector + tile.run_v[run], *source = tile.scalar + tile.run_b[run];
    for (int64_t k = 0; k < tile.n; k += words) {
      load_matrix<6>(weights + k * width, width);
      if (Vectors > 1) load_matrix<7>(weights + k * width + 16, width);
      add_products<0, Blocks, Vectors>(rows, source + k, words);
    }
  }
  move_sums<0, Blocks, Vectors, false>(sums, width);
}

// The same for `blocks` times 16 positions and any vectors; at most two blocks where there are several vectors.
inline void matrix_tiles(ChannelTile<float> tile, const int64_t* offset, float* sums, int blocks, int vectors,
                         int64_t width, int64_t words) {
  for (int v = 0; v < vectors; v += 2, tile.vector += 32, sums += 32) {
    if (v + 1 < vectors) {
      blocks == 1 ? matrix_tile<1, 2>(tile, offset, sums, width, words)
                  : matrix_tile<2, 2>(tile, offset, sums, width, words);
    } else {
      blocks == 1   ? matrix_tile<1, 1>(tile, offset, sums, width, words)
      : blocks == 2 ? matrix_tile<2, 1>(tile, offset, sums, width, words)
      : blocks == 3 ? matrix_tile<3, 1>(tile, offset, sums, width, words)
                    : matrix_tile<4, 1>(tile, offset, sums, width, words);
    }
  }
}

#endif

}  // namespace
}  // namespace tconv::cpu
