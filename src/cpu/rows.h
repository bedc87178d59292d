// rows.h — moving tiles between tensors and planes of rows; for files that are compiled once per target.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd.h"

namespace tconv::cpu {
namespace {

// The elements of a and b in turns.
template <class S, int... Lane>
TCONV_INLINE void interleave_pair(Vec<S> a, Vec<S> b, Vec<S>* pair, LaneList<Lane...>) {
  pair[0] = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kLanes<S>)...);
  pair[1] = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kLanes<S> + kLanes<S> / 2)...);
}

// v holds Phases rows of Step / Phases vectors; row r is interleaved with row r + Phases / 2 until one is left. 24 shuffles
// for 8 phases, where a permutation of each phase into each result takes 64.
template <class S, int Step, int Phases = Step>
TCONV_INLINE void interleave_rows(Vec<S>* v) {
  if constexpr (Phases > 1) {
    Vec<S> pairs[Step];
#pragma GCC unroll 8
    for (int i = 0; i < Step / 2; ++i)
      interleave_pair<S>(v[i], v[i + Step / 2], pairs + 2 * i, LaneNumbers<kLanes<S>>{});
    interleave_rows<S, Step, Phases / 2>(pairs);
#pragma GCC unroll 8
    for (int i = 0; i < Step; ++i) v[i] = pairs[i];
  }
}
template <class S, int Step>
void interleave_powers(const S* phases, int64_t pitch, int64_t n, S* row) {
  for (int64_t q = 0; q < n; q += kLanes<S>) {
    Vec<S> v[Step];
#pragma GCC unroll 8
    for (int r = 0; r < Step; ++r) v[r] = load(phases + r * pitch + q);
    interleave_rows<S, Step>(v);
#pragma GCC unroll 8
    for (int r = 0; r < Step; ++r) store(row + Step * q + r * kLanes<S>, v[r]);
  }
}

// For an odd step the elements of a phase lie in different lanes of the result's vectors, each in one of its own: a
// permutation of each phase puts them there, the rest are blends. Element by element, a layer with stride 5 on AVX2 took
// 1.25 times as long (`tconv time`, 2d b2 c32>64 i64x128 t3x3 s5 p1 d2: 38 ms, 30 ms so).
template <int Lanes, int Step>
constexpr int lane_source(int lane, int phase) {  // the q whose result of this phase has this lane
  for (int q = 0; q < Lanes; ++q)
    if ((Step * q + phase) % Lanes == lane) return q;
  return 0;
}
template <class S, int Step, int Phase, int... Lane>
TCONV_INLINE Vec<S> spread_phase(Vec<S> v, LaneList<Lane...>) {
  return __builtin_shufflevector(v, v, (lane_source<kLanes<S>, Step>(Lane, Phase))...);
}
template <class S, int Step, int Vector, int Phase, int... Lane>
TCONV_INLINE Vec<S> blend_phases(const Vec<S>* spread, Vec<S> v, LaneList<Lane...> lanes) {
  if constexpr (Phase == Step)
    return v;
  else
    return blend_phases<S, Step, Vector, Phase + 1>(
        spread,
        __builtin_shufflevector(v, spread[Phase],
                                ((Vector * kLanes<S> + Lane) % Step == Phase ? kLanes<S> + Lane : Lane)...),
        lanes);
}
template <class S, int Step, int... Phase>
void interleave_odd(const S* phases, int64_t pitch, int64_t n, S* row, LaneList<Phase...>) {
  constexpr LaneNumbers<kLanes<S>> lanes;
  for (int64_t q = 0; q < n; q += kLanes<S>) {
    const Vec<S> spread[Step] = {spread_phase<S, Step, Phase>(load(phases + Phase * pitch + q), lanes)...};
    S* to = row + Step * q;
    (store(to + Phase * kLanes<S>, blend_phases<S, Step, Phase, 1>(spread, spread[0], lanes)), ...);
  }
}

