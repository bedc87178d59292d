// channel_rows.h — tiles with the channels along the vectors: staging as [position][channel] and the register tile over
// it; for files that are compiled once per target.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/pairs.h"
#include "cpu/rows.h"
#include "cpu/tiles_avx2.h"

namespace tconv::cpu {
namespace {

// Register tiles: `rows` sums of `vectors` vectors each. 32 registers hold 24 sums, up to 4 vectors and a broadcast; 16
// registers hold 12.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int kMostVectors = 3;
constexpr int rows_for(int vectors) { return vectors == 3 ? 4 : vectors == 2 ? 6 : 8; }
#endif
constexpr int kMostRows = 8;

// sum[r][v] (+)= sum over runs and i < n of vector[run_v + i * v_step][v] * scalar[run_b + offset[r] + i * b_step].
// Depthwise: lane by lane, with scalar[... + v] in place of a broadcast.
template <class S>
struct ChannelTile {
  const S *vector, *scalar;
  const int64_t *run_v, *run_b;  // where each run starts
  int64_t runs, n, v_step, b_step;
  const int64_t* offset;  // [row]
  S* const* sums;         // [row]: where its first vector is
  int64_t sums_step;      // from there to the next vector
  const S* start;         // one value per lane for every row; null: the sums go on from what is there
};

template <class S, int Rows, int Vectors, bool Depthwise>
void channel_tile(const ChannelTile<S>& tile) {
#if defined(TCONV_TILES_AVX2)
  if constexpr (sizeof(S) == sizeof(float) && Rows == 4 && Vectors == 3 && !Depthwise)
    if (tile.n >= 16) {  // the sums pass through memory between runs
      float sums[Rows * Vectors * kLanes<S>];
      for (int i = 0; i < Rows * Vectors; ++i)
        store(sums + i * kLanes<S>, load(tile.start ? tile.start + i % Vectors * kLanes<S>
                                                    : tile.sums[i / Vectors] + i % Vectors * tile.sums_step));
      for (int64_t run = 0; run < tile.runs; ++run) {
        const float* scalar[Rows];
        for (int r = 0; r < Rows; ++r) scalar[r] = tile.scalar + tile.run_b[run] + tile.offset[r];
        add_positions(tile.vector + tile.run_v[run], scalar, tile.n, tile.v_step, tile.b_step, sums);
      }
      for (int i = 0; i < Rows * Vectors; ++i)
        store(tile.sums[i / Vectors] + i % Vectors * tile.sums_step, load(sums + i * kLanes<S>));
      return;
    }
#endif
  Vec<S> sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = load(tile.start ? tile.start + v * kLanes<S> : tile.sums[r] + v * tile.sums_step);
  const int64_t v_step = tile.v_step, b_step = tile.b_step;
  for (int64_t run = 0; run < tile.runs; ++run) {
    const S* at = tile.vector + tile.run_v[run];
    const S* scalar[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) scalar[r] = tile.scalar + tile.run_b[run] + tile.offset[r];
    for (int64_t i = 0, b = 0; i < tile.n; ++i, b += b_step, at += v_step) {
      Vec<S> vector[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) vector[v] = load(at + v * kLanes<S>);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        if constexpr (Depthwise) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v] += vector[v] * load(scalar[r] + b + v * kLanes<S>);
        } else {
          const Vec<S> value = broadcast(scalar[r] + b);
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add<S>(sum[r][v], vector[v], value);
        }
      }
    }
  }
  const int64_t sums_step = tile.sums_step;
  S* sums[Rows];  // read before anything is stored, which could change the table as far as the compiler knows
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) sums[r] = tile.sums[r];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(sums[r] + v * sums_step, sum[r][v]);
}

template <class S>
using ChannelTileFunction = void (*)(const ChannelTile<S>&);

