// finish — an epilogue by itself, forward and backward: pointwise*, one normalisation, pointwise*.
//
// Computes  Directions epilogue and grad_epilogue for any dtype and layout, in place or not.
// Method    Tiles of about 8192 elements (a block of channels by a run of positions) are read into fp32 rows, one
//           channel each, transposed for channels_last; the chain runs over 256 elements at a time. group_norm reads
//           twice: moments of each tile (count, mean, M2), merged in the order of the tiles, then the normalisation.
//           The pointwise part is computed again in the second pass: 25 vector instructions for 16 elements of a GELU
//           cost less than writing and reading 8 bytes for each. Backward recomputes the chain from the raw result.
// Refuses   Other directions; targets above the machine's; f64 mixed with another dtype.
// Reads as  finish_driver.cpp decides the tiles and owns the memory; this file is the loops over one tile.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/finish.h"

#include "cpu/rows.h"

namespace tconv::cpu {
namespace {

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Part of the result that one call works on.
struct Tile {
  int64_t b, c0, channels, p0, positions, pitch;
};

Tile tile_of(const FinishTask& task, int64_t item) {
  const int64_t run = item % task.position_blocks, block = item / task.position_blocks % task.channel_blocks;
  Tile tile;
  tile.b = item / task.position_blocks / task.channel_blocks;
  if (task.blocks_per_group > 0) {  // blocks do not straddle groups
    const int64_t group_channels = task.channels / task.num_groups;
    const int64_t group = block / task.blocks_per_group, within = block % task.blocks_per_group;
    tile.c0 = group * group_channels + within * task.tile_channels;
    tile.channels = min_of(task.tile_channels, (group + 1) * group_channels - tile.c0);
  } else {
    tile.c0 = block * task.tile_channels;
    tile.channels = min_of(task.tile_channels, task.channels - tile.c0);
  }
  tile.p0 = run * task.tile_positions;
  tile.positions = min_of(task.tile_positions, task.positions - tile.p0);
  tile.pitch = (task.tile_positions + 15) / 16 * 16 + 16;
  return tile;
}

template <class S>
void load_tile(const FinishTask& task, const Tile& tile, const void* source, DType dtype, S* rows) {
  if (task.layout == Layout::contiguous) {
    for (int64_t c = 0; c < tile.channels; ++c)
      load_row(source, dtype, (tile.b * task.channels + tile.c0 + c) * task.positions + tile.p0, tile.positions,
               rows + c * tile.pitch);
    return;
  }
  load_transposed(source, dtype, (tile.b * task.positions + tile.p0) * task.channels + tile.c0, task.channels,
                  tile.channels, tile.positions, rows, tile.pitch);
}

template <class S>
void store_tile(const FinishTask& task, const Tile& tile, const S* rows, void* target, DType dtype) {
  if (task.layout == Layout::contiguous) {
    for (int64_t c = 0; c < tile.channels; ++c)
      store_row(rows + c * tile.pitch, target, dtype, (tile.b * task.channels + tile.c0 + c) * task.positions + tile.p0,
                tile.positions);
    return;
  }
  store_transposed(rows, tile.pitch, target, dtype, (tile.b * task.positions + tile.p0) * task.channels + tile.c0,
                   task.channels, tile.channels, tile.positions);
}

template <class S>
S sum_of(const S* row, int64_t n) {
  Vec<S> sum{};
  int64_t i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) sum += load(row + i);
  S total = reduce<S>(sum);
  for (; i < n; ++i) total += row[i];
  return total;
}

template <class S>
S dot_of(const S* x, const S* y, int64_t n) {
  Vec<S> sum{};
  int64_t i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) sum += load(x + i) * load(y + i);
  S total = reduce<S>(sum);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

template <class S>
S squares_about(const S* row, S mean, int64_t n) {
  Vec<S> sum{};
  int64_t i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) {
    const Vec<S> d = load(row + i) - mean;
    sum += d * d;
  }
  S total = reduce<S>(sum);
  for (; i < n; ++i) total += (row[i] - mean) * (row[i] - mean);
  return total;
}

void merge(TileMoments& into, double count, double mean, double m2) {
  const double total = into.count + count, delta = mean - into.mean;
  into.m2 += m2 + delta * delta * (into.count * count / total);
  into.mean += delta * (count / total);
  into.count = total;
}

