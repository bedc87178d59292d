// channel_gemm — all phases of a tile as products with the result channels along the vectors.
//
// Computes  forward and grad_input of channels_last tensors, any rank, parameters, groups and dtype; with pre-activation,
//           bias and the pointwise operations in front of a normalisation.
// Method    A tile's source is copied once as [position][channel] with zeros outside; nothing is transposed, on no side.
//           Where no tap reads beyond the source its words are multiplied where they are, without a copy.
//           Register tile: positions by vectors of result channels; a position's source channels are broadcast, weights
//           are packed [tap][k][channel]. As many taps and channels as weights stay in the second cache level run over
//           all positions of the tile; results are stored behind each register tile of the last run. Any positions fill
//           a register tile: each has its own offset. For avx512_bf16 a pair of source channels is a word of the tensor
//           as it is. Depthwise layers have their channels along the vectors of both sides, and an item is a block of
//           channels.
//           For avx512_amx the register tile is made of products of matrices (matrix_tiles.h) over the same words.
//           Taps of few source channels are joined along the columns: channel_gemm.h says how.
// Refuses   grad_weight, epilogues alone, contiguous tensors; targets above the machine's; f64 mixed with another dtype.
//           For avx512_bf16 other dtypes, a pre-activation, an odd number of source channels per group of several; for
//           avx512_amx also runs that are not a whole number of 6 to 16 words.
// Reads as  channel_rows.h has the register tile, channel_gemm_driver.cpp chooses tiles; here are the loops over one tile.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/channel_gemm.h"

#include "cpu/channel_rows.h"
#include "cpu/matrix_tiles.h"

namespace tconv::cpu {
namespace {

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// Weights that run over all positions of a tile. They come from the second cache level as fast as they are needed (2 lines
// in 12 cycles); passes that fit into the first one, of 20 KB, read and write the tile's sums so often that a layer of 48
// channels took 187 ms instead of 159 and U-Net's 2 x 2 layer from 1024 channels 46 instead of 41.
constexpr int64_t kWeightBytes = 128 << 10;

template <class S>
struct Buffers {
  S *staged, *sums, *line, **at;
  int64_t *offset, *position, *place, *run_v, *run_b;
  int64_t bytes;
};

template <class S>
Buffers<S> carve(const ChannelGemmTask& task, void* scratch) {
  Buffers<S> buffers;
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    void* p = scratch ? static_cast<char*>(scratch) + used : nullptr;
    used += round_up(bytes, 64) + 64;
    return p;
  };
  auto elements = [&](int64_t n) { return static_cast<S*>(take((n + kLanes<S>)*static_cast<int64_t>(sizeof(S)))); };
  auto indices = [&](int64_t n) { return static_cast<int64_t*>(take(n * static_cast<int64_t>(sizeof(int64_t)))); };
  int64_t positions = task.samples, box = task.samples;
  for (int dim = 0; dim < 3; ++dim) {
    positions *= task.tile[dim];
    box *= task.source_step[dim] * (task.tile[dim] + task.range[dim]);
  }
  buffers.staged = elements(box * task.pitch);
  buffers.sums = elements((positions + (kMatrices ? kMatrixRows : 0)) * kMostVectors * kLanes<S>);
  buffers.line = elements(2 * kMostVectors * kLanes<S>);
  buffers.at = static_cast<S**>(take(positions * static_cast<int64_t>(sizeof(S*))));
  buffers.offset = indices(positions);
  buffers.position = indices(positions);
  buffers.place = indices(positions);
  buffers.run_v = indices(task.num_taps);
  buffers.run_b = indices(task.num_taps);
  buffers.bytes = used;
  return buffers;
}

// Where the results of one phase and one block of channels go.
struct Results {
  int64_t c0, count;  // result channels
  int64_t shift;      // positions from a result of phase 0 to this phase's
  int64_t inside[3];  // of the tile's positions, those whose result lies inside the tensor
  bool all;
};

// One tile of one item.
template <class S>
struct Work {
  const ChannelGemmTask& task;
  Buffers<S> buffers;
  int64_t group, b, samples, q0[3], n[3], box[3];
  int64_t first_block, last_block;
  // The item that this thread probably takes next: its source comes to the second cache level while this one is
  // multiplied. SAM's layer: 5.1 ms, 4.8 with that and no staging, 6.7 without either.
  Work* next = nullptr;
  int64_t ahead_row = 0, ahead_at = 0, ahead_lines = 0;

