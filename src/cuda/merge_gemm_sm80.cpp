// merge_gemm_sm80 — host side: tile geometry, price, specialisation and launch of merge_gemm_sm80.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <set>
#include <sstream>

#include "driver.h"
#include "lattice.h"
#include "row_tile.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// block_m lattice positions, block_n columns, block_k words of channels staged at once.
#define CHUNKS(m, n) {m, n, 8, 0, kWarps, 0}, {m, n, 16, 0, kWarps, 0}, {m, n, 32, 0, kWarps, 0}
constexpr Config kConfigs[] = {CHUNKS(256, 8),  CHUNKS(128, 8),  CHUNKS(256, 16), CHUNKS(128, 16),
                               CHUNKS(256, 32), CHUNKS(128, 32), CHUNKS(128, 64)};
#undef CHUNKS

constexpr int64_t kMostColumns = 64;
constexpr int64_t kMaxShifts = 1024;             // tables in constant memory
constexpr int64_t kMaxWeightBytes = 112 * 1024;  // beside a tile

struct Column {
  int channel, phase[3];
};

struct Geometry {
  std::string refusal;
  int k = 0, per_word = 1, words = 1, parts = 1;  // channels of a group, in words of 4 bytes
  std::vector<Column> columns;
  std::vector<std::array<int, 3>> shifts;
  std::vector<std::vector<int>> tap;  // per shift and column, or -1
  std::vector<int> offset[3];         // distinct shifts of a dimension, ascending
  int64_t lattice[3] = {1, 1, 1};
  RowTile tile;
  int chunks = 1, lines = 1, used = 0;  // used: blocks of 8 columns with a tap, over all shifts
  int registers = 0, blocks_per_multiprocessor = 1, shares = 1;
  std::size_t shared_bytes = 0;
};

// What depends on the layer alone.
Geometry layer_geometry(const Problem& problem) {
  Geometry g;
  const auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::forward) {
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not forward");
  }
  if (problem.dtype == DType::f64) return refuse("f64 has no mma.sync of this shape");
  if (problem.groups == 0) return refuse("no channels");
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  if (ci == 0 || co == 0) return refuse("no channels");
  const int64_t phases = problem.stride[0] * problem.stride[1] * problem.stride[2];
  if (phases > kMostColumns || phases * co > kMostColumns) {
    return refuse(std::to_string(co) + " channels in " + std::to_string(phases) + " phases, at most " +
                  std::to_string(kMostColumns) + " of both");
  }
  if (volume(problem.kernel) > 4096) return refuse("more than 4096 taps");
  for (int dim = 0; dim < 3; ++dim) {
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20)) {
      return refuse("extent of the kernel too large for the tables");
    }
  }
  g.k = static_cast<int>(ci);
  g.per_word = size_of(problem.dtype) == 2 ? 2 : 1;
  g.words = static_cast<int>(ceil_div(ci, g.per_word));
  g.parts = problem.dtype == DType::f32 && problem.precision == Precision::fp32 ? 2 : 1;
  LatticeDim table[3];
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 3; ++dim) {
    table[dim] = lattice(problem, dim);
    std::set<int> distinct;
    for (const auto& taps : table[dim].phases)
      for (const Tap& tap : taps) distinct.insert(tap.shift);
    g.offset[dim].assign(distinct.begin(), distinct.end());
    g.lattice[dim] = ceil_div(output[dim], problem.stride[dim]);
  }
  // Contiguous: width phases of a channel side by side; channels_last: channels of a phase.
  const bool last = problem.layout == Layout::channels_last;
  for (int outer = 0; outer < (last ? 1 : static_cast<int>(co)); ++outer)
    for (int r_0 = 0; r_0 < problem.stride[0]; ++r_0)
      for (int r_1 = 0; r_1 < problem.stride[1]; ++r_1)
        for (int r_2 = 0; r_2 < problem.stride[2]; ++r_2)
          for (int inner = 0; inner < (last ? static_cast<int>(co) : 1); ++inner)
            g.columns.push_back({outer + inner, {r_0, r_1, r_2}});
  const auto tap_of = [&](int dim, int phase, int shift) {
    for (const Tap& tap : table[dim].phases[static_cast<std::size_t>(phase)])
      if (tap.shift == shift) return tap.tap;
    return -1;
  };
  for (const int s_0 : g.offset[0])
    for (const int s_1 : g.offset[1])
      for (const int s_2 : g.offset[2]) {
        std::vector<int> taps;
        bool any = false;
        for (const Column& column : g.columns) {
          const int t_0 = tap_of(0, column.phase[0], s_0), t_1 = tap_of(1, column.phase[1], s_1),
                    t_2 = tap_of(2, column.phase[2], s_2);
          const bool exists = t_0 >= 0 && t_1 >= 0 && t_2 >= 0;
          taps.push_back(exists ? static_cast<int>((t_0 * problem.kernel[1] + t_1) * problem.kernel[2] + t_2) : -1);
          any = any || exists;
        }
        if (!any) continue;
        g.shifts.push_back({s_0, s_1, s_2});
        g.tap.push_back(std::move(taps));
      }
  if (static_cast<int64_t>(g.shifts.size()) > kMaxShifts) {
    return refuse(std::to_string(g.shifts.size()) + " shifts, at most " + std::to_string(kMaxShifts));
  }
  if (g.shifts.empty()) return refuse("no taps");
  return g;
}