template <class S, int Vectors, bool Depthwise>
ChannelTileFunction<S> channel_tile_function(int rows) {
  constexpr int kMost = rows_for(Vectors);
  switch (rows) {
    case 1:
      return channel_tile<S, 1, Vectors, Depthwise>;
    case 2:
      return channel_tile<S, 2, Vectors, Depthwise>;
    case 3:
      return channel_tile<S, 3, Vectors, Depthwise>;
    case 4:
      return channel_tile<S, 4, Vectors, Depthwise>;
    case 5:
      return channel_tile < S, kMost < 5 ? kMost : 5, Vectors, Depthwise > ;
    case 6:
      return channel_tile < S, kMost < 6 ? kMost : 6, Vectors, Depthwise > ;
    case 7:
      return channel_tile < S, kMost < 7 ? kMost : 7, Vectors, Depthwise > ;
    default:
      return channel_tile<S, kMost, Vectors, Depthwise>;
  }
}
template <class S, bool Depthwise = false>
ChannelTileFunction<S> channel_tile_function(int rows, int vectors) {
  return vectors == 1   ? channel_tile_function<S, 1, Depthwise>(rows)
         : vectors == 2 ? channel_tile_function<S, 2, Depthwise>(rows)
         : vectors == 3 ? channel_tile_function<S, 3, Depthwise>(rows)
                        : channel_tile_function<S, kMostVectors, Depthwise>(rows);
}

// A box of a tensor: positions [first, first + extent) per dimension, zero outside the tensor, of one sample.
struct ChannelBox {
  const void* source;
  DType dtype;
  Layout layout;
  int64_t channels;       // of the whole tensor
  const int64_t* size;    // of the tensor
  int64_t b, channel, n;  // the box's sample, first channel and channels
  int64_t first[3], extent[3];
  int64_t step;         // columns are split by their phase
  int64_t phase;        // the only one that is read; -1: all
  const bool* used[2];  // [depth or height in the box]: whether it is read at all; null: all
  double* sums;         // [channel of the box], contiguous tensors: the positions below `owned` are added; null: none
  int64_t owned[3];
};

#if defined(__AVX512F__)
// Eight values from `index` and eight `distance` further on. One position at a time, masked, staging took two fifths of
// the weight gradient of kernelbench_1_72.
TCONV_INLINE VecF load_two(const void* source, DType dtype, int64_t index, int64_t distance) {
  if (dtype == DType::f32) {
    const float* from = static_cast<const float*>(source) + index;
    return bits_of<VecF>(
        _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from)), _mm256_loadu_ps(from + distance), 1));
  }
  const uint16_t* from = static_cast<const uint16_t*>(source) + index;
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + distance));
  const VecH half = bits_of<VecH>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
  return dtype == DType::f16 ? from_half(half) : from_bfloat(half);
}
#endif

// A row of positions that follow each other without gaps, fewer channels than lanes: whole vectors into a line, from there
// to the phases. One position at a time took 17 cycles for each of fsrcnn's 4 million positions of one channel, now 2.
constexpr int64_t kLineElements = 2048;
template <class S, class Finish>
TCONV_INLINE void stage_dense(const ChannelBox& box, int64_t first, int64_t lo, int64_t hi, int64_t split, S* out,
                              const Finish& finish, Vec<S>* nothing) {
  constexpr int64_t kBlock = kLanes<S>;
  S line[kLineElements + kBlock];
  const int64_t n = box.n, step = box.step, width = box.extent[2], segment = kLineElements / n / step * step;
  for (int64_t w0 = 0; w0 < width; w0 += segment) {
    const int64_t end = width < w0 + segment ? width : w0 + segment, count = end - w0;
    const int64_t from = lo < w0 ? w0 : lo < end ? lo : end, until = hi < from ? from : hi < end ? hi : end;
    memset(line, 0, static_cast<size_t>((from - w0) * n) * sizeof(S));
    for (int64_t i = from * n; i < until * n; i += kBlock) {
      const int64_t left = until * n - i;
      const Vec<S> v = finish(load_lanes<S>(box.source, box.dtype, first + i, left < kBlock ? left : kBlock));
      *nothing += v * S(0);
      store(line + i - w0 * n, v);
    }
    memset(line + (until - w0) * n, 0, static_cast<size_t>((end - until) * n) * sizeof(S));
    for (int64_t phase = 0; phase < step; ++phase) {
      if (box.phase >= 0 && box.phase != phase) continue;
      const int64_t m = count <= phase ? 0 : (count - phase + step - 1) / step;
      S* to = out + (phase * split + w0 / step) * n;
      const S* at = line + phase * n;
      if (step == 1) {
        memcpy(to, at, static_cast<size_t>(m * n) * sizeof(S));
      } else if (n == 1) {
        take_every(at, step, m, to);
      } else {
        int64_t i = 0;  // a whole vector for each, until it would reach beyond the last
        for (; (m - i) * n >= kBlock; ++i) store(to + i * n, load(at + i * step * n));
        for (; i < m; ++i) store_part(to + i * n, load(at + i * step * n), n);
      }
    }
  }
}