  Work(const ChannelGemmTask& the_task, const Buffers<S>& the_buffers, int64_t item)
      : task(the_task), buffers(the_buffers) {
    const int64_t chunk = item % task.m_chunks;
    item /= task.m_chunks;
    for (int dim = 2; dim >= 0; --dim) {
      q0[dim] = item % task.tiles[dim + 1] * task.tile[dim];
      n[dim] = min_of(task.tile[dim], task.grid[dim] - q0[dim]);
      box[dim] = task.source_step[dim] * (n[dim] + task.range[dim]);
      item /= task.tiles[dim + 1];
    }
    group = item % task.groups;
    b = item / task.groups * task.samples;
    samples = min_of(task.samples, task.batch - b);
    first_block = chunk * task.m_chunk;
    last_block = min_of(channel_blocks(task.vectors, kMostVectors), first_block + task.m_chunk);
  }

  // Prefetches the next lines of this item's source; call it again until it returns false.
  bool prefetch(int64_t lines) {
    const int64_t bytes = task.source_channels * static_cast<int64_t>(size_of(task.dtype));
    for (; ahead_row < samples * box[0] * box[1]; ++ahead_row, ahead_at = 0) {
      const int64_t h = ahead_row % box[1], d = ahead_row / box[1] % box[0];
      const int64_t sd = task.source_step[0] * (q0[0] + task.first_shift[0]) + d;
      const int64_t sh = task.source_step[1] * (q0[1] + task.first_shift[1]) + h;
      const int64_t first = task.source_step[2] * (q0[2] + task.first_shift[2]), lo = first < 0 ? 0 : first;
      const int64_t hi = min_of(first + box[2], task.source_size[2]), *size = task.source_size;
      if (!task.used[0][d] || !task.used[1][h] || sd < 0 || sd >= size[0] || sh < 0 || sh >= size[1]) continue;
      const char* row = static_cast<const char*>(task.source) +
                        (((b + ahead_row / (box[0] * box[1])) * size[0] + sd) * size[1] + sh) * size[2] * bytes;
      for (; ahead_at < (hi - lo) * bytes; ahead_at += 64) {
        if (lines-- == 0) return true;
        __builtin_prefetch(row + lo * bytes + ahead_at, 0, 2);
      }
    }
    return false;
  }

