// phase_gemm — all phases of a tile as small matrix products over staged planes.
//
// Computes  forward and grad_input, any rank, parameters, groups, dtype and layout; with pre-activation, bias and the
//           pointwise operations in front of a normalisation.
// Method    A tile's source is staged once: planes of fp32 (fp64) rows with zeros outside, channels_last transposed,
//           grad_output split by stride phase. A tap is then an offset, and rows follow each other, so a run of
//           positions crosses row ends (those few results are not stored) and narrow images fill whole vectors.
//           Register tile: result channels by vectors of positions; weights are packed [tap][k][m] and broadcast.
//           All width phases of a block of result channels are computed, interleaved, finished and stored together; rows
//           that no tap reaches, all the same, once.
//           On AVX2 the largest tile takes all taps of a channel together, in assembly (tiles_avx2.h); grad_input with
//           many channels stages and multiplies a slab of them at a time.
//           For avx512_bf16 a staged word holds a pair of channels as they are, and one instruction adds both products
//           in fp32: 170 % of the fp32 peak on a Zen 5 core where fp32 reaches 85 %.
// Refuses   grad_weight and epilogues alone; targets above the machine's; f64 mixed with another dtype. For avx512_bf16
//           other dtypes, a pre-activation, an odd number of source channels per group.
// Reads as  phase_gemm.h states the formulation, phase_gemm_driver.cpp chooses tiles; here are the loops over one tile.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/phase_gemm.h"

#include "cpu/planes.h"
#include "cpu/tiles_avx2.h"

namespace tconv::cpu {
namespace {

// Register tiles: m result channels by v vectors. 32 registers hold 24 sums, 3 to 6 vectors of the plane and a broadcast
// weight; 16 registers hold 12.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisterM = 8;
constexpr int vectors_for(int m) { return m == 8 ? 3 : m == 4 ? 6 : 8; }
#else
constexpr int kRegisterM = 4;
constexpr int vectors_for(int m) { return m == 4 ? 3 : m == 2 ? 5 : 8; }
#endif
#if defined(TCONV_TILES_AVX2)
constexpr bool kTapsInnermost = true;
#else
constexpr bool kTapsInnermost = false;
#endif

// One register tile: c[m][v] = bias[m] + sum over taps and k of w[tap][k][m] * x[offset[tap] + k * k_pitch + v], over all
// taps of a phase or the listed ones of them; behind the first slab c goes on from what is there.
// Masked: a product counts only where the mask, laid out as one plane, is not zero.
template <class S, int M, int V, bool Masked>
void register_tile(const S* x, int64_t k_pitch, const int64_t* offsets, int64_t phase_taps, int64_t num_taps,
                   const int* taps, int64_t k_count, const S* weight, const S* bias, bool resume, S* c, int64_t c_pitch,
                   const S* mask, const int64_t* mask_offsets) {
  Vec<S> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vec<S> start = bias ? splat(bias[m]) : Vec<S>{};
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = resume ? load(c + m * c_pitch + v * kLanes<S>) : start;
  }
  const int64_t w_step = (kTapsInnermost ? phase_taps : 1) * M, tap_step = (kTapsInnermost ? 1 : k_count) * M;
  for (int64_t i = 0; i < num_taps; ++i) {
    const int64_t tap = taps ? taps[i] : i;
    const S *at = x + offsets[tap], *w = weight + tap * tap_step;
    for (int64_t k = 0; k < k_count; ++k) {
      Vec<S> plane[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) plane[v] = load(at + v * kLanes<S>);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec<S> value = broadcast(w + m);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          if constexpr (Masked) {
            const Vec<S> inside = load(mask + mask_offsets[tap] + v * kLanes<S>);
            sum[m][v] = inside != 0 ? multiply_add<S>(sum[m][v], plane[v], value) : sum[m][v];
          } else {
            sum[m][v] = multiply_add<S>(sum[m][v], plane[v], value);
          }
        }
      }
      at += k_pitch;
      w += w_step;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + m * c_pitch + v * kLanes<S>, sum[m][v]);
}

