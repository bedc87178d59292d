// channel_gemm_grad_weight_driver.cpp — the portable half of channel_gemm_grad_weight: tiles, chunks, parts, threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cpu/channel_gemm_grad_weight.h"
#include "cpu/parallel.h"

namespace tconv::cpu {
namespace {

struct Tiling {
  ChannelGradWeightTask task{};
  std::vector<char> used[2];
  std::vector<std::int64_t> window, tap_sums;
  double critical_cycles = 0;
};

std::int64_t round_up(std::int64_t a, std::int64_t to) { return (a + to - 1) / to * to; }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// n cut into the fewest equal pieces of at most `most`.
std::int64_t even_piece(std::int64_t n, std::int64_t most) {
  n = std::max<std::int64_t>(1, n);
  return ceil_div(n, ceil_div(n, std::max<std::int64_t>(1, most)));
}

std::int64_t raw_extent(const ChannelGradWeightTask& task, int dim, std::int64_t n) {
  const std::int64_t extent = task.stride[dim] * (n - 1) + task.dilation[dim] * (task.kernel[dim] - 1) + 1;
  return dim == 2 ? round_up(extent, task.stride[dim]) : extent;
}

std::int64_t pitch_of(const ChannelGradWeightTask& task, int side) {
  if (task.depthwise) side = 0;  // the same channels on both
  const std::int64_t n = task.chunk[side];
  if ((side != task.vector_side || task.windows) && n < task.lanes) return n;
  const std::int64_t vectors = ceil_div(n, task.lanes);
  // An odd number of lines from one position to the next: an even one of 8 or more would use half of the cache's sets.
  return (vectors >= 8 && vectors % 2 == 0 ? vectors + 1 : vectors) * task.lanes;
}

std::int64_t staged_bytes(const ChannelGradWeightTask& task, std::int64_t element) {
  std::int64_t positions = task.samples, raw = task.samples;
  for (int dim = 0; dim < 3; ++dim) {
    positions *= task.box[dim];
    raw *= raw_extent(task, dim, task.box[dim]);
  }
  return (positions * pitch_of(task, 0) + raw * pitch_of(task, 1)) * element;
}

// Cycles of one core for `rows` by `vectors` sums at one position: two FMAs, two loads a cycle, FMAs take four, those of
// pairs of bf16 six (measured: 8 sums at a time reach 65 % of what 16 do).
double position_cycles(std::int64_t rows, std::int64_t vectors, Isa target) {
  const bool wide = target >= Isa::avx512;
  const std::int64_t most_vectors = wide ? 4 : 3, blocks = ceil_div(vectors, most_vectors);
  double cycles = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t v = (block + 1) * vectors / blocks - block * vectors / blocks;
    const std::int64_t most = wide ? (v == 4 ? 6 : 8) : v == 3 ? 4 : v == 2 ? 6 : 8;
    const std::int64_t height = std::min(rows, most);
    const double one = std::max({static_cast<double>(height * v) / 2, static_cast<double>(height + v) * 0.6,
                                 target == Isa::avx512_bf16 ? 6.0 : 4.0});
    cycles += one * static_cast<double>(rows) / static_cast<double>(height);
  }
  return cycles;
}

std::shared_ptr<Tiling> make_tiling(const Problem& problem, const Device& device, Isa target) {
  auto tiling = std::make_shared<Tiling>();
  ChannelGradWeightTask& task = tiling->task;
  const Dims out = output_size(problem);
  const bool f64 = problem.dtype == DType::f64;
  const std::int64_t element = f64 ? 8 : 4;
  task.dtype = problem.dtype;
  task.layout = problem.layout;
  task.batch = problem.batch;
  task.groups = problem.groups;
  task.whole_channels[0] = problem.in_channels;
  task.whole_channels[1] = problem.out_channels;
  task.lanes = (target >= Isa::avx512 ? 64 : target >= Isa::avx2 ? 32 : 16) / element;
  for (int side = 0; side < 2; ++side) task.channels[side] = task.whole_channels[side] / problem.groups;
  for (int dim = 0; dim < 3; ++dim) {
    task.size[0][dim] = task.grid[dim] = problem.input[dim];
    task.size[1][dim] = out[dim];
    task.stride[dim] = problem.stride[dim];
    task.padding[dim] = problem.padding[dim];
    task.dilation[dim] = problem.dilation[dim];
    task.kernel[dim] = problem.kernel[dim];
  }
  task.num_taps = volume(problem.kernel);
  task.one_phase = task.kernel[2] == 1 || task.dilation[2] % task.stride[2] == 0;
  // Channels along the vectors on both sides, taps as rows; contiguous tensors are better served by phase_gemm.
  task.depthwise = task.channels[0] == 1 && task.channels[1] == 1 && task.groups > 1 &&
                   task.layout == Layout::channels_last && target != Isa::avx512_bf16;
  if (task.depthwise) std::swap(task.groups, task.channels[0]);
  // The side that wastes fewer lanes lies along the vectors; the input when there is no difference, because then taps
  // are rows of a register tile and few channels on the other side do no harm.
  auto padded = [&](int side) { return static_cast<double>(round_up(task.channels[side], task.lanes)); };
  auto waste = [&](int side) {
    return padded(side) / static_cast<double>(std::max<std::int64_t>(1, task.channels[side]));
  };
  task.vector_side = !task.depthwise && waste(1) < waste(0) - 1e-9 ? 1 : 0;
  // Windows, where their products take fewer cycles.
  const std::int64_t step = task.stride[2], dilation = task.dilation[2], together = step / dilation;
  task.pitch = round_up(task.channels[task.vector_side], task.lanes);
  if (!task.depthwise && task.channels[1] <= task.lanes && step % dilation == 0 && task.kernel[2] > together) {
    double cycles = 0;
    for (std::int64_t tap = 0; tap < std::min(together, task.kernel[2]); ++tap) {
      const std::int64_t taps = ceil_div(task.kernel[2] - tap, together);
      cycles += position_cycles(task.channels[0], ceil_div(taps * task.channels[1], task.lanes), target);
    }
    const bool rows = task.vector_side == 0;  // taps are rows
    const double other = position_cycles(task.channels[1 - task.vector_side] * (rows ? task.kernel[2] : 1),
                                         task.pitch / task.lanes, target) *
                         static_cast<double>(rows ? 1 : task.kernel[2]);
    task.windows = cycles < 0.9 * other;
  }
  if (task.windows) task.vector_side = 1, task.pitch = task.lanes;
  const int v = task.vector_side, o = 1 - v;
  for (std::int64_t tap = 0; task.windows && tap < task.num_taps; ++tap) {
    const std::int64_t column = tap % task.kernel[2];
    if (column >= together) {  // one more of a window
      tiling->tap_sums.push_back(tiling->tap_sums[static_cast<std::size_t>(tap - together)] + task.channels[1]);
      continue;
    }
    const std::int64_t vectors = ceil_div(ceil_div(task.kernel[2] - column, together) * task.channels[1], task.lanes);
    tiling->tap_sums.push_back(task.row_elements);
    tiling->window.push_back(tap);
    tiling->window.push_back(vectors);
    task.row_elements += vectors * task.lanes;
  }
  if (!task.windows) task.row_elements = task.num_taps * task.pitch;
  task.tap_sums = tiling->tap_sums.data();
  task.window = tiling->window.data();
  task.num_windows = static_cast<std::int64_t>(tiling->window.size()) / 2;
  task.partial_elements = task.groups * task.channels[o] * task.row_elements;

  // AVX2: as many of the input's channels as of grad_output's times its positions for one of the input, so that an item
  // copies as much of both sides. hifigan_512_256 took 26 ms with 128 and 64 channels and takes 23 with 256 and 32.
  std::int64_t copies[2] = {1, 1}, most = 16;
  if (target == Isa::avx2) {
    for (int dim = 0; dim < 3; ++dim) copies[1] *= std::min(task.stride[dim], task.kernel[dim]);
    most = 32;
  }
  for (int side = 0; side < 2; ++side)
    task.chunk[side] = task.windows && side == v
                           ? task.channels[side]
                           : round_up(even_piece(task.channels[side], (side == v ? most : 8) * task.lanes),
                                      side == v ? task.lanes : 1);
  // The tile: rows of at most 128 positions, then as much as half of the second cache level holds.
  const double budget = 0.5 * static_cast<double>(device.l2_bytes);
  task.samples = task.box[0] = task.box[1] = 1;
  task.box[2] = even_piece(task.grid[2], 128);
  auto too_large = [&] { return static_cast<double>(staged_bytes(task, element)) > budget; };
  while (too_large()) {
    const int larger = task.chunk[1] * copies[1] >= task.chunk[0] * copies[0] ? 1 : 0;
    if (task.chunk[larger] > 4 * task.lanes)
      task.chunk[larger] = round_up(task.chunk[larger] / 2, larger == v ? task.lanes : 1);
    else if (task.box[2] > 16)
      task.box[2] = even_piece(task.grid[2], task.box[2] / 2);
    else
      break;
  }
  auto grow = [&](std::int64_t* extent, std::int64_t whole) {
    std::int64_t best = *extent;
    for (std::int64_t pieces = whole; pieces >= 1;
         pieces = pieces > 1 ? std::max<std::int64_t>(1, pieces * 3 / 4) : 0) {
      *extent = ceil_div(whole, pieces);
      if (too_large() || task.samples * task.box[0] * task.box[1] * task.box[2] > 2048) break;
      best = *extent;
    }
    *extent = best;
    return best == whole;
  };
  if (task.box[2] == task.grid[2] || task.grid[1] > 1) {
    if (grow(&task.box[1], std::max<std::int64_t>(1, task.grid[1])) &&
        grow(&task.box[0], std::max<std::int64_t>(1, task.grid[0])) && task.box[2] == task.grid[2])
      grow(&task.samples, std::max<std::int64_t>(1, task.batch));
  }

  task.tiles[0] = ceil_div(task.batch, task.samples);
  task.num_tiles = task.tiles[0];
  for (int dim = 0; dim < 3; ++dim) {
    task.tiles[dim + 1] = ceil_div(task.grid[dim], task.box[dim]);
    task.num_tiles *= task.tiles[dim + 1];
    task.raw[dim] = raw_extent(task, dim, task.box[dim]);
  }
  // The partition of the sum depends on the problem only, never on the threads; all partials take 8 MB at most.
  const std::int64_t bytes = std::max<std::int64_t>(1, task.partial_elements * element);
  task.parts = std::clamp<std::int64_t>((8 << 20) / bytes, 1, std::clamp<std::int64_t>(task.num_tiles, 1, 32));
  auto count_chunks = [&] {
    for (int side = 0; side < 2; ++side) task.chunks[side] = ceil_div(task.channels[side], task.chunk[side]);
    return task.parts * task.groups * task.chunks[0] * task.chunks[1];
  };
  while (count_chunks() < 12) {
    const int side = task.chunk[o] >= 2 * std::min<std::int64_t>(8, task.channels[o]) &&
                             task.chunk[o] * copies[o] >= task.chunk[v] * copies[v]
                         ? o
                     : task.chunk[v] >= 2 * task.lanes ? v  // never with windows
                                                       : -1;
    if (side < 0) break;
    task.chunk[side] = round_up((task.chunk[side] + 1) / 2, side == v ? task.lanes : 1);
  }
  count_chunks();
  // The groups of a channels_last position share cache lines: while there are items for all cores, a tile's groups follow
  // each other. One after the other over the whole tensor they read it once each (kernelbench_1_73 in 4 groups: 108 ms).
  const std::int64_t cores = std::max(1, device.cores);
  const bool share = task.layout == Layout::channels_last && task.parts * task.chunks[0] * task.chunks[1] >= 4 * cores;
  task.item_groups = share ? task.groups : 1;
  for (int side = 0; side < 2; ++side) task.staged_pitch[side] = pitch_of(task, side);
  for (int dim = 0; dim < 2; ++dim) {
    tiling->used[dim].assign(static_cast<std::size_t>(task.raw[dim]), 0);
    for (std::int64_t q = 0; q < task.box[dim]; ++q)
      for (std::int64_t t = 0; t < task.kernel[dim]; ++t)
        tiling->used[dim][static_cast<std::size_t>(task.stride[dim] * q + task.dilation[dim] * t)] = 1;
    task.used[dim] = reinterpret_cast<const bool*>(tiling->used[dim].data());
  }

  // The bias's sums by the way: a pass of their own reads all of grad_output once more. Few channels, and one width phase
  // alone, are staged in other ways.
  task.sums_bias = task.layout == Layout::contiguous && task.channels[0] > 0 && task.num_tiles > 0 &&
                   !(task.one_phase && task.stride[2] > 1) &&
                   (task.staged_pitch[1] >= task.lanes || (task.channels[1] >= 4 && task.chunks[1] == 1));
  for (int dim = 0; dim < 3; ++dim) {
    task.sums_bias &= raw_extent(task, dim, task.grid[dim]) - task.padding[dim] >= task.size[1][dim];
    if (dim < 2) task.sums_bias &= std::count(tiling->used[dim].begin(), tiling->used[dim].end(), 0) == 0;
  }

  double positions = static_cast<double>(task.samples), raw = positions;
  for (int dim = 0; dim < 3; ++dim) {
    positions *= static_cast<double>(task.box[dim]);
    double rows = static_cast<double>(task.raw[dim]);
    if (dim < 2) rows = static_cast<double>(std::count(tiling->used[dim].begin(), tiling->used[dim].end(), 1));
    raw *= rows;
  }
  const bool transposed = problem.layout == Layout::contiguous;
  const double pair = target == Isa::avx512_bf16 ? 2 : 1;  // positions in a word
  // Blocks of channels are transposed whole, however few of them there are.
  auto staged = [&](int side) {
    const bool block = transposed && task.chunk[side] >= 4;
    return static_cast<double>(block ? std::max(pitch_of(task, side), task.lanes) : pitch_of(task, side));
  };
  const double stage = (positions * staged(0) + raw * staged(1)) * ((transposed ? 9.0 : 3.0) + pair - 1) /
                       static_cast<double>(task.lanes);
  const std::int64_t rows = v == 0 ? task.chunk[o] * task.num_taps : task.chunk[o];
  double products = 0;  // cycles of a position
  for (std::int64_t window = 0; window < task.num_windows; ++window)
    products += position_cycles(rows, task.window[2 * window + 1], target);
  if (!task.windows)
    products = position_cycles(rows, ceil_div(task.chunk[v], task.lanes), target) *
               (v == 0 ? 1.0 : static_cast<double>(task.num_taps));
  const double multiply = positions * products * (task.depthwise ? 1.6 : 1.1) / pair;
  const double tiles_of_part = std::ceil(static_cast<double>(task.num_tiles) / static_cast<double>(task.parts));
  const double item = tiles_of_part * (500 + stage + multiply);
  const double items = static_cast<double>(task.parts * task.groups * task.chunks[0] * task.chunks[1]);
  const double merge = static_cast<double>(task.partial_elements * task.parts) * 0.5;
  const double count = static_cast<double>(cores);
  tiling->critical_cycles = std::ceil(items / count) * item + merge / count;
  return tiling;
}

std::size_t partial_bytes(const ChannelGradWeightTask& task) {
  const std::int64_t element = task.dtype == DType::f64 ? 8 : 4;
  return static_cast<std::size_t>(round_up(task.parts * task.partial_elements * element, 64));
}

std::size_t workspace_bytes(const Problem& problem, const ChannelGradWeightTask& task) {
  const std::size_t sums = static_cast<std::size_t>(round_up(task.parts * task.whole_channels[1] * 8, 64));
  return partial_bytes(task) + (task.sums_bias ? sums : grad_bias_bytes(problem)) + 64;
}

}  // namespace