  // A word for every value of a position, itself and the one that follows; rows are contiguous in a tensor of one group.
  // Returns whether all values are finite: a window of odd length multiplies one beyond its end by zero.
  bool stage_values() {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(S) == sizeof(float)) {
      typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
      const int64_t k = task.k, *size = task.source_size;
      int64_t first[3];
      for (int dim = 0; dim < 3; ++dim) first[dim] = task.source_step[dim] * (q0[dim] + task.first_shift[dim]);
      const int64_t lo = first[2] >= 0 ? 0 : min_of(-first[2], box[2]);
      const int64_t hi = size[2] - first[2] < lo ? lo : min_of(box[2], size[2] - first[2]);
      Vec<S> nothing{};
      for (int64_t row = 0; row < samples * box[0] * box[1]; ++row) {
        const int64_t h = row % box[1], d = row / box[1] % box[0];
        if (!task.used[0][d] || !task.used[1][h]) continue;
        const int64_t sd = first[0] + d, sh = first[1] + h;
        S* out = buffers.staged + row * box[2] * k;
        if (sd < 0 || sd >= size[0] || sh < 0 || sh >= size[1] || lo == hi) {
          memset(out, 0, static_cast<size_t>(box[2] * k) * sizeof(S));
          continue;
        }
        const int64_t position = (((b + row / (box[0] * box[1])) * size[0] + sd) * size[1] + sh) * size[2] + first[2];
        const uint16_t* source = static_cast<const uint16_t*>(task.source) + position * k;
        memset(out, 0, static_cast<size_t>(lo * k) * sizeof(S));
        if (lo > 0) {
          const uint32_t word = static_cast<uint32_t>(source[lo * k]) << 16;
          out[lo * k - 1] = bits_of<float>(word);
        }
        for (int64_t i = lo * k; i < hi * k; i += kLanes<S>) {
          const int64_t left = hi * k - i;
          const VecH low = load_part(source + i, min_of(left, kLanes<S>));
          const VecH high = load_part(source + i + 1, min_of(left - 1, kLanes<S>));
          nothing += from_bfloat(low) * S(0);
          store(out + i,
                bits_of<Vec<S>>(__builtin_convertvector(low, VecU) | __builtin_convertvector(high, VecU) << 16));
        }
        memset(out + hi * k, 0, static_cast<size_t>((box[2] - hi) * k) * sizeof(S));
      }
      return reduce<S>(nothing) == 0;
    }
#endif
    return true;
  }