// row[step * q + r] = phases[r * pitch + q] for q in [0, n). Writes up to one vector per phase beyond step * n.
template <class S>
void interleave(const S* phases, int64_t pitch, int64_t step, int64_t n, S* row) {
  if (step == 2) return interleave_powers<S, 2>(phases, pitch, n, row);
  if (step == 4) return interleave_powers<S, 4>(phases, pitch, n, row);
  if (step == 8) return interleave_powers<S, 8>(phases, pitch, n, row);
#if defined(__AVX512F__)
  // A block of 16 q gives `step` result vectors; each lane of a result vector comes from one phase's block.
  if constexpr (sizeof(S) == 4) {
    if (step <= 8) {
      __m512i index[8];
      __mmask16 mask[8][8];
      for (int64_t j = 0; j < step; ++j) {
        alignas(64) int32_t lanes[16];
        for (int r = 0; r < step; ++r) mask[j][r] = 0;
        for (int l = 0; l < 16; ++l) {
          const int64_t at = 16 * j + l;
          lanes[l] = static_cast<int32_t>(at / step);
          mask[j][at % step] = static_cast<__mmask16>(mask[j][at % step] | (1u << l));
        }
        index[j] = _mm512_load_si512(lanes);
      }
      for (int64_t q = 0; q < n; q += 16) {
        __m512 block[8];
        for (int64_t r = 0; r < step; ++r) block[r] = _mm512_loadu_ps(phases + r * pitch + q);
        for (int64_t j = 0; j < step; ++j) {
          __m512 v = _mm512_setzero_ps();
          for (int64_t r = 0; r < step; ++r) v = _mm512_mask_permutexvar_ps(v, mask[j][r], index[j], block[r]);
          _mm512_storeu_ps(row + step * q + 16 * j, v);
        }
      }
      return;
    }
  }
#endif
  if (step == 3) return interleave_odd<S, 3>(phases, pitch, n, row, LaneNumbers<3>{});
  if (step == 5) return interleave_odd<S, 5>(phases, pitch, n, row, LaneNumbers<5>{});
  if (step == 7) return interleave_odd<S, 7>(phases, pitch, n, row, LaneNumbers<7>{});
  for (int64_t r = 0; r < step; ++r)
    for (int64_t q = 0; q < n; ++q) row[step * q + r] = phases[r * pitch + q];
}

// Element index + Step * q + r of dst = phases[r * pitch + q], for the first n: interleaved and rounded in registers. A row
// in between cost SAM's contiguous layer 6 % of its time.
template <class S, int Step>
void store_powers(const S* phases, int64_t pitch, int64_t n, void* dst, DType dtype, int64_t index) {
  constexpr int64_t kBlock = kLanes<S>;
  for (int64_t at = 0; at < n; at += Step * kBlock) {
    Vec<S> v[Step];
#pragma GCC unroll 8
    for (int r = 0; r < Step; ++r) v[r] = load(phases + r * pitch + at / Step);
    interleave_rows<S, Step>(v);
    if (at + Step * kBlock <= n) {
      S* whole = static_cast<S*>(dst) + index + at;
      uint16_t* half = static_cast<uint16_t*>(dst) + index + at;
#pragma GCC unroll 8
      for (int r = 0; r < Step; r += 2) {
        if (size_of(dtype) == sizeof(S))
          store(whole + r * kBlock, v[r]), store(whole + (r + 1) * kBlock, v[r + 1]);
        else if constexpr (sizeof(S) == sizeof(float))
          store_halves(half + r * kBlock, dtype, v[r], v[r + 1]);
      }
      continue;
    }
    S part[Step * kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < Step; ++r) store(part + r * kBlock, v[r]);
    store_row(part, dst, dtype, index + at, n - at);
  }
}

// The same for any step; the row has room for n elements and a vector of each phase.
template <class S>
void store_phases(const S* phases, int64_t pitch, int64_t step, int64_t n, S* row, void* dst, DType dtype,
                  int64_t index) {
  if (step == 1) return store_row(phases, dst, dtype, index, n);
  if (step == 2) return store_powers<S, 2>(phases, pitch, n, dst, dtype, index);
  if (step == 4) return store_powers<S, 4>(phases, pitch, n, dst, dtype, index);
  if (step == 8) return store_powers<S, 8>(phases, pitch, n, dst, dtype, index);
  interleave(phases, pitch, step, (n + step - 1) / step, row);
  store_row(row, dst, dtype, index, n);
}