#if defined(TCONV_TILES_AVX2)
// The largest tile of AVX2: up to nine taps for one channel, then the next channel. The taps read the same lines; one tap
// after the other over all channels reads three lines for 12 products, which the second cache level delivers in the time
// of those. There is no loop over the taps: its end is guessed wrong where a core's other thread works too.
void register_tile_avx2(const float* x, int64_t k_pitch, const int64_t* offsets, int64_t phase_taps, int64_t num_taps,
                        const int* taps, int64_t k_count, const float* weight, const float* bias, bool resume, float* c,
                        int64_t c_pitch, const float*, const int64_t*) {
  constexpr float kNothing[4] = {};
  const float* start = resume ? nullptr : bias ? bias : kNothing;
  if ((num_taps == 0 || k_count == 0) && !resume)
    for (int m = 0; m < 4; ++m)
      for (int v = 0; v < 3; ++v) store(c + m * c_pitch + v * kLanes<float>, splat(start[m]));
  if (k_count == 0) return;
  const int64_t pieces = (num_taps + 8) / 9, most = pieces > 0 ? (num_taps + pieces - 1) / pieces : 0;
  for (int64_t i = 0, n; i < num_taps; i += n) {
    const int64_t tap = taps ? taps[i] : i;
    for (n = 1; n < most && i + n < num_taps && (!taps || taps[i + n] == tap + n);) ++n;
    using AddTaps =
        void (*)(const float*, int64_t, const int64_t*, int64_t, const float*, int64_t, const float*, float*, int64_t);
    constexpr AddTaps kAdd[] = {add_taps<1>, add_taps<2>, add_taps<3>, add_taps<4>, add_taps<5>,
                                add_taps<6>, add_taps<7>, add_taps<8>, add_taps<9>};
    kAdd[n - 1](x, k_pitch, offsets + tap, k_count, weight + 4 * tap, 4 * phase_taps, i == 0 ? start : nullptr, c,
                c_pitch);
  }
}
#endif

template <class S>
using TileFunction = void (*)(const S*, int64_t, const int64_t*, int64_t, int64_t, const int*, int64_t, const S*,
                              const S*, bool, S*, int64_t, const S*, const int64_t*);

template <class S, int M, bool Masked>
TileFunction<S> tile_function(int vectors) {
  constexpr int kMax = vectors_for(M);
#if defined(TCONV_TILES_AVX2)
  if constexpr (sizeof(S) == sizeof(float) && M == 4 && !Masked)
    if (vectors == 3) return register_tile_avx2;
#endif
  switch (vectors) {
    case 1:
      return register_tile<S, M, 1, Masked>;
    case 2:
      return register_tile<S, M, 2, Masked>;
    case 3:
      return register_tile<S, M, 3, Masked>;
    case 4:
      return register_tile < S, M, kMax < 4 ? kMax : 4, Masked > ;
    case 5:
      return register_tile < S, M, kMax < 5 ? kMax : 5, Masked > ;
    case 6:
      return register_tile < S, M, kMax < 6 ? kMax : 6, Masked > ;
    case 7:
      return register_tile < S, M, kMax < 7 ? kMax : 7, Masked > ;
    default:
      return register_tile<S, M, kMax, Masked>;
  }
}

template <class S, bool Masked>
TileFunction<S> tile_function(int m, int vectors) {
  switch (m) {
#if defined(__AVX512F__) || defined(__aarch64__)
    case 8:
      return tile_function<S, 8, Masked>(vectors);
#endif
    case 4:
      return tile_function<S, 4, Masked>(vectors);
    case 2:
      return tile_function<S, 2, Masked>(vectors);
    default:
      return tile_function<S, 1, Masked>(vectors);
  }
}

Place place_of(const PhaseGemmTask& task, int64_t item) {
  Place place;
  const int64_t chunk = item % task.m_chunks;
  item /= task.m_chunks;
  for (int dim = 2; dim >= 0; --dim) {
    place.q0[dim] = item % task.tiles[dim] * task.tile[dim];
    place.n[dim] = min_of(task.tile[dim], task.grid[dim] - place.q0[dim]);
    item /= task.tiles[dim];
  }
  const int64_t group_items = task.groups / task.item_groups;
  place.g = item % group_items * task.item_groups;
  place.b = item / group_items * task.samples;
  place.samples = min_of(task.samples, task.batch - place.b);
  place.m0 = chunk * task.m_chunk;
  place.m1 = min_of(task.m, place.m0 + task.m_chunk);
  return place;
}

template <class S>
struct Buffers {
  S *planes, *mask, *sums, *rows, *line;
  int* taps;
  int64_t sums_pitch, row_pitch;
  int64_t bytes;
};