  // Words [channel, channel + channels) of each position.
  void stage(int64_t channel, int64_t channels) {
    ChannelBox source{};
    source.source = task.source;
    source.dtype = kUnit == 2 ? DType::f32 : task.dtype;
    source.layout = Layout::channels_last;
    source.channels = source_words();
    source.size = task.source_size;
    source.channel = channel;
    source.n = channels;
    source.step = task.windows ? 1 : task.source_step[2];
    source.phase = task.column_phase;
    source.used[0] = task.used[0], source.used[1] = task.used[1];
    int64_t volume = 1;
    for (int dim = 0; dim < 3; ++dim) {
      source.first[dim] = task.source_step[dim] * (q0[dim] + task.first_shift[dim]);
      source.extent[dim] = box[dim];
      volume *= box[dim];
    }
    for (int64_t sample = 0; sample < samples; ++sample) {
      source.b = b + sample;
      S* target = buffers.staged + sample * volume * task.pitch;
      if (task.num_pre == 0) {
        stage_box<S>(source, target, task.pitch, [](const Vec<S>& v) { return v; });
        continue;
      }
      stage_box<S>(source, target, task.pitch, [&](const Vec<S>& v) {
        S row[kLanes<S>];
        store(row, v);
        for (int i = 0; i < task.num_pre; ++i) {
          const PhaseOp& op = task.pre[i];
          apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), nullptr, 0, row, kLanes<S>);
        }
        return load(row);
      });
    }
  }

  // Where each position of the grid is in the box, in the tile, and where its result of phase 0 is in the tensor.
  void find_positions() {
    int64_t at = 0;
    for (int64_t sample = 0; sample < samples; ++sample)
      for (int64_t d = 0; d < n[0]; ++d)
        for (int64_t h = 0; h < n[1]; ++h)
          for (int64_t w = 0; w < n[2]; ++w, ++at) {
            if (task.direct) {
              const int64_t *step = task.source_step, *size = task.source_size;
              buffers.offset[at] =
                  ((((b + sample) * size[0] + step[0] * (q0[0] + d)) * size[1] + step[1] * (q0[1] + h)) * size[2] +
                   step[2] * (q0[2] + w)) *
                  source_words();
            } else {
              buffers.offset[at] =
                  (((sample * box[0] + d * task.source_step[0]) * box[1] + h * task.source_step[1]) * box[2] +
                   (task.windows ? w * task.source_step[2] : w)) *
                  task.pitch;
            }
            const int64_t* step = task.result_step;
            buffers.position[at] = (((b + sample) * task.result_size[0] + step[0] * (q0[0] + d)) * task.result_size[1] +
                                    step[1] * (q0[1] + h)) *
                                       task.result_size[2] +
                                   step[2] * (q0[2] + w);
            buffers.place[at] = d << 40 | h << 20 | w;
          }
  }

  ChannelTileFunction<S> function(int rows, int vectors) const {
    if constexpr (!kPairs)
      if (task.depthwise) return channel_tile_function<S, true>(rows, vectors);
    return channel_tile_function<S>(rows, vectors);
  }

  static constexpr int64_t kUnit = kPairs && sizeof(S) == sizeof(float) ? 2 : 1;  // values of a word
  int64_t source_words() const { return task.source_channels / kUnit; }
  const S* scalars() const {
    return task.direct ? static_cast<const S*>(task.source) + group * task.rows : buffers.staged;
  }

  int64_t tap_offset(int64_t tap) const {
    if (task.direct) {
      int64_t column[3];
      for (int dim = 0; dim < 3; ++dim)
        column[dim] = task.source_step[dim] * task.first_shift[dim] + task.tap_source[3 * tap + dim];
      return ((column[0] * task.source_size[1] + column[1]) * task.source_size[2] + column[2]) * source_words();
    }
    const int64_t *at = task.tap_source + 3 * tap, step = task.windows ? 1 : task.source_step[2], split = box[2] / step;
    return ((at[0] * box[1] + at[1]) * box[2] + at[2] % step * split + at[2] / step) * task.pitch;
  }

  // Results of one phase and one block of `vectors` for all positions. The weights' windows follow each other.
  void multiply(const S* weight, int phase, int vectors, const S* start, int64_t positions, const Results& results) {
    const int64_t first_tap = task.phase_taps[phase], window = task.phase_window[phase];
    const int64_t words = task.phase_words[phase], windows = (task.phase_taps[phase + 1] - first_tap) / window;
    const int64_t width = vectors * kLanes<S>;
    for (int64_t i = 0; i < positions; ++i) buffers.at[i] = buffers.sums + i * width;
    S* single[kMostRows];  // sums of a single pass are stored before the next tile's
    for (int i = 0; i < kMostRows; ++i) single[i] = buffers.sums + i * width;
    ChannelTile<S> tile{};
    tile.sums_step = kLanes<S>;
    tile.v_step = width;
    tile.b_step = task.word_step;
    const int64_t most = vectors == 1   ? rows_for(1)
                         : vectors == 2 ? rows_for(2)
                         : vectors == 3 ? rows_for(3)
                                        : rows_for(4);
    auto product = [&](int64_t first, int64_t last, int64_t k0, int64_t k1, const S* begin, bool end) {
      for (int64_t i = first; i < last; ++i) {
        buffers.run_v[i - first] = i * words * width;
        buffers.run_b[i - first] = tap_offset(first_tap + i * window);
      }
      tile.vector = weight + k0 * width;
      tile.scalar = scalars() + k0 * task.word_step;
      tile.run_v = buffers.run_v;
      tile.run_b = buffers.run_b;
      tile.runs = last - first;
      tile.n = k1 - k0;
      tile.start = begin;
#if defined(__AMX_BF16__)
      if constexpr (sizeof(S) == sizeof(float))
        if (positions >= 16) return product_of_matrices(tile, vectors, positions, results, end);
#endif
      for (int64_t at = 0; at < positions;) {
        const int64_t left = positions - at;  // the last two tiles share what is left
        const int height = static_cast<int>(left <= most ? left : left < 2 * most ? (left + 1) / 2 : most);
        tile.offset = buffers.offset + at;
        tile.sums = begin && end ? single : buffers.at + at;
        function(height, vectors)(tile);
        if (end) store_rows(results, tile.sums, at, height);
        if (next && !next->prefetch(next->ahead_lines)) next = nullptr;
        at += height;
      }
    };
    const int64_t window_bytes = words * width * static_cast<int64_t>(sizeof(S));
    if (windows == 0) return product(0, 0, 0, 0, start, true);
    if (window_bytes <= kWeightBytes) {
      const int64_t parts = (windows * window_bytes + kWeightBytes - 1) / kWeightBytes;
      for (int64_t part = 0; part < parts; ++part)
        product(part * windows / parts, (part + 1) * windows / parts, 0, words, part == 0 ? start : nullptr,
                part + 1 == parts);
      return;
    }
    const int64_t parts = (window_bytes + kWeightBytes - 1) / kWeightBytes;
    const int64_t unit = kMatrices ? matrix_words(words) : 1, units = words / unit;
    for (int64_t at = 0; at < windows; ++at)
      for (int64_t part = 0; part < parts; ++part)
        product(at, at + 1, part * units / parts * unit, (part + 1) * units / parts * unit,
                at + part == 0 ? start : nullptr, at + 1 == windows && part + 1 == parts);
  }