// The operand of ops[index] for channel c, n elements from position p.
template <class S>
const S* operand_of(const FinishTask& task, int index, int64_t b, int64_t c, int64_t p, int64_t n, S* buffer,
                    int* step) {
  const FinishOp& op = task.ops[index];
  *step = 0;
  if (op.operand == OperandKind::none) return nullptr;
  if (op.operand == OperandKind::channel) return static_cast<const S*>(op.values) + c;
  *step = 1;
  if (task.layout == Layout::contiguous) {
    load_row(op.values, task.dtype, (b * task.channels + c) * task.positions + p, n, buffer);
  } else {
    S element[kVecBytes / sizeof(S) + 1];
    for (int64_t i = 0; i < n; ++i) {
      load_row(op.values, task.dtype, (b * task.positions + p + i) * task.channels + c, 1, element);
      buffer[i] = element[0];
    }
  }
  return buffer;
}

template <class S>
void store_operand_gradient(const FinishTask& task, int index, int64_t b, int64_t c, int64_t p, int64_t n,
                            const S* values) {
  void* target = task.ops[index].gradients;
  if (task.layout == Layout::contiguous) {
    store_row(values, target, task.dtype, (b * task.channels + c) * task.positions + p, n);
    return;
  }
  S element[kVecBytes / sizeof(S) + 1] = {};
  for (int64_t i = 0; i < n; ++i) {
    element[0] = values[i];
    store_row(element, target, task.dtype, (b * task.positions + p + i) * task.channels + c, 1);
  }
}

template <class S>
struct Buffers {
  S *rows, *gradients, *mean, *rstd, *sum_g, *sum_gx, *operand, *product, *normal, *stages;
};

template <class S>
Buffers<S> carve(const FinishTask& task, const Tile& tile, void* scratch) {
  Buffers<S> buffers;
  S* next = static_cast<S*>(scratch);
  auto take = [&](int64_t n) {
    S* p = next;
    next += (n + 31) / 16 * 16;
    return p;
  };
  buffers.rows = take(task.tile_channels * tile.pitch);
  buffers.gradients = task.grad_output ? take(task.tile_channels * tile.pitch) : nullptr;
  buffers.mean = take(tile.pitch);
  buffers.rstd = take(tile.pitch);
  buffers.sum_g = take(tile.pitch);
  buffers.sum_gx = take(tile.pitch);
  buffers.operand = take(kFinishChunk);
  buffers.product = take(kFinishChunk);
  buffers.normal = take(kFinishChunk);
  buffers.stages = take((task.num_ops + 1) * (kFinishChunk + 16));
  return buffers;
}

// ops[first .. last) over n elements of one row, in place.
template <class S>
void apply_ops(const FinishTask& task, int first, int last, const Tile& tile, int64_t c, int64_t p, int64_t n, S* row,
               const Buffers<S>& buffers) {
  for (int index = first; index < last; ++index) {
    const FinishOp& op = task.ops[index];
    int step;
    const S* operand = operand_of(task, index, tile.b, c, p, n, buffers.operand, &step);
    apply_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), operand, step, row, n);
  }
}

// Mean, rstd, weight and bias of the normalisation for a piece of a row.
template <class S>
struct NormRow {
  const S *mean, *rstd;
  int step;
  S weight, bias;
};

template <class S>
NormRow<S> norm_row(const FinishTask& task, const Tile& tile, int64_t c, int64_t offset, const Buffers<S>& buffers) {
  NormRow<S> row;
  row.step = 0;
  if (task.norm_kind == OpKind::layer_norm) {
    row.mean = buffers.mean + offset;
    row.rstd = buffers.rstd + offset;
    row.step = 1;
  } else {
    const int64_t s =
        task.norm_kind == OpKind::batch_norm ? c : tile.b * task.num_groups + c / (task.channels / task.num_groups);
    row.mean = static_cast<const S*>(task.mean) + s;
    row.rstd = static_cast<const S*>(task.rstd) + s;
  }
  row.weight = task.norm_weight ? static_cast<const S*>(task.norm_weight)[c] : S(1);
  row.bias = task.norm_bias ? static_cast<const S*>(task.norm_bias)[c] : S(0);
  return row;
}