template <class S>
Buffers<S> carve(const PhaseGemmTask& task, void* scratch) {
  Buffers<S> buffers;
  int64_t used = 0;
  auto take = [&](int64_t n) {
    S* p = scratch ? reinterpret_cast<S*>(static_cast<char*>(scratch) + used) : nullptr;
    used += round_up((n + kLanes<S>)*static_cast<int64_t>(sizeof(S)), 64);
    return p;
  };
  const int64_t block = min_of(kRegisterM, task.m), channels = task.slab < task.rows ? task.m_chunk : block;
  constexpr int64_t kSlack = 9 * kLanes<S>;  // a register tile may reach this far beyond the last position
  buffers.sums_pitch = round_up(task.samples * task.sample_pitch, kLanes<S>) + kLanes<S>;
  buffers.row_pitch = round_up((task.tile[2] + kLanes<S>)*task.result_step[2], kLanes<S>);
  buffers.planes = take(task.num_planes * task.phase_pitch + kSlack);
  buffers.mask = take(task.masked ? task.num_planes * task.plane_pitch + kSlack : 0);
  buffers.sums = take(task.result_step[2] * channels * buffers.sums_pitch + kSlack);
  buffers.rows = take(block * buffers.row_pitch + 2 * kLanes<S>);
  buffers.line = take(max_of(task.source_step[2] * (task.plane[2] + kLanes<S>), task.k) + 2 * kLanes<S>);
  buffers.taps = reinterpret_cast<int*>(take(task.num_taps));
  buffers.bytes = used;
  return buffers;
}

int block_of(int64_t channels) {
  int block = kRegisterM;
  while (block > channels) block /= 2;
  return block;
}