#if defined(__AMX_BF16__)
  // The tile's products for all positions on the matrix unit; rows that fill the last 16 repeat the last position.
  void product_of_matrices(const ChannelTile<float>& tile, int vectors, int64_t positions, const Results& results,
                           bool end) {
    const int64_t width = vectors * kLanes<S>, words = matrix_words(tile.n);
    const int64_t most = vectors == 1 ? kMatrixRows : kMatrixRows / 2;
    begin_matrices(MatrixShape(words));
    for (int64_t at = 0; at < positions; at += most) {
      const int64_t rows = min_of(most, positions - at), blocks = (rows + 15) / 16;
      int64_t offset[kMatrixRows];
      float* to[kMatrixRows];
      float* sums = buffers.sums + (tile.start && end ? 0 : at * width);
      for (int64_t i = 0; i < 16 * blocks; ++i) {
        offset[i] = buffers.offset[at + min_of(i, rows - 1)];
        to[i] = sums + i * width;
        if (tile.start) memcpy(to[i], tile.start, static_cast<size_t>(width) * sizeof(float));
      }
      matrix_tiles(tile, offset, sums, static_cast<int>(blocks), vectors, width, words);
      if (end) store_rows(results, to, at, static_cast<int>(rows));
      if (next && !next->prefetch(rows / 6 * next->ahead_lines)) next = nullptr;
    }
    end_matrices();
  }
