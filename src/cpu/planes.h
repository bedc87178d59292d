// planes.h — staging a tile of a tensor as zero-padded planes, as phase_gemm.h describes them; for files that are compiled
// once per target.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/pairs.h"
#include "cpu/phase_gemm.h"
#include "cpu/rows.h"

namespace tconv::cpu {
namespace {

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// A tile: its samples, its first source channel, its first position and extents; g, m0, m1: the results of one item.
struct Place {
  int64_t b, samples, g, m0, m1, source_channel;
  int64_t q0[3], n[3];
};

// words[x] = element (index + x) in the low half, element (index + x + distance) in the high half.
template <class S>
void load_pairs(const void* source, int64_t index, int64_t distance, int64_t n, S* words) {
  const uint16_t *low = static_cast<const uint16_t*>(source) + index, *high = low + distance;
  uint32_t* to = reinterpret_cast<uint32_t*>(words);
  for (int64_t x = 0; x < n; ++x) to[x] = low[x] | static_cast<uint32_t>(high[x]) << 16;
}

template <class S>
void apply_pre(const PhaseGemmTask& task, S* row, int64_t n) {
  for (int i = 0; i < task.num_pre; ++i)
    apply_pointwise<S>(task.pre[i].kind, static_cast<S>(task.pre[i].a), static_cast<S>(task.pre[i].b), nullptr, 0, row,
                       n);
}

// Columns [lo, hi) of a plane row lie inside the source when its first column is source column `first` (step apart).
struct Span {
  int64_t lo, hi;
};
Span inside(int64_t first, int64_t step, int64_t size, int64_t n) {
  Span span;
  span.lo = first >= 0 ? 0 : (-first + step - 1) / step;
  span.hi = first >= size ? 0 : (size - first + step - 1) / step;
  span.lo = min_of(span.lo, n);
  span.hi = max_of(span.lo, min_of(span.hi, n));
  return span;
}

template <class S>
void zero(S* row, int64_t n) {
  if (n > 0) memset(row, 0, static_cast<size_t>(n) * sizeof(S));
}

// Lines of a row that lies `distance` bytes behind this one. Rows are short and far from each other, which the hardware
// does not foresee: two fifths of nnU-Net's grad_input (16 wide, stride 2) were spent waiting for them.
TCONV_INLINE void prefetch_row(const void* source, DType dtype, int64_t index, int64_t n, int64_t distance) {
  const int64_t element = static_cast<int64_t>(size_of(dtype));
  const char* first = static_cast<const char*>(source) + (index + distance) * element;
  for (int64_t at = 0, bytes = min_of(n * element, 1024); at < bytes + 63; at += 64) __builtin_prefetch(first + at);
}

// Lanes [lo, hi) of the vector at `index`, zeros in the others.
template <class S>
TCONV_INLINE Vec<S> load_inside(const void* source, DType dtype, int64_t index, int64_t lo, int64_t hi) {
  constexpr int64_t kBlock = kLanes<S>;
  hi = hi < kBlock ? hi : kBlock;
  if (lo <= 0) return load_lanes<S>(source, dtype, index, hi > 0 ? hi : 0);
  S lanes[2 * kBlock];
  store(lanes, Vec<S>{});
  if (lo < hi) store(lanes + lo, load_lanes<S>(source, dtype, index + lo, hi - lo));
  return load(lanes);
}

// half[r][x] = element (index + 2 * x + r) where 2 * x + r is in [lo, hi), else 0, for x < n and each half that is not null.
// Writes up to a vector beyond n.
template <class S>
TCONV_INLINE void split_row(const void* source, DType dtype, int64_t index, int64_t lo, int64_t hi, int64_t n,
                            S* const* half) {
  constexpr int64_t kBlock = kLanes<S>;
  constexpr LaneNumbers<kLanes<S>> lanes;
  for (int64_t x = 0; x < n; x += kBlock) {
    Vec<S> v[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = 2 * x + i * kBlock;
      v[i] = load_inside<S>(source, dtype, index + at, lo - at, hi - at);
    }
    if (half[0]) store(half[0] + x, take_even<S>(v[0], v[1], lanes));
    if (half[1]) store(half[1] + x, take_odd<S>(v[0], v[1], lanes));
  }
}

// Stages channels [k0, k1) of planes [first, next), which share their depth and height phase and differ in the width phase.
template <class S, class Buffers>
void stage_block(const PhaseGemmTask& task, const Place& place, const Buffers& buffers, int first, int next, int64_t k0,
                 int64_t k1) {
  const int64_t depth = place.n[0] + task.plane[0] - task.tile[0], height = place.n[1] + task.plane[1] - task.tile[1];
  const int64_t width = place.n[2] + task.plane[2] - task.tile[2];
  const int64_t channels = task.source_channels;
  const int64_t positions = task.source_size[0] * task.source_size[1] * task.source_size[2];
  const int64_t step = task.source_step[2];
  const int64_t* phase = task.plane_phase + 3 * first;
  const int64_t column = step * (place.q0[2] + task.first_shift[2]);  // of phase 0
  const int64_t column_end = column + step * width;
  const int64_t from = max_of(0, column), until = max_of(from, min_of(task.source_size[2], column_end));
  auto row_at = [&](int plane, int64_t k, int64_t d, int64_t h) {
    return buffers.planes + plane * task.phase_pitch + k * task.plane_pitch + (d * task.plane[1] + h) * task.plane[2];
  };
  const int64_t* rows = task.plane_rows + 4 * first;
  auto source_row = [&](int64_t d, int64_t h) -> int64_t {  // first position of a source row, or -1
    if (d < rows[0] || d >= rows[0] + rows[1] + place.n[0] || h < rows[2] || h >= rows[2] + rows[3] + place.n[1])
      return -1;  // of another phase's taps
    const int64_t sd = task.source_step[0] * (place.q0[0] + task.first_shift[0] + d) + phase[0];
    const int64_t sh = task.source_step[1] * (place.q0[1] + task.first_shift[1] + h) + phase[1];
    if (sd < 0 || sd >= task.source_size[0] || sh < 0 || sh >= task.source_size[1]) return -1;
    return (sd * task.source_size[1] + sh) * task.source_size[2];
  };
  if (task.layout == Layout::contiguous) {
    const int64_t unit = kPairs ? 2 : 1;
    for (int64_t k = k0; k < k1; ++k) {
      const int64_t channel = (place.b * channels + place.source_channel + k * unit) * positions;
      const bool ahead = k + 2 < task.rows, split = task.num_planes > 1;
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t h = 0; h < height; ++h) {
          const int64_t row = source_row(d, h);
          if (row < 0 || until == from) {
            for (int plane = first; plane < next; ++plane) zero(row_at(plane, k, d, h), width);
            continue;
          }
          const int64_t index = channel + row + from;
          if (ahead) {
            for (int64_t i = 0; i < unit; ++i)
              prefetch_row(task.source, task.dtype, index, until - from, (2 * unit + i) * positions);
          } else if (split) {
            prefetch_row(task.source, task.dtype, index, until - from, 4 * task.source_step[1] * task.source_size[2]);
          }
          if (!kPairs && step == 2 && task.num_pre == 0) {
            S* half[2] = {nullptr, nullptr};
            for (int plane = first; plane < next; ++plane)
              half[task.plane_phase[3 * plane + 2]] = row_at(plane, k, d, h);
            split_row(task.source, task.dtype, channel + row + column, from - column, until - column, width, half);
            continue;
          }
          // Through a line: taking every step-th element from the tensor itself, once for each plane, made the grad_input of
          // kernelbench_1_81 29 ms instead of 20 and of 1_73 105 instead of 103.
          S* line = step == 1 ? row_at(first, k, d, h) : buffers.line;
          if constexpr (kPairs)
            load_pairs(task.source, index, positions, until - from, line + (from - column));
          else
            load_row(task.source, task.dtype, index, until - from, line + (from - column));
          if (task.num_pre) apply_pre<S>(task, line + (from - column), until - from);
          zero(line, from - column);
          zero(line + (until - column), column_end - until);
          if (step == 1) continue;
          for (int plane = first; plane < next; ++plane)
            take_every(line + task.plane_phase[3 * plane + 2], step, width, row_at(plane, k, d, h));
        }
    }
  } else {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t h = 0; h < height; ++h) {
        const int64_t row = source_row(d, h);
        for (int plane = first; plane < next; ++plane) {
          const int64_t start = column + task.plane_phase[3 * plane + 2];
          const Span span = row < 0 ? Span{0, 0} : inside(start, step, task.source_size[2], width);
          for (int64_t k = k0; k < k1; ++k) {
            S* out = row_at(plane, k, d, h);
            zero(out, span.lo);
            zero(out + span.hi, width - span.hi);
          }
          const int64_t position = place.b * positions + row + start + step * span.lo;
          // A pair of channels is one word, and moving words keeps their bits.
          const int64_t unit = kPairs ? 2 : 1;
          load_transposed(task.source, kPairs ? DType::f32 : task.dtype,
                          (position * channels + place.source_channel) / unit + k0, step * channels / unit, k1 - k0,
                          span.hi - span.lo, row_at(plane, k0, d, h) + span.lo, task.plane_pitch);
          if (task.num_pre == 0) continue;
          for (int64_t k = k0; k < k1; ++k) {  // through the line: whole vectors would reach into the zeros
            S* out = row_at(plane, k, d, h) + span.lo;
            memcpy(buffers.line, out, static_cast<size_t>(span.hi - span.lo) * sizeof(S));
            apply_pre<S>(task, buffers.line, span.hi - span.lo);
            memcpy(out, buffers.line, static_cast<size_t>(span.hi - span.lo) * sizeof(S));
          }
        }
      }
  }
  if (!task.masked || k0 > 0) return;
  for (int plane = first; plane < next; ++plane)
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t h = 0; h < height; ++h) {
        S* out = buffers.mask + plane * task.plane_pitch + (d * task.plane[1] + h) * task.plane[2];
        const Span span = source_row(d, h) < 0
                              ? Span{0, 0}
                              : inside(column + task.plane_phase[3 * plane + 2], step, task.source_size[2], width);
        for (int64_t x = 0; x < width; ++x) out[x] = x >= span.lo && x < span.hi ? S(1) : S(0);
      }
}

// Fills buffers.planes (and buffers.mask: one where the plane lies inside the source) for task.k channels from
// place.source_channel on. The rows' tails behind the staged width are undefined.
template <class S, class Buffers>
void stage_planes(const PhaseGemmTask& task, const Place& place, const Buffers& buffers) {
  auto blocks = [&](int64_t k0, int64_t k1) {
    for (int first = 0, next; first < task.num_planes; first = next) {
      const int64_t* phase = task.plane_phase + 3 * first;
      for (next = first + 1; next < task.num_planes; ++next)
        if (task.plane_phase[3 * next] != phase[0] || task.plane_phase[3 * next + 1] != phase[1]) break;
      stage_block<S>(task, place, buffers, first, next, k0, k1);
    }
  };
  if (task.layout != Layout::contiguous || task.num_planes == 1) return blocks(0, task.rows);
  // All rows of a channel while they are near each other in memory, then the next channel.
  for (int64_t k = 0; k < task.rows; ++k) blocks(k, k + 1);
}

}  // namespace
}  // namespace tconv::cpu