template <class S>
void normalise(const NormRow<S>& norm, const S* from, S* to, int64_t n, bool affine) {
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    Vec<S> x = (load(from + i) - fetch(norm.mean, norm.step, i)) * fetch(norm.rstd, norm.step, i);
    if (affine) x = x * norm.weight + norm.bias;
    store(to + i, x);
  }
}

// The part of the chain before the normalisation (or all of it), over every row of the tile.
template <class S>
void apply_before(const FinishTask& task, const Tile& tile, const Buffers<S>& buffers) {
  const int last = task.norm < 0 ? task.num_ops : task.norm;
  for (int64_t r = 0; r < tile.channels; ++r) {
    const int64_t c = tile.c0 + r;
    for (int64_t p = 0; p < tile.positions; p += kFinishChunk) {
      const int64_t n = min_of(kFinishChunk, tile.positions - p);
      S* row = buffers.rows + r * tile.pitch + p;
      if (task.bias) {
        const S bias = static_cast<const S*>(task.bias)[c];
        for (int64_t i = 0; i < n; i += kLanes<S>) store(row + i, load(row + i) + bias);
      }
      apply_ops(task, 0, last, tile, c, tile.p0 + p, n, row, buffers);
    }
  }
}

// layer_norm: mean and rstd of each position of the tile, in two passes over its channels.
template <class S>
void position_statistics(const FinishTask& task, const Tile& tile, const Buffers<S>& buffers) {
  S* saved_mean = static_cast<S*>(task.mean);
  S* saved_rstd = static_cast<S*>(task.rstd);
  const int64_t at = tile.b * task.positions + tile.p0;
  if (task.have_statistics) {
    memcpy(buffers.mean, saved_mean + at, static_cast<size_t>(tile.positions) * sizeof(S));
    memcpy(buffers.rstd, saved_rstd + at, static_cast<size_t>(tile.positions) * sizeof(S));
    return;
  }
  const S count = static_cast<S>(task.channels);
  for (int64_t i = 0; i < tile.positions; i += kLanes<S>) {
    Vec<S> sum{};
    for (int64_t r = 0; r < tile.channels; ++r) sum += load(buffers.rows + r * tile.pitch + i);
    const Vec<S> mean = sum / count;
    Vec<S> m2{};
    for (int64_t r = 0; r < tile.channels; ++r) {
      const Vec<S> d = load(buffers.rows + r * tile.pitch + i) - mean;
      m2 += d * d;
    }
    store(buffers.mean + i, mean);
    store(buffers.rstd + i, m2 / count + static_cast<S>(task.eps));
  }
  for (int64_t i = 0; i < tile.positions; ++i)
    buffers.rstd[i] = static_cast<S>(1 / __builtin_sqrt(static_cast<double>(buffers.rstd[i])));
  if (saved_mean) memcpy(saved_mean + at, buffers.mean, static_cast<size_t>(tile.positions) * sizeof(S));
  if (saved_rstd) memcpy(saved_rstd + at, buffers.rstd, static_cast<size_t>(tile.positions) * sizeof(S));
}

template <class S>
void run_forward(const FinishTask& task, FinishStage stage, int64_t item, void* scratch) {
  const Tile tile = tile_of(task, item);
  const Buffers<S> buffers = carve<S>(task, tile, scratch);
  load_tile(task, tile, task.input, task.dtype, buffers.rows);
  apply_before(task, tile, buffers);
  if (stage == FinishStage::moments) {
    const int64_t group_channels = task.channels / task.num_groups;
    const int64_t groups_in_tile = (tile.channels + group_channels - 1) / group_channels;
    TileMoments* moments = task.moments + item * (task.blocks_per_group > 0 ? 1 : task.num_groups);
    for (int64_t g = 0; g < groups_in_tile; ++g) {
      TileMoments sum{0, 0, 0};
      for (int64_t r = g * group_channels; r < min_of((g + 1) * group_channels, tile.channels); ++r) {
        const S* row = buffers.rows + r * tile.pitch;
        const S mean = sum_of(row, tile.positions) / static_cast<S>(tile.positions);
        merge(sum, static_cast<double>(tile.positions), mean, squares_about(row, mean, tile.positions));
      }
      moments[g] = sum;
    }
    return;
  }
  if (task.norm >= 0) {
    if (task.norm_kind == OpKind::layer_norm) position_statistics(task, tile, buffers);
    for (int64_t r = 0; r < tile.channels; ++r)
      for (int64_t p = 0; p < tile.positions; p += kFinishChunk) {
        const int64_t n = min_of(kFinishChunk, tile.positions - p), c = tile.c0 + r;
        S* row = buffers.rows + r * tile.pitch + p;
        normalise(norm_row(task, tile, c, p, buffers), row, row, n, task.norm_weight != nullptr);
        apply_ops(task, task.norm + 1, task.num_ops, tile, c, tile.p0 + p, n, row, buffers);
      }
  }
  store_tile(task, tile, buffers.rows, task.output, task.output_dtype);
}