#endif

  // The same where a weight is not finite: each position with the taps that lie inside the source.
  void multiply_exactly(const S* weight, int phase, int vectors, const S* start, const Results& results) {
    const int64_t first_tap = task.phase_taps[phase], last_tap = task.phase_taps[phase + 1];
    const int64_t width = vectors * kLanes<S>;
    ChannelTile<S> tile{};
    tile.sums_step = kLanes<S>;
    tile.v_step = width;
    tile.b_step = 1;
    tile.vector = weight;
    tile.scalar = scalars();
    tile.run_v = buffers.run_v;
    tile.run_b = buffers.run_b;
    tile.n = task.rows;
    tile.start = start;
    for (int64_t at = 0, positions = samples * n[0] * n[1] * n[2]; at < positions; ++at) {
      const int64_t q[3] = {at / (n[1] * n[2]) % n[0], at / n[2] % n[1], at % n[2]};
      tile.runs = 0;
      for (int64_t tap = first_tap; tap < last_tap; ++tap) {
        bool inside = true;
        for (int dim = 0; dim < 3; ++dim) {
          const int64_t source =
              task.source_step[dim] * (q0[dim] + task.first_shift[dim] + q[dim]) + task.tap_source[3 * tap + dim];
          inside = inside && source >= 0 && source < task.source_size[dim];
        }
        if (!inside) continue;
        if (task.word_step == 2) {
          buffers.run_b[tile.runs++] = tap;
          continue;
        }
        buffers.run_v[tile.runs] = (tap - first_tap) * task.rows * width;
        buffers.run_b[tile.runs++] = tap_offset(tap);
      }
      S* sums = buffers.sums;
      tile.sums = &sums;
      if (task.word_step == 2) {
        multiply_singly(weight, phase, buffers.offset[at], tile.runs, width, start, sums);
      } else {
        tile.offset = buffers.offset + at;
        function(1, vectors)(tile);
      }
      store_rows(results, tile.sums, at, 1);
    }
  }

  // One position with the taps in the table, value by value: a pair may reach beyond the source, and beyond the window.
  void multiply_singly(const S* weight, int phase, int64_t offset, int64_t taps, int64_t width, const S* start,
                       S* sums) {
    if constexpr (sizeof(S) == sizeof(float)) {
      memcpy(sums, start, static_cast<size_t>(width) * sizeof(S));
      auto half = [](S word, bool high) {
        const uint32_t bits = bits_of<uint32_t>(word), value = high ? bits & 0xffff0000u : bits << 16;
        return bits_of<float>(value);
      };
      const int64_t window = task.phase_window[phase], words = task.phase_words[phase];
      for (int64_t i = 0; i < taps; ++i) {
        const int64_t tap = buffers.run_b[i], slot = tap - task.phase_taps[phase];
        for (int64_t c = 0; c < task.k; ++c) {
          const int64_t value = 2 * (slot / window * words) + slot % window * task.k + c;
          const S x = half(buffers.staged[offset + tap_offset(tap) + c], false);
          const S* row = weight + value / 2 * width;
          for (int64_t l = 0; l < width; ++l) sums[l] += half(row[l], value % 2 != 0) * x;
        }
      }
    }
  }

  Results results_of(const int64_t* phase, int64_t c0, int64_t count) const {
    Results results{c0, count, 0, {}, true};
    results.shift = (phase[0] * task.result_size[1] + phase[1]) * task.result_size[2] + phase[2];
    for (int dim = 0; dim < 3; ++dim) {
      const int64_t left = task.result_size[dim] - phase[dim] - task.result_step[dim] * q0[dim];
      results.inside[dim] = left <= 0 ? 0 : min_of(n[dim], (left + task.result_step[dim] - 1) / task.result_step[dim]);
      results.all = results.all && results.inside[dim] == n[dim];
    }
    return results;
  }

  // Applies the operations to the sums of positions [first, first + rows) and stores them, right after their products:
  // storing a whole tile at once left the core waiting for memory, 9 % of the time of SAM's layer.
  void store_rows(const Results& results, S* const* sums, int64_t first, int rows) {
    const int64_t channels = task.groups * task.m;
    for (int r = 0; r < rows; ++r) {
      if (!results.all) {
        const int64_t place = buffers.place[first + r], mask = (1 << 20) - 1;
        if (place >> 40 >= results.inside[0] || (place >> 20 & mask) >= results.inside[1] ||
            (place & mask) >= results.inside[2])
          continue;
      }
      const int64_t index = (buffers.position[first + r] + results.shift) * channels + results.c0;
      S* row = sums[r];
      for (int i = 0; i < task.num_ops; ++i) {
        const PhaseOp& op = task.ops[i];
        const S* operand = nullptr;
        if (op.operand == OperandKind::channel) operand = static_cast<const S*>(op.values) + results.c0;
        if (op.operand == OperandKind::tensor) {
          load_row(op.values, task.dtype, index, results.count, buffers.line);
          operand = buffers.line;
        }
        apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), operand, 1, row, results.count);
      }
      store_row(row, task.result, task.result_dtype, index, results.count);
    }
  }

  void run(Work* next_item) {
    next = next_item;
    if (next) {  // spread over its register tiles, of 6 positions or a few more
      int64_t bytes = next->samples * task.source_channels * static_cast<int64_t>(size_of(task.dtype));
      int64_t results = samples * (last_block - first_block);
      for (int dim = 0; dim < 3; ++dim) bytes *= next->box[dim], results *= n[dim] * task.result_step[dim];
      next->ahead_lines = 1 + bytes / 64 * 7 / (results > 0 ? results : 1);
    }
    bool exactly = task.masked;
    if (task.word_step == 2)
      exactly |= !stage_values();
    else if (!task.depthwise && !task.direct)
      stage(group * task.rows, task.rows);
    find_positions();
    const int64_t blocks = channel_blocks(task.vectors, kMostVectors), positions = samples * n[0] * n[1] * n[2];
    const S* weight = static_cast<const S*>(task.weight) + group * task.vectors * kLanes<S> * task.words;
    const S nothing[kMostVectors * kLanes<S>] = {};
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t v0 = block * task.vectors / blocks;
      const int vectors = static_cast<int>((block + 1) * task.vectors / blocks - v0);
      const int64_t width = vectors * kLanes<S>, m0 = v0 * kLanes<S>, count = min_of(width, task.m - m0);
      const int64_t c0 = group * task.m + m0;
      if (task.depthwise) stage(m0, count);
      S bias[kMostVectors * kLanes<S>] = {};
      if (task.bias) memcpy(bias, static_cast<const S*>(task.bias) + c0, static_cast<size_t>(count) * sizeof(S));
      const S* start = task.bias ? bias : nothing;
      int index = 0;
      int64_t phase[3];
      for (phase[0] = 0; phase[0] < task.result_step[0]; ++phase[0])
        for (phase[1] = 0; phase[1] < task.result_step[1]; ++phase[1])
          for (phase[2] = 0; phase[2] < task.result_step[2]; ++phase[2], ++index) {
            const S* words = weight + v0 * kLanes<S> * task.words + task.phase_first[index] * width;
            const Results results = results_of(phase, c0, count);
            if (exactly)
              multiply_exactly(words, index, vectors, start, results);
            else
              multiply(words, index, vectors, start, positions, results);
          }
    }
  }
};