// Which blocks of 8 columns have a tap at a shift.
int mask_of(const std::vector<int>& taps) {
  int mask = 0;
  for (std::size_t column = 0; column < taps.size(); ++column)
    if (taps[column] >= 0) mask |= 1 << column / 8;
  return mask;
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config, const Geometry& layer) {
  Geometry g = layer;
  if (!g.refusal.empty()) return g;
  const auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  g.lines = config.block_m / 16 / kWarps;
  const int columns = static_cast<int>(g.columns.size()), column_tiles = config.block_n / 8;
  if (columns > config.block_n)
    return refuse(std::to_string(columns) + " columns, block_n is " + std::to_string(config.block_n));
  if (config.block_n > 8 && config.block_n / 2 >= columns) return refuse("block_n is over twice the columns");
  if (config.block_k > 8 && config.block_k / 2 >= g.words) return refuse("block_k is over twice the channels");
  g.chunks = static_cast<int>(ceil_div(g.words, config.block_k));
  const std::size_t weight_bytes = g.shifts.size() * static_cast<std::size_t>(g.chunks * config.block_k / 8) *
                                   static_cast<std::size_t>(column_tiles * 32 * 2 * g.parts) * 4;
  if (weight_bytes > static_cast<std::size_t>(kMaxWeightBytes)) {
    return refuse(std::to_string(weight_bytes) + " bytes of weights, at most " + std::to_string(kMaxWeightBytes));
  }
  const int steps[3] = {1, 1, 1};
  g.tile = row_tile(problem, device, config.block_m, g.lattice, steps, g.offset, config.block_k, 8, weight_bytes);
  if (g.tile.tile[2] == 0) return refuse("no tile fits shared memory");
  g.shared_bytes = weight_bytes + g.tile.bytes;
  for (const auto& taps : g.tap) {
    const int mask = mask_of(taps);
    for (int ni = 0; ni < column_tiles; ++ni) g.used += mask >> ni & 1;
  }
  g.registers = g.lines * column_tiles * 4 + 4 * g.lines * g.parts + g.lines + 80 + (g.parts == 2 ? 12 : 0);
  if (g.registers > 255) return refuse(std::to_string(g.registers) + " registers a thread");
  g.blocks_per_multiprocessor = resident_blocks(device, kThreads, g.registers, g.shared_bytes);
  const int64_t resident = int64_t{g.blocks_per_multiprocessor} * std::max(device.multiprocessors, 1);
  g.shares =
      static_cast<int>(std::clamp<int64_t>(resident / problem.groups, 1, std::max<int64_t>(1, g.tile.num_tiles)));
  if (problem.groups * g.shares > INT32_MAX) return refuse("more than 2^31 blocks");
  return g;
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  const Geometry& layer = of_last_problem(problem, layer_geometry);
  if (problem.batch * volume(problem.input) == 0) {
    fit.refusal = "empty input";
    return fit;
  }
  const Geometry g = geometry(problem, device, config, layer);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  // Cycles of one multiprocessor for a tile, as in fold_gemm_sm80.cpp.
  const double clock =
      device.tf32_tflops > 0 ? device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors : 1.5e9;
  const bool last = problem.layout == Layout::channels_last;
  const double load_slots = g.per_word == 1 || (last && g.k % 2 == 0) ? 5.0 : 10.0;
  const double steps = static_cast<double>(kWarps * g.chunks * config.block_k / 8), lines = g.lines;
  const double shifts = static_cast<double>(g.shifts.size()), used = g.used;
  const double accesses = steps * (shifts * 4.0 * lines + used * 2.0 * g.parts);
  const double products = steps * used * lines * (g.parts == 2 ? 3.0 : 1.0) * 1.7;
  const double issue =
      steps *
      (shifts * lines * (g.per_word == 1 ? 9.0 : 5.0) * g.parts + used * (5.0 + lines * (g.parts == 2 ? 7.0 : 1.0))) /
      4.0;
  double math = 0;
  for (const Op& op : epilogue.ops)
    math += is_norm(op.kind) ? 0 : op.kind == OpKind::gelu || op.kind == OpKind::mish ? 30 : 8;
  const double results = static_cast<double>(config.block_m) * static_cast<double>(g.columns.size());
  const double store = results / 32.0 * (4.0 + math / 4.0);
  const double tile = std::max({accesses, products, issue}) + 0.3 * std::min(accesses, products) +
                      g.chunks * g.tile.copies * load_slots / 4.0 + store;
  const double resident = g.blocks_per_multiprocessor;
  const double latency = resident * kWarps >= 12 ? 1.0 : 1.0 + (12.0 - resident * kWarps) / 12.0;
  const double rounds = std::max(
      static_cast<double>(g.tile.num_tiles) * static_cast<double>(problem.groups) / device.multiprocessors, 1.0);
  const double compute = 1.7 * rounds * tile * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.8) * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.3 * std::min(compute, traffic) + 10.0;
  const int norm = norm_index(epilogue);
  fit.fused_ops = norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.device, config, layer_geometry(problem));
  std::ostringstream text;
  text << layer_prelude(step);
  const auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  std::vector<int> word, mask, tap;
  for (std::size_t shift = 0; shift < g.shifts.size(); ++shift) {
    const auto index = [&](std::size_t dim) {
      const auto& all = g.offset[dim];
      return static_cast<std::size_t>(std::find(all.begin(), all.end(), g.shifts[shift][dim]) - all.begin());
    };
    word.push_back(g.tile.word(index(0), index(1), g.shifts[shift][2]));
    mask.push_back(mask_of(g.tap[shift]));
    tap.insert(tap.end(), g.tap[shift].begin(), g.tap[shift].end());
  }
  std::string columns;
  for (const Column& column : g.columns) {
    columns += "{" + std::to_string(column.channel) + "," + std::to_string(column.phase[0]) + "," +
               std::to_string(column.phase[1]) + "," + std::to_string(column.phase[2]) + "},";
  }
  const bool last = problem.layout == Layout::channels_last;
  const int64_t side_by_side = last ? problem.out_channels / problem.groups : problem.stride[2];
  text << row_tile_text(g.tile, g.k, config.block_k, kWarps);
  define("MG_PARTS", g.parts);
  define("MG_CHUNKS", g.chunks);
  define("MG_SHIFTS", g.shifts.size());
  define("MG_COLUMNS", g.columns.size());
  define("MG_SHIFT_WORD", list(word));
  define("MG_SHIFT_MASK", list(mask));
  define("MG_TAP", list(tap));
  define("MG_COLUMN", columns);
  define("MG_PAIRS", side_by_side % 2 == 0 ? 1 : 0);
  define("MG_MT", g.lines);
  define("MG_NT", config.block_n / 8);
  define("MG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  return {{"merge_gemm_sm80.cu", "merge_gemm", text.str(), kThreads, g.shared_bytes}};
}

