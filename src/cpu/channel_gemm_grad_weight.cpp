// channel_gemm_grad_weight — weight gradients as outer products, channels along the vectors.
//
// Computes  grad_weight and grad_bias, any rank, parameters, groups, dtype and layout; the pre-activation of the input.
// Method    Input and grad_output are staged as [position][channel]. For each position a few vectors of one side's
//           channels are multiplied by broadcast (channel, tap) values of the other's, into register tiles of up to 24
//           sums that stay for a whole run of positions; nothing is reduced across lanes, and a run may be short. A tap
//           is an offset into the staged grad_output, whatever the stride. Tiles belong to at most 32 parts that depend
//           on the problem only; parts are added in order, in double. Staging adds up the bias's sums as well, where all of
//           a contiguous grad_output passes through it.
//           Depthwise layers of channels_last tensors have their channels along the vectors of both sides and taps as rows.
//           For avx512_bf16 a staged word holds two positions, and one instruction adds both products: the input's words
//           are those of positions (0, 1), (2, 3) ..., grad_output's overlap, (0, 1), (1, 2) ..., because a tap may be odd.
// Refuses   Other directions; targets above the machine's. For avx512_bf16 other dtypes and a pre-activation.
// Reads as  channel_rows.h has the register tile, channel_gemm_grad_weight_driver.cpp chooses tiles, chunks and parts.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/channel_gemm_grad_weight.h"

#include "cpu/channel_rows.h"
#include "cpu/grad_bias_rows.h"

namespace tconv::cpu {
namespace {

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// Positions that run through the registers before the next rows do, by blocks of four vectors 48 KB. Half as many, which
// stay in the first cache level, made runs so short that reading and writing the sums cost more: 13.5 ms instead of 12.9
// for SAM's layer, 86 instead of 83 for kernelbench_1_69's; three times as many gained nothing.
constexpr int64_t kRunPositions = 192;

template <class S>
struct Buffers {
  S* staged[2];
  int64_t* run[2];
  int64_t* offset;  // [tap][channel of the broadcast side]: of its first value
  int64_t* sums;    // the same: of its sums, from Work::partial on
  int64_t bytes;
};

template <class S>
Buffers<S> carve(const ChannelGradWeightTask& task, void* scratch) {
  Buffers<S> buffers;
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    void* p = scratch ? static_cast<char*>(scratch) + used : nullptr;
    used += round_up(bytes, 64) + 64;
    return p;
  };
  auto elements = [&](int64_t n) { return static_cast<S*>(take((n + kLanes<S>)*static_cast<int64_t>(sizeof(S)))); };
  auto indices = [&](int64_t n) { return static_cast<int64_t*>(take(n * static_cast<int64_t>(sizeof(int64_t)))); };
  const int64_t positions = task.samples * task.box[0] * task.box[1] * task.box[2];
  const int64_t raw = task.samples * task.raw[0] * task.raw[1] * task.raw[2];
  buffers.staged[0] = elements(positions * task.staged_pitch[0]);
  buffers.staged[1] = elements(raw * task.staged_pitch[1]);
  const int64_t runs = task.samples * task.box[0] * task.box[1];
  buffers.run[0] = indices(runs);
  buffers.run[1] = indices(runs);
  const int64_t rows = task.chunk[1 - task.vector_side] * task.num_taps;
  buffers.offset = indices(rows);
  buffers.sums = indices(rows);
  buffers.bytes = used;
  return buffers;
}

// Of one vector: how many sums, and where those of a channel of the other side and a tap are, in vectors.
int64_t vector_sums(const ChannelGradWeightTask& task) { return task.channels[1 - task.vector_side] * task.num_taps; }
int64_t sums_at(const ChannelGradWeightTask& task, int64_t channel, int64_t tap) {
  const int64_t c0 = channel / kSumsBlock * kSumsBlock;
  return c0 * task.num_taps + tap * min_of(kSumsBlock, task.channels[1 - task.vector_side] - c0) + channel - c0;
}

// One tile of one item.
template <class S>
struct Work {
  const ChannelGradWeightTask& task;
  Buffers<S> buffers;
  int64_t group, b, samples, first[2], count[2], pitch[2];  // channels of the item
  int64_t q0[3], n[3], raw[3];
  S* partial;    // of the item's part and group
  double* bias;  // of the item's part and its first output channel; null: another item adds these