template <class S, int... Lane>
TCONV_INLINE Vec<S> take_even(Vec<S> a, Vec<S> b, LaneList<Lane...>) {
  return __builtin_shufflevector(a, b, (2 * Lane)...);
}

// For an odd step the wanted elements of as many vectors have different lanes: blends collect them, a permutation puts
// them in order. Returns how many it took.
template <class S, int Step, int Vector, int... Lane>
TCONV_INLINE Vec<S> collect_lanes(const S* from, Vec<S> v, LaneList<Lane...> lanes) {
  if constexpr (Vector == Step)
    return __builtin_shufflevector(v, v, (Step * Lane % kLanes<S>)...);
  else
    return collect_lanes<S, Step, Vector + 1>(
        from,
        __builtin_shufflevector(
            v, load(from + Vector * kLanes<S>),
            (Step * lane_source<kLanes<S>, Step>(Lane, 0) / kLanes<S> == Vector ? kLanes<S> + Lane : Lane)...),
        lanes);
}
template <class S, int Step>
int64_t take_odd_step(const S* from, int64_t n, S* to) {
  int64_t q = 0;
  for (; q + kLanes<S> < n; q += kLanes<S>)  // the last block would read beyond the row
    store(to + q, collect_lanes<S, Step, 1>(from + Step * q, load(from + Step * q), LaneNumbers<kLanes<S>>{}));
  return q;
}

// to[q] = from[step * q] for q in [0, n).
template <class S>
void take_every(const S* from, int64_t step, int64_t n, S* to) {
  constexpr int64_t kBlock = kLanes<S>;
  constexpr LaneNumbers<kLanes<S>> lanes;
  int64_t q = 0;
  if (step == 2)
    for (; q + kBlock < n; q += kBlock)  // the last block would read beyond the row
      store(to + q, take_even<S>(load(from + 2 * q), load(from + 2 * q + kBlock), lanes));
  if (step == 4)
    for (; q + kBlock < n; q += kBlock) {
      const S* at = from + 4 * q;
      store(to + q, take_even<S>(take_even<S>(load(at), load(at + kBlock), lanes),
                                 take_even<S>(load(at + 2 * kBlock), load(at + 3 * kBlock), lanes), lanes));
    }
  if (step == 3) q = take_odd_step<S, 3>(from, n, to);
  if (step == 5) q = take_odd_step<S, 5>(from, n, to);
  for (; q < n; ++q) to[q] = from[step * q];
}

// v[i] = load(i) for i < n, zeros behind. All in registers: an array that is cleared first lies in memory, and GCC clears it
// by `rep stos`, which led a profile of the staging of weight gradients.
template <class S, class Load>
TCONV_INLINE void load_block(Vec<S>* v, int64_t n, const Load& load) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<S>; ++i) v[i] = i < n ? load(i) : Vec<S>{};
}

// v[i] lane j <-> v[j] lane i, in log2(lanes) rounds of two shuffles for each pair of vectors.
template <class S, int Width, int... Lane>
TCONV_INLINE void transpose_round(Vec<S>* v, LaneList<Lane...> lanes) {
  constexpr int kCount = kLanes<S>;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i & Width) continue;
    const Vec<S> a = v[i], b = v[i + Width];
    v[i] = __builtin_shufflevector(a, b, (Lane & Width ? kCount + Lane - Width : Lane)...);
    v[i + Width] = __builtin_shufflevector(a, b, (Lane & Width ? kCount + Lane : Lane + Width)...);
  }
  if constexpr (2 * Width < kCount) transpose_round<S, 2 * Width>(v, lanes);
}
template <class S>
TCONV_INLINE void transpose_block(Vec<S>* v) {
  transpose_round<S, 1>(v, LaneNumbers<kLanes<S>>{});
}