// Products of result channels [m0, m1) for one result phase and source channels [k0, k1), over all positions of the tile.
// Without slabs they are one block and all channels; tests for more made a depthwise layer 10 % slower.
template <class S, bool Slabs>
void multiply(const PhaseGemmTask& task, const Place& place, const Buffers<S>& buffers, int64_t k0, int64_t k1,
              int64_t m0, int64_t m1, int phase, S* sums) {
  const int64_t first_tap = task.phase_taps[phase], num_taps = task.phase_taps[phase + 1] - first_tap, rows = k1 - k0;
  const S* slab_weight = static_cast<const S*>(task.weight) + (place.g * task.rows + k0) * task.m * task.num_taps;
  auto weight_of = [&](int64_t m, int block) { return slab_weight + (m * task.num_taps + first_tap * block) * rows; };
  const int first = block_of(m1 - m0);
  const int most = first == 8   ? vectors_for(8)
                   : first == 4 ? vectors_for(4)
                   : first == 2 ? vectors_for(2)
                                : vectors_for(1);
  const S* bias = task.bias ? static_cast<const S*>(task.bias) + place.g * task.m + m0 : nullptr;
  const S* weight = weight_of(m0, first);
  auto multiply_run = [&](int64_t start, int64_t length, const int* taps, int64_t count_of_taps) {
    for (int64_t vector = 0, vectors = (length + kLanes<S> - 1) / kLanes<S>; vector < vectors;) {
      // The last two tiles of a run share what is left, so that none is thin.
      const int64_t left = vectors - vector;
      const int count = static_cast<int>(left <= most ? left : left < 2 * most ? (left + 1) / 2 : most);
      const int64_t at = start + vector * kLanes<S>;
      auto multiply_tile = [&](int block, const S* w, const S* start_of_sums, S* c) {
        const TileFunction<S> tile =
            task.masked ? tile_function<S, true>(block, count) : tile_function<S, false>(block, count);
        tile(buffers.planes + at, task.plane_pitch, task.tap_offset + first_tap, num_taps, count_of_taps, taps, rows, w,
             start_of_sums, Slabs && k0 > 0, c + at, buffers.sums_pitch, task.masked ? buffers.mask + at : nullptr,
             task.mask_offset + first_tap);
      };
      multiply_tile(first, weight, bias, sums);
      for (int64_t m = m0 + first; Slabs && m < m1;) {
        const int block = block_of(m1 - m);
        multiply_tile(block, weight_of(m, block), bias ? bias + m - m0 : nullptr, sums + (m - m0) * buffers.sums_pitch);
        m += block;
      }
      vector += count;
    }
  };
  const int64_t width = task.plane[2], slice = task.plane[1] * width;
  auto run_length = [&](int64_t rows) { return (rows - 1) * width + place.n[2]; };
  // A tap counts for depths [d, d + 1) and rows [h0, h1) of the tile unless it reads only beyond the source there.
  const int64_t* source = task.tap_source + 2 * first_tap;
  auto reads = [&](int64_t tap, int dim, int64_t first, int64_t end) {
    const int64_t at = task.source_step[dim] * place.q0[dim] + source[2 * tap + dim];
    return at + task.source_step[dim] * (end - 1) >= 0 && at + task.source_step[dim] * first < task.source_size[dim];
  };
  bool all = true;
  for (int64_t tap = 0; all && tap < num_taps; ++tap)
    for (int dim = 0; dim < 2; ++dim)
      all = all && reads(tap, dim, 0, 1) && reads(tap, dim, place.n[dim] - 1, place.n[dim]);
  auto vectors_of = [](int64_t length) { return (length + kLanes<S> - 1) / kLanes<S>; };
  // One run over all samples, one for each or one for each depth, whichever computes the fewest vectors.
  const int64_t of_depth = run_length(place.n[1]), of_sample = (place.n[0] - 1) * slice + of_depth;
  const int64_t whole = (place.samples - 1) * task.sample_pitch + of_sample;
  // With slabs one run: what the last vector of one adds to the next one's sums would stay there.
  if constexpr (Slabs) return multiply_run(0, whole, nullptr, num_taps);
  if (all) {
    const int64_t each = min_of(vectors_of(of_sample), place.n[0] * vectors_of(of_depth));
    if (vectors_of(whole) <= place.samples * each) return multiply_run(0, whole, nullptr, num_taps);
    for (int64_t sample = 0; sample < place.samples; ++sample) {
      const int64_t start = sample * task.sample_pitch;
      if (vectors_of(of_sample) <= each) {
        multiply_run(start, of_sample, nullptr, num_taps);
        continue;
      }
      for (int64_t d = 0; d < place.n[0]; ++d) multiply_run(start + d * slice, of_depth, nullptr, num_taps);
    }
    return;
  }
  // At the source's edge: runs of rows, cut where leaving taps out saves more than whole vectors cost. A third of the
  // products of a 5 x 7 x 9 kernel without padding on 16 x 32 positions lies beyond the edge.
  auto cost = [&](int64_t length, int64_t count) { return vectors_of(length) * (count + 1); };
  auto each_piece = [&](auto&& piece) {
    for (int64_t d = 0; d < place.n[0]; ++d) {
      auto count_taps = [&](int64_t h0, int64_t h1) {
        int64_t count = 0;
        for (int64_t tap = 0; tap < num_taps; ++tap) count += reads(tap, 0, d, d + 1) && reads(tap, 1, h0, h1);
        return count;
      };
      for (int64_t h0 = 0, h1; h0 < place.n[1]; h0 = h1) {
        h1 = h0 + 1;
        int64_t count = count_taps(h0, h1);
        for (; h1 < place.n[1]; ++h1) {
          const int64_t joined = count_taps(h0, h1 + 1);
          if (cost(run_length(h1 + 1 - h0), joined) >
              cost(run_length(h1 - h0), count) + cost(run_length(1), count_taps(h1, h1 + 1)))
            break;
          count = joined;
        }
        piece(d, h0, h1, count);
      }
    }
  };
  if (place.samples > 1) {  // samples can be joined with all taps only
    int64_t cut = 0;
    each_piece([&](int64_t, int64_t h0, int64_t h1, int64_t count) { cut += cost(run_length(h1 - h0), count); });
    if (cost(whole, num_taps) <= place.samples * cut) return multiply_run(0, whole, nullptr, num_taps);
  }
  // In the order of the positions: a run's last vector may reach into the next one's.
  for (int64_t sample = 0; sample < place.samples; ++sample)
    each_piece([&](int64_t d, int64_t h0, int64_t h1, int64_t) {
      int64_t count = 0;
      for (int64_t tap = 0; tap < num_taps; ++tap)
        if (reads(tap, 0, d, d + 1) && reads(tap, 1, h0, h1)) buffers.taps[count++] = static_cast<int>(tap);
      multiply_run(sample * task.sample_pitch + d * slice + h0 * width, run_length(h1 - h0), buffers.taps, count);
    });
}