  bool stage(int side) {
    ChannelBox box{};
    box.source = task.source[side];
    box.dtype = task.dtype;
    box.layout = task.layout;
    box.channels = task.whole_channels[side];
    box.size = task.size[side];
    const int of = task.depthwise ? 0 : side;
    box.channel = group * task.channels[of] + first[of];
    box.n = count[of];
    int64_t volume = 1;
    box.step = side == 0 ? 1 : task.stride[2];
    box.phase = side == 1 && task.one_phase ? 0 : -1;  // that of the first tap
    for (int dim = 0; dim < 3; ++dim) {
      box.first[dim] = side == 0 ? q0[dim] : task.stride[dim] * q0[dim] - task.padding[dim];
      box.extent[dim] = side == 0 ? n[dim] : raw[dim];
      volume *= box.extent[dim];
    }
    if (side == 1) {
      box.used[0] = task.used[0], box.used[1] = task.used[1];
      box.sums = bias;
      // What lies beyond the box's own positions is another tile's, but behind the last tile nobody's.
      for (int dim = 0; dim < 3; ++dim)
        box.owned[dim] = q0[dim] + n[dim] == task.grid[dim] ? raw[dim] : task.stride[dim] * n[dim];
    }
    bool finite = true;
    for (int64_t sample = 0; sample < samples; ++sample) {
      box.b = b + sample;
      S* target = buffers.staged[side] + sample * volume * pitch[side];
      if (side == 1 || task.num_pre == 0) {
        finite &= stage_box<S>(box, target, pitch[side], [](const Vec<S>& v) { return v; });
        continue;
      }
      finite &= stage_box<S>(box, target, pitch[side], [&](const Vec<S>& v) {
        S row[kLanes<S>];
        store(row, v);
        for (int i = 0; i < task.num_pre; ++i) {
          const auto& op = task.pre[i];
          apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), nullptr, 0, row, kLanes<S>);
        }
        return load(row);
      });
    }
    return finite;
  }

  // Makes words of two positions from single ones, in place: each row's (side 0), each row's phases' (side 1).
  void make_pairs(int side) {
    if constexpr (kPairs && sizeof(S) == sizeof(float)) {
      const int64_t* extent = side == 0 ? n : raw;
      const int64_t split = side == 0 ? n[2] : raw[2] / task.stride[2], phases = extent[2] / split, width = pitch[side];
      for (int64_t at = 0; at < samples * extent[0] * extent[1]; ++at) {
        const int64_t h = at % extent[1], d = at / extent[1] % extent[0];
        if (side == 1 && !(task.used[0][d] && task.used[1][h])) continue;
        for (int64_t phase = 0; phase < phases; ++phase) {
          S* row = buffers.staged[side] + (at * extent[2] + phase * split) * width;
          if (side == 1) {
            pack_pairs(row, row + width, (split - 1) * width, row);
            pack_pairs(row + (split - 1) * width, nullptr, width, row + (split - 1) * width);
          } else {
            for (int64_t q = 0; q < split; q += 2)
              pack_pairs(row + q * width, q + 1 < split ? row + (q + 1) * width : nullptr, width, row + q / 2 * width);
          }
        }
      }
    }
  }

  void find_runs() {
    int64_t run = 0;
    for (int64_t sample = 0; sample < samples; ++sample)
      for (int64_t d = 0; d < n[0]; ++d)
        for (int64_t h = 0; h < n[1]; ++h, ++run) {
          buffers.run[0][run] = run * n[2] * pitch[0];
          buffers.run[1][run] =
              ((sample * raw[0] + d * task.stride[0]) * raw[1] + h * task.stride[1]) * raw[2] * pitch[1];
        }
  }

  int64_t tap_offset(int64_t tap) const {
    const int64_t w = tap % task.kernel[2], h = tap / task.kernel[2] % task.kernel[1],
                  d = tap / task.kernel[2] / task.kernel[1];
    const int64_t column = w * task.dilation[2], step = task.stride[2];
    return ((d * task.dilation[0] * raw[1] + h * task.dilation[1]) * raw[2] + column % step * (raw[2] / step) +
            column / step) *
           pitch[1];
  }

  // Rows of one block of vectors from v0 on, over the runs in the tile.
  void multiply_rows(ChannelTile<S>& tile, int64_t v0, int vectors, int64_t rows, const int64_t* offset,
                     const int64_t* sums) const {
    const int most = vectors == 1 ? rows_for(1) : vectors == 2 ? rows_for(2) : vectors == 3 ? rows_for(3) : rows_for(4);
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;  // the last two tiles share what is left
      const int height = static_cast<int>(left <= most ? left : left < 2 * most ? (left + 1) / 2 : most);
      S* at[kMostRows];
      for (int i = 0; i < height; ++i) at[i] = partial + sums[r + i] + v0 * tile.sums_step;
      tile.offset = offset + r;
      tile.sums = at;
      if (task.depthwise)
        channel_tile_function<S, true>(height, vectors)(tile);
      else
        channel_tile_function<S>(height, vectors)(tile);
      r += height;
    }
  }

  // Products of taps [first_tap, last_tap) over the columns [lo, hi) of the runs in the tables.
  void multiply(int64_t first_tap, int64_t last_tap, int64_t runs, int64_t lo, int64_t hi) {
    const int v = task.vector_side, o = 1 - v;
    const int64_t* step = pitch;
    const int64_t vectors = (count[v] + kLanes<S> - 1) / kLanes<S>,
                  blocks = (vectors + kMostVectors - 1) / kMostVectors;
    ChannelTile<S> tile{};
    tile.sums_step = vector_sums(task) * kLanes<S>;
    const int64_t together[2] = {1, kPairs ? 2 : 1};  // staged words that a step passes
    tile.n = kPairs ? (hi - lo + 1) / 2 : hi - lo;
    tile.v_step = step[v] * together[v];
    tile.b_step = step[o] * together[o];
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t v0 = block * vectors / blocks;
      const int block_vectors = static_cast<int>((block + 1) * vectors / blocks - v0);
      const int64_t in_cache = max_of(1, kRunPositions / max_of(1, tile.n));
      for (int64_t run = 0; run < runs; run += in_cache) {
        tile.runs = min_of(in_cache, runs - run);
        tile.run_v = buffers.run[v] + run;
        tile.run_b = buffers.run[o] + run;
        auto product = [&](const S* vector, const S* scalar, int64_t rows, const int64_t* offset, const int64_t* sums) {
          tile.vector = vector + v0 * kLanes<S> + lo * step[v];
          tile.scalar = scalar + lo * step[o] + (task.depthwise ? v0 * kLanes<S> : 0);
          multiply_rows(tile, v0, block_vectors, rows, offset, sums);
        };
        const int64_t channels = count[o];
        if (v == 0) {  // rows are (tap, channel) pairs
          product(buffers.staged[0], buffers.staged[1], (last_tap - first_tap) * channels,
                  buffers.offset + first_tap * channels, buffers.sums + first_tap * channels);
        } else {
          for (int64_t tap = first_tap; tap < last_tap; ++tap)
            product(buffers.staged[1] + tap_offset(tap), buffers.staged[0], channels, buffers.offset,
                    buffers.sums + tap * channels);
        }
      }
    }
  }

  // All taps, window by window.
  void multiply_windows(int64_t runs) {
    ChannelTile<S> tile{};
    tile.sums_step = kLanes<S>;
    tile.n = kPairs ? (n[2] + 1) / 2 : n[2];
    tile.v_step = pitch[1] * (kPairs ? 2 : 1);
    tile.b_step = pitch[0];
    tile.scalar = buffers.staged[0];
    const int64_t in_cache = max_of(1, 4 * kRunPositions / max_of(1, tile.n));
    for (int64_t run = 0; run < runs; run += in_cache) {
      tile.runs = min_of(in_cache, runs - run);
      tile.run_v = buffers.run[1] + run;
      tile.run_b = buffers.run[0] + run;
      for (int64_t window = 0; window < task.num_windows; ++window) {
        const int64_t tap = task.window[2 * window], vectors = task.window[2 * window + 1];
        const int64_t blocks = (vectors + kMostVectors - 1) / kMostVectors;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t v0 = block * vectors / blocks;
          tile.vector = buffers.staged[1] + tap_offset(tap) + v0 * kLanes<S>;
          multiply_rows(tile, v0, static_cast<int>((block + 1) * vectors / blocks - v0), count[0], buffers.offset,
                        buffers.sums + tap * count[0]);
        }
      }
    }
  }

  // Where the input is not finite, a zero outside grad_output must not be multiplied by it: tap by tap, exact bounds.
  void multiply_exactly() {
    for (int64_t tap = 0; tap < task.num_taps; ++tap) {
      const int64_t at[3] = {tap / task.kernel[2] / task.kernel[1], tap / task.kernel[2] % task.kernel[1],
                             tap % task.kernel[2]};
      int64_t lo[3], hi[3];
      for (int dim = 0; dim < 3; ++dim) {
        const int64_t start = task.stride[dim] * q0[dim] - task.padding[dim] + task.dilation[dim] * at[dim];
        lo[dim] = start >= 0 ? 0 : min_of(n[dim], (-start + task.stride[dim] - 1) / task.stride[dim]);
        const int64_t left = task.size[1][dim] - start;
        hi[dim] = max_of(lo[dim], left <= 0 ? 0 : min_of(n[dim], (left + task.stride[dim] - 1) / task.stride[dim]));
      }
      if (lo[2] == hi[2]) continue;
      if (task.windows || (kPairs && sizeof(S) == sizeof(float))) {
        multiply_singly(tap, lo, hi);
        continue;
      }
      int64_t runs = 0;
      for (int64_t sample = 0; sample < samples; ++sample)
        for (int64_t d = lo[0]; d < hi[0]; ++d)
          for (int64_t h = lo[1]; h < hi[1]; ++h, ++runs) {
            buffers.run[0][runs] = ((sample * n[0] + d) * n[1] + h) * n[2] * pitch[0];
            buffers.run[1][runs] =
                ((sample * raw[0] + d * task.stride[0]) * raw[1] + h * task.stride[1]) * raw[2] * pitch[1];
          }
      multiply(tap, tap + 1, runs, lo[2], hi[2]);
    }
  }

  // One tap of unpaired values, one position at a time: a pair or a window may reach beyond the bounds.
  void multiply_singly(int64_t tap, const int64_t* lo, const int64_t* hi) {
    const int v = task.vector_side, o = 1 - v;
    const int64_t offset = tap_offset(tap);
    for (int64_t sample = 0; sample < samples; ++sample)
      for (int64_t d = lo[0]; d < hi[0]; ++d)
        for (int64_t h = lo[1]; h < hi[1]; ++h)
          for (int64_t w = lo[2]; w < hi[2]; ++w) {
            const S* at[2] = {
                buffers.staged[0] + (((sample * n[0] + d) * n[1] + h) * n[2] + w) * pitch[0],
                buffers.staged[1] + offset +
                    (((sample * raw[0] + d * task.stride[0]) * raw[1] + h * task.stride[1]) * raw[2] + w) * pitch[1]};
            for (int64_t c = 0; c < count[o]; ++c) {
              S* sums = partial + buffers.sums[tap * count[o] + c];
              const int64_t step = task.windows ? kLanes<S> : vector_sums(task) * kLanes<S>;
              for (int64_t lane = 0; lane < count[v]; lane += kLanes<S>, sums += step) {
                const int64_t some = min_of(kLanes<S>, count[v] - lane);
                store_part(sums, load_part(sums, some) + load_part(at[v] + lane, some) * splat(at[o][c]), some);
              }
            }
          }
  }

  void run_tile(int64_t index) {
    int64_t rest = index;
    for (int dim = 2; dim >= 0; --dim) {
      q0[dim] = rest % task.tiles[dim + 1] * task.box[dim];
      n[dim] = min_of(task.box[dim], task.grid[dim] - q0[dim]);
      raw[dim] = task.stride[dim] * (n[dim] - 1) + task.dilation[dim] * (task.kernel[dim] - 1) + 1;
      if (dim == 2) raw[dim] = round_up(raw[dim], task.stride[dim]);
      rest /= task.tiles[dim + 1];
    }
    b = rest * task.samples;
    samples = min_of(task.samples, task.batch - b);
    bool finite = stage(0);
    finite &= stage(1) || !kPairs || n[2] % 2 == 0;  // the last of an odd number is paired with a zero
    const int o = 1 - task.vector_side;
    for (int64_t tap = 0; tap < task.num_taps; ++tap) {
      const int64_t at = o == 1 ? tap_offset(tap) : 0;
      for (int64_t c = 0; c < count[o]; ++c) buffers.offset[tap * count[o] + c] = at + c;
    }
    if (!finite) return multiply_exactly();
    make_pairs(0);
    make_pairs(1);
    find_runs();
    if (task.windows) return multiply_windows(samples * n[0] * n[1]);
    multiply(0, task.num_taps, samples * n[0] * n[1], 0, n[2]);
  }
};