template <class S>
TCONV_INLINE void copy_part(S* to, const Vec<S>& v, int64_t n) {
  if (n >= kLanes<S>)
    store(to, v);
  else
    store_part(to, v, n);
}

// One vector of n <= lanes elements of any dtype; zeros behind them.
template <class S>
TCONV_INLINE Vec<S> load_lanes(const void* source, DType dtype, int64_t index, int64_t n) {
  if constexpr (sizeof(S) == sizeof(float)) {
    if (dtype != DType::f32) {
      VecH half;
      const uint16_t* from = static_cast<const uint16_t*>(source) + index;
      if (n >= kLanes<S>)
        memcpy(&half, from, sizeof half);
      else
        half = load_part(from, n);
      return dtype == DType::f16 ? from_half(half) : from_bfloat(half);
    }
  }
  const S* from = static_cast<const S*>(source) + index;
  return n >= kLanes<S> ? load(from) : load_part(from, n);
}

template <class S, int... Lane>
TCONV_INLINE Vec<S> take_odd(Vec<S> a, Vec<S> b, LaneList<Lane...>) {
  return __builtin_shufflevector(a, b, (2 * Lane + 1)...);
}
// v holds lanes positions of Channels values one after the other; then a vector for each channel.
template <class S, int Channels>
TCONV_INLINE void split_channels(Vec<S>* v) {
  if constexpr (Channels > 1) {
    constexpr LaneNumbers<kLanes<S>> lanes;
    constexpr int kHalf = Channels / 2;
    Vec<S> even[kHalf], odd[kHalf];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      even[i] = take_even<S>(v[2 * i], v[2 * i + 1], lanes);
      odd[i] = take_odd<S>(v[2 * i], v[2 * i + 1], lanes);
    }
    split_channels<S, kHalf>(even);
    split_channels<S, kHalf>(odd);
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
  }
}

// load_transposed for 1, 2, 4 or 8 channels: positions are gathered in a line, and log2(channels) rounds split it. A
// whole transposition of vectors that are mostly empty took half of the time of kernelbench_1_72's grad_input.
template <class S, int Channels>
void load_few(const void* source, DType dtype, int64_t index, int64_t stride, int64_t n, S* rows, int64_t pitch) {
  constexpr int64_t kBlock = kLanes<S>, kLine = 16 * kBlock;
  S line[kLine * Channels + kBlock];
  for (int64_t x0 = 0; x0 < n; x0 += kLine) {
    const int64_t count = n - x0 < kLine ? n - x0 : kLine;
    const int64_t first = index + x0 * stride;
    if (size_of(dtype) == sizeof(S)) {
      const S* from = static_cast<const S*>(source) + first;
      for (int64_t x = 0; x < count; ++x) memcpy(line + x * Channels, from + x * stride, Channels * sizeof(S));
    } else {
      for (int64_t x = 0; x < count; ++x)
        store_part(line + x * Channels, load_lanes<S>(source, dtype, first + x * stride, Channels), Channels);
    }
    for (int64_t x = 0; x < count; x += kBlock) {
      Vec<S> v[Channels];
#pragma GCC unroll 8
      for (int i = 0; i < Channels; ++i) v[i] = load(line + x * Channels + i * kBlock);
      split_channels<S, Channels>(v);
#pragma GCC unroll 8
      for (int c = 0; c < Channels; ++c)
        copy_part(rows + c * pitch + x0 + x, v[c], count - x < kBlock ? count - x : kBlock);
    }
  }
}