// Reverse of ops[first .. last) over one piece of a row. stages[k] holds the values before ops[first + k].
template <class S>
void reverse_ops(const FinishTask& task, int first, int last, const Tile& tile, int64_t c, int64_t p, int64_t n,
                 const S* stages, S* gradient, bool keep, double* const* sums, const Buffers<S>& buffers) {
  for (int index = last - 1; index >= first; --index) {
    const FinishOp& op = task.ops[index];
    const bool channel_sum = keep && op.operand == OperandKind::channel && op.sum_slot >= 0;
    const bool tensor = keep && op.operand == OperandKind::tensor && op.gradients;
    int step;
    const S* operand = operand_of(task, index, tile.b, c, p, n, buffers.operand, &step);
    S* product = channel_sum || tensor ? buffers.product : nullptr;
    reverse_pointwise<S>(op.kind, static_cast<S>(op.a), static_cast<S>(op.b), operand, step,
                         stages + (index - first) * (kFinishChunk + 16), gradient, product, n);
    if (channel_sum) *sums[op.sum_slot] += sum_of(product, n);
    if (tensor) store_operand_gradient(task, index, tile.b, c, p, n, product);
  }
}

// Values before each of ops[first .. last) into stages, the value after them all behind the last.
template <class S>
S* record_ops(const FinishTask& task, int first, int last, const Tile& tile, int64_t c, int64_t p, int64_t n,
              const S* row, S* stages, const Buffers<S>& buffers) {
  memcpy(stages, row, static_cast<size_t>(n) * sizeof(S));
  for (int index = first; index < last; ++index) {
    S* next = stages + kFinishChunk + 16;
    memcpy(next, stages, static_cast<size_t>(n) * sizeof(S));
    apply_ops(task, index, index + 1, tile, c, p, n, next, buffers);
    stages = next;
  }
  return stages;
}