template <class S>
void run_typed(const ChannelGradWeightTask& task, int64_t item, void* scratch) {
  Work<S> work{task, carve<S>(task, scratch), 0, 0, 0, {}, {}, {}, {}, {}, {}, nullptr, nullptr};
  for (int side = 0; side < 2; ++side) {
    work.first[side] = item % task.chunks[side] * task.chunk[side];
    work.count[side] = min_of(task.chunk[side], task.channels[side] - work.first[side]);
    work.pitch[side] = task.staged_pitch[side];
    item /= task.chunks[side];
  }
  const int64_t group_items = task.groups / task.item_groups, g0 = item % group_items * task.item_groups;
  const int64_t part = item / group_items, o = 1 - task.vector_side;
  const int64_t group_elements = task.channels[o] * task.row_elements;
  auto enter = [&](int64_t group) {
    work.group = group;
    work.partial = static_cast<S*>(task.partial) + part * task.partial_elements + group * group_elements;
    if (task.bias && work.first[0] == 0)
      work.bias = task.bias + part * task.whole_channels[1] + group * task.channels[1] + work.first[1];
  };
  for (int64_t group = g0; group < g0 + task.item_groups; ++group) {
    enter(group);
    for (int64_t c = 0; work.bias && c < work.count[1]; ++c) work.bias[c] = 0;
    if (task.windows) {
      memset(work.partial + work.first[o] * task.row_elements, 0,
             static_cast<size_t>(work.count[o] * task.row_elements) * sizeof(S));
      continue;
    }
    const int64_t c1 = work.first[o] + work.count[o], v1 = work.first[1 - o] + work.count[1 - o];
    for (int64_t v = work.first[1 - o]; v < v1; v += kLanes<S>)
      for (int64_t c0 = work.first[o], c; c0 < c1; c0 = c) {
        c = min_of(c1, (c0 / kSumsBlock + 1) * kSumsBlock);
        for (int64_t tap = 0; tap < task.num_taps; ++tap)
          memset(work.partial + v * vector_sums(task) + sums_at(task, c0, tap) * kLanes<S>, 0,
                 static_cast<size_t>((c - c0) * kLanes<S>) * sizeof(S));
      }
  }
  for (int64_t tap = 0; tap < task.num_taps; ++tap)
    for (int64_t c = 0; c < work.count[o]; ++c)
      work.buffers.sums[tap * work.count[o] + c] =
          task.windows ? (work.first[o] + c) * task.row_elements + task.tap_sums[tap]
                       : work.first[1 - o] * vector_sums(task) + sums_at(task, work.first[o] + c, tap) * kLanes<S>;
  const int64_t last = (part + 1) * task.num_tiles / task.parts;
  for (int64_t at = part * task.num_tiles / task.parts; at < last; ++at)
    for (int64_t group = g0; group < g0 + task.item_groups; ++group) {
      enter(group);
      work.run_tile(at);
    }
}