// rows[c * pitch + x] = element (index + x * stride + c) for c < channels, x < n.
template <class S>
void load_transposed(const void* source, DType dtype, int64_t index, int64_t stride, int64_t channels, int64_t n,
                     S* rows, int64_t pitch) {
  constexpr int64_t kBlock = kLanes<S>;
  if (channels < kBlock) {
    if (channels == 1) return load_few<S, 1>(source, dtype, index, stride, n, rows, pitch);
    if (channels == 2) return load_few<S, 2>(source, dtype, index, stride, n, rows, pitch);
    if (channels == 4) return load_few<S, 4>(source, dtype, index, stride, n, rows, pitch);
    if (channels == 8) return load_few<S, 8>(source, dtype, index, stride, n, rows, pitch);
  }
  for (int64_t x = 0; x < n; x += kBlock)
    for (int64_t c = 0; c < channels; c += kBlock) {
      const int64_t nx = n - x < kBlock ? n - x : kBlock, nc = channels - c < kBlock ? channels - c : kBlock;
      Vec<S> v[kBlock];
      load_block<S>(v, nx, [&](int64_t i) { return load_lanes<S>(source, dtype, index + (x + i) * stride + c, nc); });
      transpose_block<S>(v);
#pragma GCC unroll 16
      for (int j = 0; j < kBlock; ++j)
        if (j < nc) copy_part(rows + (c + j) * pitch + x, v[j], nx);
    }
}

// store_transposed for 1, 2, 4 or 8 channels: interleaved and rounded by whole vectors, then moved position by position.
template <class S, int Channels>
void store_few(const S* rows, int64_t pitch, void* target, DType dtype, int64_t index, int64_t stride, int64_t n) {
  constexpr int64_t kBlock = kLanes<S>, kLine = 16 * kBlock;
  S line[(kLine + kBlock) * Channels];
  uint16_t half[kLine * Channels];
  for (int64_t x0 = 0; x0 < n; x0 += kLine) {
    const int64_t count = n - x0 < kLine ? n - x0 : kLine, first = index + x0 * stride;
    if constexpr (Channels == 1)
      memcpy(line, rows + x0, static_cast<size_t>(count) * sizeof(S));
    else
      interleave_powers<S, Channels>(rows + x0, pitch, count, line);
    if (stride == Channels) {
      store_row(line, target, dtype, first, count * Channels);
    } else if (size_of(dtype) == sizeof(S)) {
      S* to = static_cast<S*>(target) + first;
      for (int64_t x = 0; x < count; ++x) memcpy(to + x * stride, line + x * Channels, Channels * sizeof(S));
    } else {
      store_row(line, half, dtype, 0, count * Channels);
      uint16_t* to = static_cast<uint16_t*>(target) + first;
      for (int64_t x = 0; x < count; ++x) memcpy(to + x * stride, half + x * Channels, Channels * sizeof(uint16_t));
    }
  }
}

// The reverse; writes exactly `channels` elements for each x. Reads up to one vector beyond the rows.
template <class S>
void store_transposed(const S* rows, int64_t pitch, void* target, DType dtype, int64_t index, int64_t stride,
                      int64_t channels, int64_t n) {
  constexpr int64_t kBlock = kLanes<S>;
  if (channels == 1) return store_few<S, 1>(rows, pitch, target, dtype, index, stride, n);
  if (channels == 2) return store_few<S, 2>(rows, pitch, target, dtype, index, stride, n);
  if (channels == 4) return store_few<S, 4>(rows, pitch, target, dtype, index, stride, n);
  if (channels == 8) return store_few<S, 8>(rows, pitch, target, dtype, index, stride, n);
  for (int64_t c = 0; c < channels; c += kBlock) {
    const int64_t nc = channels - c < kBlock ? channels - c : kBlock;
    for (int64_t x = 0; x < n; x += kBlock) {
      const int64_t nx = n - x < kBlock ? n - x : kBlock;
      Vec<S> v[kBlock];
      load_block<S>(v, nc, [&](int64_t j) { return load(rows + (c + j) * pitch + x); });
      transpose_block<S>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) {
        if (i >= nx) break;
        const int64_t at = index + (x + i) * stride + c;
        if (size_of(dtype) == sizeof(S)) {
          copy_part(static_cast<S*>(target) + at, v[i], nc);
        } else {
          S part[kBlock];
          store(part, v[i]);
          store_row(part, target, dtype, at, nc);
        }
      }
    }
  }
}

}  // namespace
}  // namespace tconv::cpu