// Interleaves the width phases of a block of result channels, applies the operations and stores the rows; all rows like
// the first where they are the same.
template <class S>
void store_block(const PhaseGemmTask& task, const Place& place, const Buffers<S>& buffers, int64_t sample, int64_t m0,
                 int block, int64_t phase_d, int64_t phase_h, bool same) {
  const int64_t channels = task.groups * task.m, c0 = place.g * task.m + m0, step = task.result_step[2];
  const int64_t positions = task.result_size[0] * task.result_size[1] * task.result_size[2];
  const int64_t column = step * place.q0[2], b = place.b + sample;
  const int64_t width = min_of(step * place.n[2], task.result_size[2] - column);
  for (int64_t d = 0; d < place.n[0]; ++d) {
    const int64_t rd = task.result_step[0] * (place.q0[0] + d) + phase_d;
    if (rd >= task.result_size[0]) break;
    for (int64_t h = 0; h < place.n[1]; ++h) {
      const int64_t rh = task.result_step[1] * (place.q0[1] + h) + phase_h;
      if (rh >= task.result_size[1]) break;
      const int64_t position = (rd * task.result_size[1] + rh) * task.result_size[2] + column;
      for (int m = 0; m < block; ++m) {
        const int64_t first = sample * task.sample_pitch + (d * task.plane[1] + h) * task.plane[2];
        const S* from = buffers.sums + m * buffers.sums_pitch + (same ? 0 : first);
        S* row = buffers.rows + m * buffers.row_pitch;
        const int64_t start = (b * channels + c0 + m) * positions + position;
        if (same && d + h > 0) {
          if (task.layout == Layout::contiguous) store_row(row, task.result, task.result_dtype, start, width);
          continue;
        }
        if (task.num_ops == 0 && task.layout == Layout::contiguous && !same) {
          store_phases(from, block * buffers.sums_pitch, step, width, row, task.result, task.result_dtype, start);
          continue;
        }
        if (step == 1)
          memcpy(row, from, static_cast<size_t>(width) * sizeof(S));
        else
          interleave(from, block * buffers.sums_pitch, step, place.n[2], row);
        for (int i = 0; i < task.num_ops; ++i) {
          const PhaseOp& op = task.ops[i];
          const S* operand = op.operand == OperandKind::channel ? static_cast<const S*>(op.values) + c0 + m : nullptr;
          if (op.operand == OperandKind::tensor) {
            // The line is free: staging is over.
            S element[kLanes<S> + 1], *values = buffers.line;
            const int64_t piece = min_of(task.source_step[2] * (task.plane[2] + kLanes<S>), kLanes<S> * 4);
            for (int64_t x = 0; x < width; x += piece) {
              const int64_t n = min_of(piece, width - x);
              if (task.layout == Layout::contiguous) {
                load_row(op.values, task.dtype, start + x, n, values);
              } else {
                for (int64_t i0 = 0; i0 < n; ++i0) {
                  load_row(op.values, task.dtype, (b * positions + position + x + i0) * channels + c0 + m, 1, element);
                  values[i0] = element[0];
                }
              }
              S last[kLanes<S>];  // a rounded-up piece must not touch the next one
              const int64_t whole = round_up(n, kLanes<S>);
              if (x + n < width && whole != n) memcpy(last, row + x + n, static_cast<size_t>(whole - n) * sizeof(S));
              apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), values, 1, row + x, n);
              if (x + n < width && whole != n) memcpy(row + x + n, last, static_cast<size_t>(whole - n) * sizeof(S));
            }
          } else {
            apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), operand, 0, row, width);
          }
        }
        if (task.layout == Layout::contiguous) store_row(row, task.result, task.result_dtype, start, width);
      }
      if (task.layout == Layout::channels_last) {
        store_transposed(buffers.rows, buffers.row_pitch, task.result, task.result_dtype,
                         (b * positions + position) * channels + c0, channels, block, width);
      }
    }
  }
}

template <class S>
void stage_samples(const PhaseGemmTask& task, const Place& place, const Buffers<S>& buffers) {
  for (int64_t sample = 0; sample < place.samples; ++sample) {
    Place one = place;
    Buffers<S> of_sample = buffers;
    one.b += sample;
    of_sample.planes += sample * task.sample_pitch;
    of_sample.mask += sample * task.sample_pitch;
    stage_planes<S>(task, one, of_sample);
  }
}