// Adds the parts of one input channel's windows and stores each lane where it belongs.
template <class S>
void merge_windows(const ChannelGradWeightTask& task, int64_t item, void* result) {
  const int64_t channels = task.channels[1], taps = task.num_taps, width = task.kernel[2];
  const int64_t together = task.stride[2] / task.dilation[2];  // from one tap of a window to the next
  for (int64_t window = 0; window < task.num_windows; ++window) {
    const int64_t tap = task.window[2 * window], last = (width - 1 - tap % width) / together * together + tap;
    for (int64_t v = 0; v < task.window[2 * window + 1]; ++v) {
      const S* from =
          static_cast<const S*>(task.partial) + item * task.row_elements + task.tap_sums[tap] + v * kLanes<S>;
      double sum[kLanes<S>] = {};
      for (int64_t part = 0; part < task.parts; ++part)
        for (int l = 0; l < kLanes<S>; ++l) sum[l] += static_cast<double>(from[part * task.partial_elements + l]);
      int64_t to = tap + v * kLanes<S> / channels * together, c = v * kLanes<S> % channels;
      for (int l = 0; l < kLanes<S> && to <= last; ++l) {
        S value[2 * kLanes<S>] = {static_cast<S>(sum[l])};
        store_row(value, result, task.dtype, (item * channels + c) * taps + to, 1);
        if (++c == channels) c = 0, to += together;
      }
    }
  }
}