Fit fit_channel_grad_weight(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target) {
  Fit fit;
  if (problem.direction != Direction::grad_weight) {
    fit.refusal = "computes grad_weight only";
    return fit;
  }
  if (device.isa < target) {
    fit.refusal = "needs an instruction set that this machine lacks";
    return fit;
  }
  if (target == Isa::avx512_bf16) {
    if (problem.dtype != DType::bf16)
      fit.refusal = "multiplies bf16 only, not " + std::string(to_string(problem.dtype));
    if (!epilogue.pre.empty())
      fit.refusal = "cannot apply an operation to the input without rounding its result to bf16";
    if (!fit.refusal.empty()) return fit;
  }
  fit.fused_pre = true;
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  const std::shared_ptr<Tiling> tiling = make_tiling(problem, device, target);
  fit.workspace_bytes = workspace_bytes(problem, tiling->task);
  const double flops_per_cycle = device.isa >= Isa::avx512 ? 64 : device.isa >= Isa::avx2 ? 32 : 16;
  const double cycles_per_us = std::max(500.0, device.fp32_tflops * 1e6 / device.cores / flops_per_cycle);
  const double memory = minimum_bytes(problem) / (device.bandwidth_tbs * 1e6);
  fit.microseconds = 5 + std::max(tiling->critical_cycles / cycles_per_us, memory);
  return fit;
}