// What 24 positions read of a slab's planes stays in the first cache level while the weights of all blocks pass by. With
// all channels a vocoder's planes come from the third one, for every block again.
template <class S>
void run_slabs(const PhaseGemmTask& task, const Place& place, const Buffers<S>& buffers) {
  PhaseGemmTask slab = task;
  Place part = place;
  for (int64_t k0 = 0; k0 < task.rows; k0 += task.slab) {
    slab.rows = min_of(task.slab, task.rows - k0);
    part.source_channel = place.source_channel + k0;
    stage_samples(slab, part, buffers);
    multiply<S, true>(task, place, buffers, k0, k0 + slab.rows, place.m0, place.m1, 0, buffers.sums);
  }
  for (int64_t m = place.m0, block; m < place.m1; m += block) {
    block = block_of(place.m1 - m);
    Buffers<S> of_block = buffers;
    of_block.sums += (m - place.m0) * buffers.sums_pitch;
    for (int64_t sample = 0; sample < place.samples; ++sample)
      store_block(task, place, of_block, sample, m, static_cast<int>(block), 0, 0, false);
  }
}

// The first row of a phase without taps, where the stride and the dilation have a common factor.
template <class S>
void fill_row(const PhaseGemmTask& task, const Place& place, int64_t m0, int block, S* sums, int64_t pitch) {
  const S* bias = task.bias ? static_cast<const S*>(task.bias) + place.g * task.m + m0 : nullptr;
  for (int m = 0; m < block; ++m)
    for (int64_t x = 0; x < place.n[2]; x += kLanes<S>) store(sums + m * pitch + x, splat(bias ? bias[m] : S(0)));
}

template <class S>
void run_group(const PhaseGemmTask& task, const Place& place, const Buffers<S>& buffers) {
  if (task.slab < task.rows) return run_slabs(task, place, buffers);
  stage_samples(task, place, buffers);
  bool tensors = false;  // an operand for every element
  for (int i = 0; i < task.num_ops; ++i) tensors |= task.ops[i].operand == OperandKind::tensor;
  const int64_t* step = task.result_step;
  for (int64_t m0 = place.m0; m0 < place.m1;) {
    const int block = block_of(place.m1 - m0);
    for (int64_t phase_d = 0; phase_d < step[0]; ++phase_d)
      for (int64_t phase_h = 0; phase_h < step[1]; ++phase_h) {
        const int64_t phase = (phase_d * step[1] + phase_h) * step[2];
        const bool same = task.phase_taps[phase] == task.phase_taps[phase + step[2]] && !tensors;
        for (int64_t phase_w = 0; phase_w < step[2]; ++phase_w) {
          S* sums = buffers.sums + phase_w * block * buffers.sums_pitch;
          if (!same)
            multiply<S, false>(task, place, buffers, 0, task.rows, m0, m0 + block, static_cast<int>(phase + phase_w),
                               sums);
          else
            fill_row(task, place, m0, block, sums, buffers.sums_pitch);
        }
        for (int64_t sample = 0; sample < place.samples; ++sample)
          store_block(task, place, buffers, sample, m0, block, phase_d, phase_h, same);
      }
    m0 += block;
  }
}

template <class S>
void run_typed(const PhaseGemmTask& task, int64_t item, void* scratch) {
  Place place = place_of(task, item);
  const Buffers<S> buffers = carve<S>(task, scratch);
  for (int64_t i = 0; i < task.item_groups; ++i, ++place.g) {
    place.source_channel = place.g * task.k;
    run_group<S>(task, place, buffers);
  }
}