// Adds the parts of one vector's channels and stores them in the order of the weights: a block of the other side's channels
// and up to 16 taps at a time.
template <class S>
void merge_typed(const ChannelGradWeightTask& task, int64_t item, void* result) {
  typedef double Doubles __attribute__((vector_size(kLanes<S> * sizeof(double))));
  constexpr int64_t kTaps = 16, kPieces = kTaps / kLanes<S>;
  const int v = task.vector_side;
  const int64_t vectors = task.pitch / kLanes<S>, group = item / vectors, v0 = item % vectors * kLanes<S>;
  const int64_t lanes = min_of(kLanes<S>, task.channels[v] - v0), taps = task.num_taps, k = task.channels[1];
  const S* partial =
      static_cast<const S*>(task.partial) + group * task.channels[1 - v] * task.row_elements + v0 * vector_sums(task);
  // [channel of the vector][of the block][tap] for vectors of input channels, else [of the block][of the vector][tap]
  constexpr int64_t kMost = kLanes<S> > kSumsBlock ? kLanes<S> : kSumsBlock;
  S values[kLanes<S> * kSumsBlock * kTaps + kMost * kLanes<S>];
  for (int64_t c0 = 0; c0 < task.channels[1 - v]; c0 += kSumsBlock) {
    const int64_t block = min_of(kSumsBlock, task.channels[1 - v] - c0);
    for (int64_t t0 = 0; t0 < taps; t0 += kTaps) {
      const int64_t n = min_of(kTaps, taps - t0), inner = v == 0 ? block : lanes, outer = v == 0 ? lanes : block;
      const int64_t pitch = inner * n + kLanes<S>;
      const S* from = partial + (c0 * taps + t0 * block) * kLanes<S>;
      Doubles totals[kTaps * kSumsBlock];  // part by part: the same sum of all parts lies in one set of the cache
      for (int64_t i = 0; i < n * block; ++i) totals[i] = Doubles{};
      for (int64_t part = 0; part < task.parts && task.parts > 1; ++part)
        for (int64_t i = 0; i < n * block; ++i)
          totals[i] += __builtin_convertvector(load(from + part * task.partial_elements + i * kLanes<S>), Doubles);
      for (int64_t c = 0; c < block; ++c) {
        Vec<S> sums[kPieces][kLanes<S>] = {};
        for (int64_t t = 0; t < n; ++t)
          sums[t / kLanes<S>][t % kLanes<S>] = task.parts == 1 ? load(from + (t * block + c) * kLanes<S>)
                                                               : __builtin_convertvector(totals[t * block + c], Vec<S>);
        for (int64_t piece = 0; piece < kPieces; ++piece) transpose_block<S>(sums[piece]);
        // Whole vectors: what they leave behind the last tap the next ones overwrite.
        for (int64_t l = 0; l < lanes; ++l)
          for (int64_t piece = 0; piece * kLanes<S> < n; ++piece)
            store(values + (v == 0 ? l * pitch + c * n : c * pitch + l * n) + piece * kLanes<S>, sums[piece][l]);
      }
      const int64_t join = n == taps ? inner : 1;  // runs that follow each other in the weights
      for (int64_t i = 0; i < outer; ++i)
        for (int64_t j = 0; j < inner; j += join) {
          const int64_t input = v == 0 ? v0 + i : c0 + i, output = v == 0 ? c0 + j : v0 + j;
          const int64_t index = ((group * task.channels[0] + input) * k + output) * taps + t0;
          store_row(values + i * pitch + j * n, result, task.dtype, index, join * n);
        }
    }
  }
}