template <class S>
void run_typed(const ChannelGemmTask& task, int64_t item, void* scratch) {
  const Buffers<S> buffers = carve<S>(task, scratch);
  Work<S> work(task, buffers, item), next(task, buffers, min_of(item + task.ahead, task.items - 1));
  // Of several groups an item reads a part of each position only; whole rows would be too much.
  work.run(task.groups == 1 && item + task.ahead < task.items ? &next : nullptr);
}

// One block of a group's result channels; those behind the last are zero.
template <class S>
struct PackBlock {
  const ChannelPackTask& task;
  S* out;
  int64_t first, lanes, width;  // the block's first weight; result channels that exist, and with those that do not
  Vec<S> nothing;

  // A vector of result channels for each word: 16 taps (AVX-512) at a time, transposed.
  void by_vectors() {
    constexpr int64_t kBlock = kLanes<S>, kUnit = kPairs && sizeof(S) == sizeof(float) ? 2 : 1;
    for (int64_t k = 0; k < task.k; k += kUnit)
      for (int64_t tap = 0; tap < task.taps; tap += kBlock) {
        const int64_t n = min_of(kBlock, task.taps - tap);
        for (int64_t l = 0; l < width; l += kBlock) {
          Vec<S> v[kBlock] = {};
          for (int64_t i = 0; i < min_of(kBlock, lanes - l); ++i) {
            const int64_t index = first + k * task.k_stride + (l + i) * task.m_stride + tap;
            v[i] = load_lanes<S>(task.weight, task.dtype, index, n);
            nothing += v[i] * S(0);
            if constexpr (kUnit == 2) {  // as fp32, a bf16 is its own high half
              typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
              const VecF high = load_lanes<S>(task.weight, task.dtype, index + task.k_stride, n);
              nothing += high * S(0);
              v[i] = bits_of<VecF>(bits_of<VecU>(v[i]) >> 16 | bits_of<VecU>(high));
            }
          }
          transpose_block<S>(v);
          for (int64_t t = 0; t < n; ++t) store(out + (task.tap_value[tap + t] + k) / kUnit * width + l, v[t]);
        }
      }
  }

