// channel_gemm_driver.cpp — the portable half of channel_gemm: taps, tiles, packed weights, threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/channel_gemm.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/taps.h"

namespace tconv::cpu {
namespace {

constexpr std::int64_t kSlack = 16;  // elements of a vector: channel operands are read by whole vectors

struct Tiling {
  ChannelGemmTask task{};
  std::vector<char> used[2];
  std::vector<int> phase_taps, phase_window;
  std::vector<std::int64_t> tap_source, tap_value, phase_words, phase_first;
  std::int64_t lanes = 1, most_vectors = 1;
  bool matrices = true;  // every run consists of whole products of matrices
  double critical_cycles = 0;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// More words of a position than this are a run of their own that is long enough.
constexpr std::int64_t kFewWords = 8;

// Whether the taps of every result phase read neighbouring columns, in this order, several of them for some phase.
bool are_windows(const std::vector<DimTap>& taps, std::int64_t source_step) {
  bool several = false;
  for (std::size_t i = 1; i < taps.size(); ++i) {
    if (taps[i].result_phase != taps[i - 1].result_phase) continue;
    auto column = [&](const DimTap& tap) { return source_step * tap.shift + tap.source_phase; };
    if (column(taps[i]) != column(taps[i - 1]) + 1) return false;
    several = true;
  }
  return several;
}

// Pairs of values need an even number of channels, or rows of the tensor that follow each other.
bool has_pairs(const Problem& problem) {
  const bool forward = problem.direction == Direction::forward;
  return problem.groups == 1 || (forward ? problem.in_channels : problem.out_channels) / problem.groups % 2 == 0;
}

// n cut into the fewest equal pieces of at most `most`.
std::int64_t even_piece(std::int64_t n, std::int64_t most) {
  return ceil_div(n, ceil_div(n, std::max<std::int64_t>(1, most)));
}

// Cycles of one core for one channel of all taps: `positions` by `vectors` sums, two FMAs and two loads a cycle.
double channel_cycles(double positions, std::int64_t vectors, std::int64_t most_vectors) {
  const bool wide = most_vectors == 4;
  double cycles = 0;
  for (std::int64_t block = 0, blocks = ceil_div(vectors, most_vectors); block < blocks; ++block) {
    const std::int64_t v = (block + 1) * vectors / blocks - block * vectors / blocks;
    const std::int64_t most = wide ? (v == 4 ? 6 : 8) : v == 3 ? 4 : v == 2 ? 6 : 8;
    const double height = std::min(positions, static_cast<double>(most)), count = static_cast<double>(v);
    cycles += std::max({height * count / 2, (height + count) * 0.6, 4.0}) * positions / height;
  }
  return cycles;
}

void choose_tile(ChannelGemmTask& task, double element_bytes, double l2_bytes, int cores, bool whole_products) {
  std::int64_t grid[3];
  for (int dim = 0; dim < 3; ++dim) grid[dim] = std::max<std::int64_t>(1, task.grid[dim]);
  const std::int64_t batch = std::max<std::int64_t>(1, task.batch);
  auto fits = [&] {
    double box = static_cast<double>(task.samples), positions = box;
    std::int64_t items = ceil_div(batch, task.samples) * task.groups * task.m_chunks;
    for (int dim = 0; dim < 3; ++dim) {
      box *= static_cast<double>(task.source_step[dim] * (task.tile[dim] + task.range[dim]));
      positions *= static_cast<double>(task.tile[dim]);
      items *= ceil_div(grid[dim], task.tile[dim]);
    }
    return box * static_cast<double>(task.pitch) * element_bytes < 0.35 * l2_bytes && positions <= 384 &&
           items >= 6 * cores;
  };
  task.samples = task.tile[0] = task.tile[1] = 1;
  // On the matrix unit, rows of whole products: 16 positions that are a step apart are read where they are.
  const auto piece = [&](std::int64_t most) {
    const std::int64_t even = even_piece(grid[2], most);
    return whole_products && even >= 16 ? std::min(grid[2], ceil_div(even, 16) * 16) : even;
  };
  task.tile[2] = piece(64);
  while (task.tile[2] > 12 && !fits()) task.tile[2] = std::min(piece(task.tile[2] - 1), task.tile[2] - 1);
  auto grow = [&](std::int64_t* extent, std::int64_t whole) {
    std::int64_t best = *extent;
    for (std::int64_t pieces = whole; pieces >= 1;
         pieces = pieces > 1 ? std::max<std::int64_t>(1, pieces * 3 / 4) : 0) {
      *extent = ceil_div(whole, pieces);
      if (!fits()) break;
      best = *extent;
    }
    *extent = best;
    return best == whole;
  };
  if (task.tile[2] == grid[2] || grid[1] > 1)
    if (grow(&task.tile[1], grid[1]) && grow(&task.tile[0], grid[0]) && task.tile[2] == grid[2])
      grow(&task.samples, batch);
}

std::shared_ptr<Tiling> make_tiling(const Problem& problem, const Device& device, Isa target) {
  auto tiling = std::make_shared<Tiling>();
  ChannelGemmTask& task = tiling->task;
  const bool forward = problem.direction == Direction::forward, f64 = problem.dtype == DType::f64;
  const Dims out = output_size(problem);
  const std::int64_t element = f64 ? 8 : 4;
  task.dtype = problem.dtype;
  task.batch = problem.batch;
  task.groups = problem.groups;
  const std::int64_t unit = target >= Isa::avx512_bf16 ? 2 : 1;  // values of a word
  task.k = (forward ? problem.in_channels : problem.out_channels) / problem.groups;
  task.m = (forward ? problem.out_channels : problem.in_channels) / problem.groups;
  task.source_channels = task.groups * task.k;
  task.rows = target >= Isa::avx512_bf16 ? (task.k + 1) / 2 : task.k;
  task.depthwise = task.k == 1 && task.m == 1 && task.groups > 1;
  if (task.depthwise) std::swap(task.groups, task.m);
  tiling->lanes = (target >= Isa::avx512 ? 64 : target >= Isa::avx2 ? 32 : 16) / element;
  tiling->most_vectors = target >= Isa::avx512 ? 4 : 3;
  task.vectors = ceil_div(task.m, tiling->lanes);
  task.pitch = task.rows < tiling->lanes ? task.rows : ceil_div(task.rows, tiling->lanes) * tiling->lanes;
  if (task.depthwise) task.pitch = std::min(task.vectors, tiling->most_vectors) * tiling->lanes;
  task.num_taps = volume(problem.kernel);
  std::vector<DimTap> taps[3];
  for (int dim = 0; dim < 3; ++dim) {
    task.source_size[dim] = forward ? problem.input[dim] : out[dim];
    task.result_size[dim] = forward ? out[dim] : problem.input[dim];
    task.source_step[dim] = forward ? 1 : problem.stride[dim];
    task.result_step[dim] = forward ? problem.stride[dim] : 1;
    task.grid[dim] = ceil_div(task.result_size[dim], task.result_step[dim]);
    taps[dim] = dim_taps(problem, dim);
    int low = taps[dim].front().shift, high = low;
    for (const DimTap& tap : taps[dim]) low = std::min(low, tap.shift), high = std::max(high, tap.shift);
    task.first_shift[dim] = low;
    task.range[dim] = high - low;
  }
  // Words as they are: not those of values that are converted, nor a few of a position's many.
  const bool words =
      target >= Isa::avx512_bf16 ? task.k % 2 == 0 : element == static_cast<std::int64_t>(size_of(problem.dtype));
  task.direct = words && !task.depthwise && task.rows >= tiling->lanes;
  for (int dim = 0; dim < 3; ++dim)
    for (const DimTap& tap : taps[dim]) {
      const std::int64_t first = task.source_step[dim] * tap.shift + tap.source_phase;
      const std::int64_t last = first + task.source_step[dim] * (task.grid[dim] - 1);
      task.direct = task.direct && first >= 0 && last < task.source_size[dim];
    }
  std::stable_sort(taps[2].begin(), taps[2].end(), [&](const DimTap& a, const DimTap& b) {
    auto column = [&](const DimTap& tap) { return task.source_step[2] * tap.shift + tap.source_phase; };
    return a.result_phase != b.result_phase ? a.result_phase < b.result_phase : column(a) < column(b);
  });
  const bool odd = target >= Isa::avx512_bf16 && task.k % 2 != 0, joined = are_windows(taps[2], task.source_step[2]);
  task.windows = odd || (joined && !task.depthwise && task.rows <= kFewWords && task.pitch == task.rows);
  task.word_step = odd ? 2 : 1;
  if (task.windows && task.groups > 1) task.direct = false;  // in the tensor other groups lie between a window's words
  if (odd) task.pitch = task.k;
  task.column_phase = taps[2].front().source_phase;
  for (const DimTap& tap : taps[2])
    if (tap.source_phase != task.column_phase || task.windows) task.column_phase = -1;

  const std::int64_t blocks = channel_blocks(task.vectors, tiling->most_vectors);
  task.m_chunk = task.depthwise ? 1 : blocks;
  task.m_chunks = task.m == 0 ? 0 : ceil_div(blocks, task.m_chunk);
  const int cores = std::max(1, device.cores);
  if (task.m > 0) {
    choose_tile(task, static_cast<double>(element), static_cast<double>(device.l2_bytes), cores,
                target == Isa::avx512_amx);
    auto items = [&] {
      std::int64_t count = ceil_div(task.batch, task.samples) * task.groups * task.m_chunks;
      for (int dim = 0; dim < 3; ++dim) count *= ceil_div(task.grid[dim], task.tile[dim]);
      return count;
    };
    while (task.m_chunk > 1 && items() < 6 * cores) {
      task.m_chunk = (task.m_chunk + 1) / 2;
      task.m_chunks = ceil_div(blocks, task.m_chunk);
    }
  } else {
    task.samples = task.tile[0] = task.tile[1] = task.tile[2] = 1;
  }
  task.tiles[0] = ceil_div(task.batch, task.samples);
  double box = static_cast<double>(task.samples), positions = box,
         items = static_cast<double>(task.groups * task.m_chunks);
  double phases = 1;
  for (int dim = 0; dim < 3; ++dim) {
    task.tiles[dim + 1] = ceil_div(task.grid[dim], task.tile[dim]);
    items *= static_cast<double>(task.tiles[dim + 1]);
    positions *= static_cast<double>(task.tile[dim]);
    phases *= static_cast<double>(task.result_step[dim]);
    double extent = static_cast<double>(task.source_step[dim] * (task.tile[dim] + task.range[dim]));
    if (dim < 2) {
      tiling->used[dim].assign(static_cast<std::size_t>(extent), 0);
      for (std::int64_t q = 0; q < task.tile[dim]; ++q)
        for (const DimTap& tap : taps[dim])
          tiling->used[dim][static_cast<std::size_t>(task.source_step[dim] * (q + tap.shift - task.first_shift[dim]) +
                                                     tap.source_phase)] = 1;
      task.used[dim] = reinterpret_cast<const bool*>(tiling->used[dim].data());
      extent = static_cast<double>(std::count(tiling->used[dim].begin(), tiling->used[dim].end(), 1));
    } else if (task.column_phase >= 0) {
      extent /= static_cast<double>(task.source_step[2]);
    }
    box *= extent;
  }
  items *= static_cast<double>(task.tiles[0]);

  tiling->tap_value.resize(static_cast<std::size_t>(task.num_taps));
  double runs = 0, products = 0;
  for (std::int64_t rd = 0; rd < task.result_step[0]; ++rd)
    for (std::int64_t rh = 0; rh < task.result_step[1]; ++rh)
      for (std::int64_t rw = 0; rw < task.result_step[2]; ++rw) {
        const auto of_phase =
            std::count_if(taps[2].begin(), taps[2].end(), [&](const DimTap& tap) { return tap.result_phase == rw; });
        const std::int64_t window = task.windows && joined && of_phase > 0 ? of_phase : 1;
        const std::int64_t words = ceil_div(window * task.k, unit), first = task.words;
        const std::size_t first_tap = tiling->tap_source.size() / 3;
        tiling->phase_taps.push_back(static_cast<int>(first_tap));
        tiling->phase_window.push_back(static_cast<int>(window));
        tiling->phase_words.push_back(words);
        tiling->phase_first.push_back(first);
        const std::int64_t piece = matrix_words(words);
        tiling->matrices = tiling->matrices && (of_phase == 0 || piece > 0);
        for (const DimTap& td : taps[0])
          for (const DimTap& th : taps[1])
            for (const DimTap& tw : taps[2]) {
              if (td.result_phase != rd || th.result_phase != rh || tw.result_phase != rw) continue;
              const std::size_t tap =
                  static_cast<std::size_t>((td.tap * problem.kernel[1] + th.tap) * problem.kernel[2] + tw.tap);
              const std::int64_t slot = static_cast<std::int64_t>(tiling->tap_source.size() / 3 - first_tap);
              tiling->tap_value[tap] = (first + slot / window * words) * unit + slot % window * task.k;
              if (slot % window == 0) {
                task.words += words, runs += 1;
                if (piece > 0) products += static_cast<double>(words / piece);
              }
              const DimTap* of[3] = {&td, &th, &tw};
              for (int dim = 0; dim < 3; ++dim)
                tiling->tap_source.push_back(task.source_step[dim] * (of[dim]->shift - task.first_shift[dim]) +
                                             of[dim]->source_phase);
            }
      }
  tiling->phase_taps.push_back(static_cast<int>(tiling->tap_source.size() / 3));
  task.phase_taps = tiling->phase_taps.data();
  task.tap_source = tiling->tap_source.data();
  task.phase_window = tiling->phase_window.data();
  task.phase_words = tiling->phase_words.data();
  task.phase_first = tiling->phase_first.data();

  // Fitted on a Zen 5 core with AVX-512, as those of phase_gemm.
  const double lanes = static_cast<double>(tiling->lanes);
  const double share = static_cast<double>(task.m_chunk) / static_cast<double>(std::max<std::int64_t>(1, blocks));
  // Rows of few channels of a single group are staged by whole vectors.
  const bool dense = odd || (task.groups == 1 && task.rows == task.k && task.pitch < tiling->lanes);
  const double stage = box * static_cast<double>(task.pitch) / lanes * (dense ? 6 : 4) + box * (dense ? 0 : 4);
  double rows = 6, multiply = channel_cycles(positions, task.vectors, tiling->most_vectors) * share *
                              static_cast<double>(task.words) * 1.08;
  if (target == Isa::avx512_amx && positions >= 16) {  // 16 positions by one vector are a product of 16 cycles
    rows = 16, multiply = std::ceil(positions / 16) * static_cast<double>(task.vectors) * share * products * 16;
  }
  // 8 cycles before each run: 40 % of the time of a tap of one channel, 2 % of one of 64.
  const double setup = positions / rows * static_cast<double>(task.m_chunk) * runs * 8;
  const double calls = positions / rows * phases * static_cast<double>(task.m_chunk) * 25;
  const double store = positions * phases * static_cast<double>(task.vectors) * share * 8 + positions * phases * 10;
  const double sums = positions * static_cast<double>(task.vectors) * share *
                      std::max(phases, static_cast<double>(task.words) / 80) * 2;
  tiling->critical_cycles = std::ceil(items / cores) * (400 + stage + multiply + setup + calls + store + sums);
  return tiling;
}

std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::size_t weight_bytes(const Problem& problem, const Tiling& tiling) {
  const ChannelGemmTask& task = tiling.task;
  const std::int64_t elements = task.groups * task.vectors * tiling.lanes * task.words;
  return round_up(static_cast<std::size_t>(elements) * (problem.dtype == DType::f64 ? 8 : 4) + 64);
}

std::size_t workspace_bytes(const Problem& problem, const Epilogue& epilogue, const Tiling& tiling) {
  return weight_bytes(problem, tiling) + operand_bytes(problem, epilogue, kSlack);
}

}  // namespace

Fit fit_channel_gemm(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target) {
  Fit fit;
  if (problem.layout != Layout::channels_last) {
    fit.refusal = "reads and writes channels_last tensors only";
    return fit;
  }
  fit = refuse_gemm(problem, epilogue, device, target, has_pairs(problem));
  if (!fit.refusal.empty()) return fit;
  const int norm = norm_index(epilogue);
  fit.fused_ops = norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
  fit.fused_pre = true;
  const std::shared_ptr<Tiling> tiling = make_tiling(problem, device, target);
  if (target == Isa::avx512_amx && (tiling->task.depthwise || tiling->task.word_step != 1 || !tiling->matrices)) {
    fit.refusal = "runs that are not whole products of 6 to 16 pairs of channels";
    return fit;
  }
  fit.workspace_bytes = workspace_bytes(problem, epilogue, *tiling);
  const double flops_per_cycle = device.isa >= Isa::avx512 ? 64 : device.isa >= Isa::avx2 ? 32 : 16;
  const double cycles_per_us = std::max(500.0, device.fp32_tflops * 1e6 / device.cores / flops_per_cycle);
  const double pack = static_cast<double>(weight_elements(problem)) * 4 / device.cores;
  const double chain = static_cast<double>(output_elements(problem)) * fit.fused_ops * 12 /
                       static_cast<double>(tiling->lanes) / device.cores;
  const double memory = minimum_bytes(problem) / (device.bandwidth_tbs * 1e6);
  fit.microseconds = 4 + std::max((tiling->critical_cycles + pack + chain) / cycles_per_us, memory);
  return fit;
}

void prepare_channel_gemm(Step& step, Isa target) { step.state = make_tiling(step.problem, step.device, target); }

void launch_channel_gemm(const Step& step, const Tensors& tensors, Stream stream, const ChannelGemmLoops& loops) {
  const Problem& problem = step.problem;
  const Epilogue& epilogue = step.epilogue;
  const int threads = resolve_threads(stream.num_threads);
  std::shared_ptr<Tiling> own;
  const Tiling* tiling = static_cast<const Tiling*>(step.state.get());
  if (!tiling) {
    own = make_tiling(problem, step.device, loops.target);
    tiling = own.get();
  }
  ChannelGemmTask task = tiling->task;
  std::vector<char> own_workspace;
  char* workspace = static_cast<char*>(tensors.workspace);
  if (!workspace) {
    own_workspace.resize(workspace_bytes(problem, epilogue, *tiling) + 64);
    workspace = own_workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(own_workspace.data()) % 64);
  }
  const bool forward = problem.direction == Direction::forward;
  ChannelPackTask pack{};
  pack.dtype = problem.dtype;
  pack.weight = tensors.weight;
  pack.packed = workspace;
  pack.taps = task.num_taps;
  pack.k = task.k;
  pack.words = task.words;
  pack.m = task.m;
  pack.k_stride = (forward ? task.m : 1) * task.num_taps;  // depthwise: one k, whose stride does not matter
  pack.m_stride = (forward ? 1 : task.k) * task.num_taps;
  pack.tap_value = tiling->tap_value.data();
  std::atomic<bool> finite{true};
  parallel_for(task.groups * channel_blocks(task.vectors, loops.most_vectors), threads, [&](std::int64_t item) {
    if (!loops.pack(pack, item)) finite.store(false, std::memory_order_relaxed);
  });
  task.masked = !finite.load();
  task.weight = workspace;
  workspace += weight_bytes(problem, *tiling);
  task.source = forward ? tensors.input : tensors.grad_output;
  task.result = tensors.output;
  task.result_dtype = epilogue.output_dtype.value_or(problem.dtype);
  const Operands operands = take_operands(problem, epilogue, tensors, workspace, kSlack);
  task.bias = operands.bias;
  task.pre = operands.pre.data();
  task.num_pre = static_cast<int>(operands.pre.size());
  task.ops = operands.ops.data();
  task.num_ops = static_cast<int>(operands.ops.size());
  const std::int64_t scratch_bytes = loops.scratch_bytes(task);
  task.items = task.tiles[0] * task.groups * task.tiles[1] * task.tiles[2] * task.tiles[3] * task.m_chunks;
  task.ahead = threads;
  task.direct = task.direct && task.num_pre == 0;
  parallel_for(task.items, threads, [&](std::int64_t item) { loops.run(task, item, thread_scratch(scratch_bytes)); });
}

}  // namespace tconv::cpu