void run(const ChannelGradWeightTask& task, int64_t item, void* scratch) {
  task.dtype == DType::f64 && !kPairs ? run_typed<double>(task, item, scratch) : run_typed<float>(task, item, scratch);
}
int64_t scratch_bytes(const ChannelGradWeightTask& task) {
  return task.dtype == DType::f64 ? carve<double>(task, nullptr).bytes : carve<float>(task, nullptr).bytes;
}
void merge(const ChannelGradWeightTask& task, int64_t item, void* result) {
  if (task.windows)
    return task.dtype == DType::f64 ? merge_windows<double>(task, item, result)
                                    : merge_windows<float>(task, item, result);
  task.dtype == DType::f64 ? merge_typed<double>(task, item, result) : merge_typed<float>(task, item, result);
}

constexpr ChannelGradWeightLoops kLoops = {Isa::TCONV_TARGET, run, scratch_bytes, merge, sum_bias};

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  return fit_channel_grad_weight(problem, epilogue, device, Isa::TCONV_TARGET);
}
void prepare(Step& step) { prepare_channel_grad_weight(step, Isa::TCONV_TARGET); }
void launch(const Step& step, const Tensors& tensors, Stream stream) {
  launch_channel_grad_weight(step, tensors, stream, kLoops);
}

constexpr Config kConfigs[] = {{}};

}  // namespace

#define TCONV_NAME_OF(name) #name
#define TCONV_NAME(name) TCONV_NAME_OF(name)
extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {TCONV_NAME(TCONV_KERNEL), kConfigs, fit, nullptr, prepare, launch};

}  // namespace tconv::cpu