void prepare_launch(Step& step) {
  prepare_with(step, geometry(step.problem, step.device, step.config, layer_geometry(step.problem)));
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  if (g.tile.num_tiles == 0) return;
  struct {
    const void* input;
    const void* weight;
    const void* bias;
    void* output;
    long long input_plane, output_plane;
    int input_size[3], output_size[3], tiles[3];
    int shares, wide, weight_last, pairs;
    long long num_tiles;
    const void* operands[kMaxOperands];
  } args{};
  const Dims output = output_size(problem);
  args.input = tensors.input;
  args.weight = tensors.weight;
  args.bias = tensors.bias;
  args.output = tensors.output;
  args.input_plane = volume(problem.input);
  args.output_plane = volume(output);
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.output_size[dim] = static_cast<int>(output[dim]);
    args.tiles[dim] = static_cast<int>(g.tile.tiles[dim]);
  }
  args.shares = g.shares;
  args.weight_last = tensors.weight_channels_last;
  args.wide = reinterpret_cast<std::uintptr_t>(args.input) % 4 == 0;
  const std::size_t pair = 2 * size_of(step.epilogue.output_dtype.value_or(problem.dtype));
  const int64_t side_by_side =
      problem.layout == Layout::channels_last ? problem.out_channels / problem.groups : problem.stride[2];
  const int64_t row = problem.layout == Layout::channels_last ? 2 : output[2];
  args.pairs = reinterpret_cast<std::uintptr_t>(args.output) % pair == 0 && side_by_side % 2 == 0 && row % 2 == 0;
  args.num_tiles = g.tile.num_tiles;
  for (int i = 0; i < kMaxOperands; ++i) args.operands[i] = tensors.operands[i];
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(problem.groups * g.shares)}, stream, pointers);
}

}  // namespace

extern const Kernel merge_gemm_sm80;
const Kernel merge_gemm_sm80{"merge_gemm_sm80", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