  // Value by value, where an odd number of channels lets a word hold values of two taps.
  void by_values() {
    memset(out, 0, static_cast<size_t>(task.words * width) * sizeof(S));
    constexpr int64_t kPiece = 64;
    S values[kPiece + kLanes<S>];
    for (int64_t k = 0; k < task.k; ++k)
      for (int64_t l = 0; l < lanes; ++l)
        for (int64_t tap = 0; tap < task.taps; tap += kPiece) {
          const int64_t n = min_of(kPiece, task.taps - tap);
          load_row(task.weight, task.dtype, first + k * task.k_stride + l * task.m_stride + tap, n, values);
          for (int64_t t = n; t < round_up(n, kLanes<S>); ++t) values[t] = S(0);
          for (int64_t t = 0; t < n; t += kLanes<S>) nothing += load(values + t) * S(0);
          for (int64_t t = 0; t < n; ++t) {
            const int64_t value = task.tap_value[tap + t] + k;
            uint32_t word;
            memcpy(&word, values + t, sizeof word);
            const uint16_t bits = static_cast<uint16_t>(word >> 16);
            memcpy(reinterpret_cast<char*>(out + value / 2 * width + l) + value % 2 * 2, &bits, sizeof bits);
          }
        }
  }
};

template <class S>
bool pack_typed(const ChannelPackTask& task, int64_t item) {
  const int64_t vectors = (task.m + kLanes<S> - 1) / kLanes<S>, blocks = channel_blocks(vectors, kMostVectors);
  const int64_t group = item / blocks, v0 = item % blocks * vectors / blocks, m0 = v0 * kLanes<S>;
  const int64_t width = ((item % blocks + 1) * vectors / blocks - v0) * kLanes<S>;
  PackBlock<S> block{task,
                     static_cast<S*>(task.packed) + (group * vectors + v0) * kLanes<S> * task.words,
                     group * task.k * task.m * task.taps + m0 * task.m_stride,
                     min_of(width, task.m - m0),
                     width,
                     {}};
  if (kPairs && task.k % 2 != 0)
    block.by_values();
  else
    block.by_vectors();
  return reduce<S>(block.nothing) == 0;
}

bool pack(const ChannelPackTask& task, int64_t item) {
  return task.dtype == DType::f64 && !kPairs ? pack_typed<double>(task, item) : pack_typed<float>(task, item);
}
void run(const ChannelGemmTask& task, int64_t item, void* scratch) {
  task.dtype == DType::f64 && !kPairs ? run_typed<double>(task, item, scratch) : run_typed<float>(task, item, scratch);
}
int64_t scratch_bytes(const ChannelGemmTask& task) {
  return task.dtype == DType::f64 ? carve<double>(task, nullptr).bytes : carve<float>(task, nullptr).bytes;
}

constexpr ChannelGemmLoops kLoops = {Isa::TCONV_TARGET, kMostVectors, pack, run, scratch_bytes};

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  return fit_channel_gemm(problem, epilogue, device, Isa::TCONV_TARGET);
}
void prepare(Step& step) { prepare_channel_gemm(step, Isa::TCONV_TARGET); }
void launch(const Step& step, const Tensors& tensors, Stream stream) {
  launch_channel_gemm(step, tensors, stream, kLoops);
}

constexpr Config kConfigs[] = {{}};

}  // namespace

#define TCONV_NAME_OF(name) #name
#define TCONV_NAME(name) TCONV_NAME_OF(name)
extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {TCONV_NAME(TCONV_KERNEL), kConfigs, fit, nullptr, prepare, launch};

}  // namespace tconv::cpu