// The sum of N vectors, pair by pair.
template <class S, int64_t N>
TCONV_INLINE Vec<S> add_all(const Vec<S>* v) {
  if constexpr (N == 1)
    return v[0];
  else
    return add_all<S, N / 2>(v) + add_all<S, N - N / 2>(v + N / 2);
}

// target[((d * extent[1] + h) * columns + w % step * split + w / step) * pitch + c], split = ceil(extent[2] / step) and
// columns = step * split: columns of one phase follow each other. The pitch is n for fewer channels than lanes on the
// side that is broadcast, else a multiple of the lanes that covers n; what lies behind n is undefined. finish is applied
// to each vector of values. Returns whether all of them are finite.
template <class S, class Finish>
bool stage_box(const ChannelBox& box, S* target, int64_t pitch, const Finish& finish) {
  constexpr int64_t kBlock = kLanes<S>;
  const int64_t positions = box.size[0] * box.size[1] * box.size[2], width = box.extent[2];
  const int64_t split = (width + box.step - 1) / box.step, columns = box.step * split;
  auto column = [&](int64_t w) { return box.step == 1 ? w : w % box.step * split + w / box.step; };
  const int64_t lo = box.first[2] >= 0 ? 0 : (-box.first[2] < width ? -box.first[2] : width);
  const int64_t end = box.size[2] - box.first[2], hi = end < lo ? lo : end < width ? end : width;
  Vec<S> nothing{};
  const bool dense = box.layout == Layout::channels_last && box.n == box.channels && pitch == box.n && pitch < kBlock &&
                     box.n * box.step <= kLineElements;
  for (int64_t d = 0; d < box.extent[0]; ++d)
    for (int64_t h = 0; h < box.extent[1]; ++h) {
      if ((box.used[0] && !box.used[0][d]) || (box.used[1] && !box.used[1][h])) continue;
      S* out = target + (d * box.extent[1] + h) * columns * pitch;
      const int64_t sd = box.first[0] + d, sh = box.first[1] + h;
      if (sd < 0 || sd >= box.size[0] || sh < 0 || sh >= box.size[1] || lo == hi) {
        memset(out, 0, static_cast<size_t>(columns * pitch) * sizeof(S));
        continue;
      }
      const int64_t position = (sd * box.size[1] + sh) * box.size[2] + box.first[2];
      const int64_t first = (box.b * positions + position) * box.channels + box.channel;  // of channels_last
      if (dense) {
        stage_dense(box, first, lo, hi, split, out, finish, &nothing);
        continue;
      }
      for (int64_t w = 0; w < lo; ++w) memset(out + column(w) * pitch, 0, static_cast<size_t>(pitch) * sizeof(S));
      for (int64_t w = hi; w < width; ++w) memset(out + column(w) * pitch, 0, static_cast<size_t>(pitch) * sizeof(S));
      // The row that is read next, behind the last one the next tile's, comes from memory meanwhile: without that
      // kernelbench_1_81's gradients took 31 ms instead of 22.
      int64_t next = h + 1;
      while (next < box.extent[1] && box.used[1] && !box.used[1][next]) ++next;
      const int64_t ahead = (next - h) * box.size[2];  // positions
      if (box.layout == Layout::channels_last) {
        const int64_t element = static_cast<int64_t>(size_of(box.dtype));
        const char* fetched = static_cast<const char*>(box.source) + (first + ahead * box.channels) * element;
        for (int64_t phase = 0; phase < box.step; ++phase) {
          if (box.phase >= 0 && box.phase != phase) continue;
          int64_t w = lo + (phase - lo % box.step + box.step) % box.step;
          S* to = out + (phase * split + w / box.step) * pitch;
          if (box.n <= kBlock) {
#if defined(__AVX512F__)
            if constexpr (sizeof(S) == sizeof(float))
              if (box.n == 8 && pitch == 8) {  // two positions fill a vector
                for (; w + box.step < hi; w += 2 * box.step, to += kBlock) {
                  const Vec<S> v =
                      finish(load_two(box.source, box.dtype, first + w * box.channels, box.step * box.channels));
                  nothing += v * S(0);
                  store(to, v);
                }
              }
#endif
            for (; w < hi; w += box.step, to += pitch) {
              const Vec<S> v = finish(load_lanes<S>(box.source, box.dtype, first + w * box.channels, box.n));
              nothing += v * S(0);
              if (pitch < kBlock)
                store_part(to, v, box.n);
              else
                store(to, v);
            }
            continue;
          }
          for (; w < hi; w += box.step, to += pitch) {
            for (int64_t c = 0; c < box.n * element; c += 64)
              __builtin_prefetch(fetched + w * box.channels * element + c);
            for (int64_t c = 0; c < box.n; c += kBlock) {
              const int64_t n = box.n - c < kBlock ? box.n - c : kBlock;
              const Vec<S> v = finish(load_lanes<S>(box.source, box.dtype, first + w * box.channels + c, n));
              nothing += v * S(0);
              store(to + c, v);
            }
          }
        }
        continue;
      }
      const int64_t owned = box.sums && d < box.owned[0] && h < box.owned[1] ? box.owned[2] : 0;
      for (int64_t c = 0; c < box.n; c += kBlock) {
        const int64_t count = box.n - c < kBlock ? box.n - c : kBlock;
        const int64_t index = (box.b * box.channels + box.channel + c) * positions + position;
        Vec<S> sum{};
        if (box.step == 2 && box.phase >= 0 && pitch >= kBlock) {
          for (int64_t w = lo + (lo + box.phase) % 2; w < hi; w += 2 * kBlock) {
            Vec<S> v[kBlock];
            load_block<S>(v, count, [&](int64_t i) {
              const int64_t at = index + i * positions + w, left = hi - w;
              const Vec<S> a = load_lanes<S>(box.source, box.dtype, at, left < kBlock ? left : kBlock);
              const int64_t rest = left < kBlock ? 0 : left < 2 * kBlock ? left - kBlock : kBlock;
              const Vec<S> b = load_lanes<S>(box.source, box.dtype, at + kBlock, rest);
              const Vec<S> values = finish(take_even<S>(a, b, LaneNumbers<kLanes<S>>{}));
              nothing += values * S(0);
              return values;
            });
            transpose_block<S>(v);
            const int64_t n = (hi - w + 1) / 2 < kBlock ? (hi - w + 1) / 2 : kBlock;
            S* to = out + (box.phase * split + w / 2) * pitch + c;
#pragma GCC unroll 16
            for (int j = 0; j < kBlock; ++j)
              if (j < n) store(to + j * pitch, v[j]);
          }
          continue;
        }
        for (int64_t w = lo; w < hi; w += kBlock) {
          const int64_t n = hi - w < kBlock ? hi - w : kBlock;
          Vec<S> v[kBlock];
          load_block<S>(v, count, [&](int64_t i) {
            const int64_t at = index + i * positions + w;
            __builtin_prefetch(static_cast<const char*>(box.source) +
                               (at + ahead) * static_cast<int64_t>(size_of(box.dtype)));
            const Vec<S> values = finish(load_lanes<S>(box.source, box.dtype, at, n));
            nothing += values * S(0);
            return values;
          });
          if (pitch < kBlock && count < 4) {
            S block[kBlock * kBlock];
            for (int64_t i = 0; i < count; ++i) store(block + i * kBlock, v[i]);
            int64_t phase = w % box.step, at = w / box.step;
            for (int64_t j = 0; j < n; ++j) {
              S* to = out + (phase * split + at) * pitch;
              for (int64_t i = 0; i < count; ++i) to[i] = block[i * kBlock + j];
              if (++phase == box.step) phase = 0, ++at;
            }
            continue;
          }
          transpose_block<S>(v);
          if (w + kBlock <= owned) sum += add_all<S, kBlock>(v);
          int64_t phase = w % box.step, at = w / box.step;
#pragma GCC unroll 16
          for (int j = 0; j < kBlock; ++j) {
            if (j >= n) break;
            if (w + j < owned && owned < w + kBlock) sum += v[j];
            S* to = out + (phase * split + at) * pitch + c;
            if (pitch < kBlock)
              store_part(to, v[j], count);
            else
              store(to, v[j]);
            if (++phase == box.step) phase = 0, ++at;
          }
        }
        for (int64_t i = 0; owned && i < count; ++i) box.sums[c + i] += static_cast<double>(sum[i]);
      }
    }
  return reduce<S>(nothing) == 0;
}

}  // namespace
}  // namespace tconv::cpu