template <class S>
void run_backward(const FinishTask& task, FinishStage stage, int64_t item, void* scratch) {
  const Tile tile = tile_of(task, item);
  const Buffers<S> buffers = carve<S>(task, tile, scratch);
  const int before = task.norm < 0 ? task.num_ops : task.norm;
  const bool layer = task.norm >= 0 && task.norm_kind == OpKind::layer_norm;
  const int64_t part = tile.b * task.position_blocks + item % task.position_blocks;
  const int64_t parts = task.batch * task.position_blocks;
  // Sums of the operations behind the norm belong to the first pass over the elements, the others to the last.
  const bool two_stages = task.norm >= 0 && task.norm_kind == OpKind::group_norm;
  load_tile(task, tile, task.input, task.dtype, buffers.rows);
  load_tile(task, tile, task.grad_output, task.output_dtype, buffers.gradients);
  if (layer) {
    if (!task.have_statistics) {  // needs the values in front of the norm, all channels
      apply_before(task, tile, buffers);
      position_statistics(task, tile, buffers);
      load_tile(task, tile, task.input, task.dtype, buffers.rows);
    } else {
      position_statistics(task, tile, buffers);
    }
    memset(buffers.sum_g, 0, static_cast<size_t>(tile.pitch) * sizeof(S));
    memset(buffers.sum_gx, 0, static_cast<size_t>(tile.pitch) * sizeof(S));
  }
  for (int pass = layer ? 0 : 1; pass < 2; ++pass) {
    const bool summing = layer ? pass == 0 : stage == FinishStage::grad_sums;  // g behind the norm is summed only
    const bool keep_after = layer ? pass == 0 : !two_stages || summing;
    for (int64_t r = 0; r < tile.channels; ++r) {
      const int64_t c = tile.c0 + r;
      double* sums[kMaxSumSlots];
      for (int slot = 0; slot < task.num_slots; ++slot)
        sums[slot] = task.sums + (slot * parts + part) * task.channels + c;
      for (int64_t q = 0; q < tile.positions; q += kFinishChunk) {
        const int64_t n = min_of(kFinishChunk, tile.positions - q), p = tile.p0 + q;
        S* row = buffers.rows + r * tile.pitch + q;
        S* gradient = buffers.gradients + r * tile.pitch + q;
        S work[kFinishChunk + 16];
        if (task.norm >= 0) {
          const NormRow<S> norm = norm_row(task, tile, c, q, buffers);
          const S* value = record_ops(task, 0, before, tile, c, p, n, row, buffers.stages, buffers);
          normalise(norm, value, buffers.normal, n, false);
          normalise(norm, value, work, n, task.norm_weight != nullptr);
          record_ops(task, task.norm + 1, task.num_ops, tile, c, p, n, work, buffers.stages, buffers);
          memcpy(work, gradient, static_cast<size_t>(n) * sizeof(S));
          reverse_ops(task, task.norm + 1, task.num_ops, tile, c, p, n, buffers.stages, work, keep_after, sums,
                      buffers);
          if (keep_after) {
            if (task.weight_slot >= 0) *sums[task.weight_slot] += dot_of(work, buffers.normal, n);
            if (task.bias_slot >= 0) *sums[task.bias_slot] += sum_of(work, n);
          }
          if (summing && layer) {
            for (int64_t i = 0; i < n; i += kLanes<S>) {
              const Vec<S> g = load(work + i) * norm.weight;
              store(buffers.sum_g + q + i, load(buffers.sum_g + q + i) + g);
              store(buffers.sum_gx + q + i, load(buffers.sum_gx + q + i) + g * load(buffers.normal + i));
            }
          }
          if (summing) continue;
          const S* mean_g = buffers.sum_g + q;
          const S* mean_gx = buffers.sum_gx + q;
          S share = layer ? S(1) / static_cast<S>(task.channels) : S(1);
          if (task.norm_kind == OpKind::group_norm) {
            const int64_t s = tile.b * task.num_groups + c / (task.channels / task.num_groups);
            mean_g = static_cast<const S*>(task.sum_g) + s;
            mean_gx = static_cast<const S*>(task.sum_gx) + s;
          }
          for (int64_t i = 0; i < n; i += kLanes<S>) {
            Vec<S> g = load(work + i) * norm.weight;
            if (task.norm_kind != OpKind::batch_norm)
              g -= (fetch(mean_g, norm.step, i) + load(buffers.normal + i) * fetch(mean_gx, norm.step, i)) * share;
            store(work + i, g * fetch(norm.rstd, norm.step, i));
          }
        } else {
          memcpy(work, gradient, static_cast<size_t>(n) * sizeof(S));
        }
        record_ops(task, 0, before, tile, c, p, n, row, buffers.stages, buffers);
        reverse_ops(task, 0, before, tile, c, p, n, buffers.stages, work, true, sums, buffers);
        memcpy(gradient, work, static_cast<size_t>(n) * sizeof(S));
      }
    }
  }
  if (stage == FinishStage::grad_apply && task.output)
    store_tile(task, tile, buffers.gradients, task.output, task.dtype);
}

template <class S>
void run_typed(const FinishTask& task, FinishStage stage, int64_t item, void* scratch) {
  if (task.grad_output)
    run_backward<S>(task, stage, item, scratch);
  else
    run_forward<S>(task, stage, item, scratch);
}

void run(const FinishTask& task, FinishStage stage, int64_t item, void* scratch) {
  if (task.dtype == DType::f64)
    run_typed<double>(task, stage, item, scratch);
  else
    run_typed<float>(task, stage, item, scratch);
}

constexpr FinishLoops kLoops = {run};

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  return fit_finish(problem, epilogue, device, Isa::TCONV_TARGET);
}
void launch(const Step& step, const Tensors& tensors, Stream stream) { launch_finish(step, tensors, stream, kLoops); }

constexpr Config kConfigs[] = {{}};

}  // namespace

#define TCONV_NAME_OF(name) #name
#define TCONV_NAME(name) TCONV_NAME_OF(name)
extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {TCONV_NAME(TCONV_KERNEL), kConfigs, fit, nullptr, nullptr, launch};

}  // namespace tconv::cpu