// One block of `Block` result channels: transposed 16 taps (AVX-512) of all its channels at a time.
template <class S, int Block>
bool pack_block(const PackTask& task, int64_t group, int64_t m0) {
  const int64_t base = group * task.k * task.m * task.taps + m0 * task.m_stride;
  auto slab_at = [&](int64_t k) {  // where the weights of the slab from channel k on are
    return static_cast<S*>(task.packed) +
           ((group * task.rows + k) * task.m + m0 * min_of(task.slab, task.rows - k)) * task.taps;
  };
  // Taps of one k follow each other; those of all k, too, where k is the weights' second dimension.
  const bool joined = !kPairs && task.k_stride == task.taps;
  const int64_t runs = joined ? 1 : task.rows, length = joined ? task.k * task.taps : task.taps;
  Vec<S> nothing{};
  for (int64_t run = 0; run < runs; ++run) {
    int64_t tap = 0, k0 = run / task.slab * task.slab, k = run - k0;
    S* out = slab_at(k0);
    for (int64_t j = 0; j < length; j += kLanes<S>) {
      const int64_t n = min_of(kLanes<S>, length - j);
      S* to[kLanes<S>];
      for (int64_t l = 0; l < n; ++l) {
        to[l] = out + (task.tap_first[tap] + k * task.tap_step[tap]) * Block;
        if (++tap < task.taps) continue;
        tap = 0;
        if (++k == task.slab) out = slab_at(k0 += task.slab), k = 0;
      }
      constexpr int kPart = Block < kLanes<S> ? Block : kLanes<S>;
      for (int first = 0; first < Block; first += kPart) {
        Vec<S> v[kLanes<S>] = {};
#pragma GCC unroll 8
        for (int m = 0; m < kPart; ++m) {
          const int64_t index = base + run * (kPairs ? 2 : 1) * task.k_stride + (first + m) * task.m_stride + j;
          // What follows is another weight: a whole vector can be read except at the end of the tensor.
          auto weights = [&](int64_t at) {
            const Vec<S> values =
                load_lanes<S>(task.weight, task.dtype, at, at + kLanes<S> <= task.elements ? kLanes<S> : n);
            nothing += values * S(0);
            return values;
          };
          v[m] = weights(index);
#if defined(__AVX512BF16__)
          if constexpr (sizeof(S) == sizeof(float)) {  // as fp32, a bf16 is its own high half
            const Vec<S> high = weights(index + task.k_stride);
            typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
            v[m] = bits_of<VecF>(bits_of<VecU>(v[m]) >> 16 | bits_of<VecU>(high));
          }
#endif
        }
        transpose_block<S>(v);
        for (int64_t l = 0; l < n; ++l) memcpy(to[l] + first, &v[l], kPart * sizeof(S));
      }
    }
  }
  return reduce<S>(nothing) == 0;
}

template <class S>
bool pack_typed(const PackTask& task, int64_t item) {
  const int64_t blocks = (task.m + kRegisterM - 1) / kRegisterM, group = item / blocks;
  int64_t m0 = item % blocks * kRegisterM;
  const int64_t m1 = min_of(task.m, m0 + kRegisterM);
  bool finite = true;
  while (m0 < m1) {  // the last block splits into powers of two, as the register tiles do
    if (m1 - m0 >= 8 && kRegisterM == 8) {
      finite &= pack_block<S, kRegisterM>(task, group, m0);
      m0 += 8;
    } else if (m1 - m0 >= 4) {
      finite &= pack_block < S, kRegisterM<4 ? kRegisterM : 4>(task, group, m0);
      m0 += 4;
    } else if (m1 - m0 >= 2) {
      finite &= pack_block<S, 2>(task, group, m0);
      m0 += 2;
    } else {
      finite &= pack_block<S, 1>(task, group, m0);
      m0 += 1;
    }
  }
  return finite;
}

bool pack(const PackTask& task, int64_t item) {
  return task.dtype == DType::f64 ? pack_typed<double>(task, item) : pack_typed<float>(task, item);
}

void run(const PhaseGemmTask& task, int64_t item, void* scratch) {
  if (task.dtype == DType::f64 && !kPairs)
    run_typed<double>(task, item, scratch);
  else
    run_typed<float>(task, item, scratch);
}

int64_t scratch_bytes(const PhaseGemmTask& task) {
  return task.dtype == DType::f64 ? carve<double>(task, nullptr).bytes : carve<float>(task, nullptr).bytes;
}

constexpr PhaseGemmLoops kLoops = {Isa::TCONV_TARGET, kRegisterM, kTapsInnermost, pack, run, scratch_bytes};

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  return fit_phase_gemm(problem, epilogue, device, Isa::TCONV_TARGET);
}
void prepare(Step& step) { prepare_phase_gemm(step, Isa::TCONV_TARGET); }
void launch(const Step& step, const Tensors& tensors, Stream stream) {
  launch_phase_gemm(step, tensors, stream, kLoops);
}

constexpr Config kConfigs[] = {{}};

}  // namespace

#define TCONV_NAME_OF(name) #name
#define TCONV_NAME(name) TCONV_NAME_OF(name)
extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {TCONV_NAME(TCONV_KERNEL), kConfigs, fit, nullptr, prepare, launch};

}  // namespace tconv::cpu