void prepare_channel_grad_weight(Step& step, Isa target) {
  step.state = make_tiling(step.problem, step.device, target);
}

void launch_channel_grad_weight(const Step& step, const Tensors& tensors, Stream stream,
                                const ChannelGradWeightLoops& loops) {
  const Problem& problem = step.problem;
  const int threads = resolve_threads(stream.num_threads);
  std::shared_ptr<Tiling> own;
  const Tiling* tiling = static_cast<const Tiling*>(step.state.get());
  if (!tiling) {
    own = make_tiling(problem, step.device, loops.target);
    tiling = own.get();
  }
  ChannelGradWeightTask task = tiling->task;
  task.source[0] = tensors.input;
  task.source[1] = tensors.grad_output;
  std::vector<ChannelGradWeightTask::PreOp> pre;
  for (const Op& op : step.epilogue.pre) pre.push_back({op.kind, op.a, op.b});
  task.pre = pre.data();
  task.num_pre = static_cast<int>(pre.size());
  std::vector<char> own_workspace;
  char* workspace = static_cast<char*>(tensors.workspace);
  if (!workspace) {
    own_workspace.resize(workspace_bytes(problem, task) + 64);
    workspace = own_workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(own_workspace.data()) % 64);
  }
  task.partial = workspace;
  void* bias = workspace + partial_bytes(task);
  task.bias = task.sums_bias && tensors.grad_bias ? static_cast<double*>(bias) : nullptr;
  const std::int64_t scratch_bytes = loops.scratch_bytes(task);
  parallel_for(task.parts * task.groups / task.item_groups * task.chunks[0] * task.chunks[1], threads,
               [&](std::int64_t item) { loops.run(task, item, thread_scratch(scratch_bytes)); });
  parallel_for(task.windows ? task.groups * task.channels[0] : task.groups * (task.pitch / task.lanes), threads,
               [&](std::int64_t item) { loops.merge(task, item, tensors.output); });
  if (task.bias)
    store_grad_bias(problem, tensors, task.bias, task.parts);
  else if (tensors.grad_bias)
    launch_grad_bias(problem, tensors, bias, threads, loops.sum_bias);
}

}  // namespace tconv::cpu
