// fold_gemm_sm80 — host side: tile geometry, price, specialisation and launch of fold_gemm_sm80.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <sstream>

#include "driver.h"
#include "row_tile.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// block_m positions, block_n result channels, block_k the tile's width. Of tiles that stage about as much, one may take a
// quarter less time than another (0.36 and 0.47 ms for 32 channels in 4 groups, 3x3x3 taps, f16 channels_last on an H100);
// the price does not know which.
#define WIDTHS(m, n) {m, n, 16, 0, kWarps, 0}, {m, n, 32, 0, kWarps, 0}, {m, n, 64, 0, kWarps, 0}
constexpr Config kConfigs[] = {WIDTHS(512, 8),  WIDTHS(256, 8),  WIDTHS(128, 8),  WIDTHS(512, 16), WIDTHS(256, 16),
                               WIDTHS(128, 16), WIDTHS(256, 32), WIDTHS(128, 32), WIDTHS(256, 64), WIDTHS(128, 64)};
#undef WIDTHS

constexpr int64_t kMaxSteps = 512;              // tables in constant memory
constexpr int64_t kMaxWeightBytes = 96 * 1024;  // beside a tile

struct Geometry {
  std::string refusal;
  int k = 0, n = 0, per_word = 1, words = 1, parts = 1;  // channels of a group: summed over, of the result
  int steps = 0;                                         // of 8 words of k
  std::vector<int> offset[3];                            // per dimension: where each tap reads
  RowTile tile;
  int n_blocks = 1, lines = 1;
  int shares = 1, registers = 0, blocks_per_multiprocessor = 1;
  std::size_t shared_bytes = 0;
};

// What depends on the layer alone.
Geometry layer_geometry(const Problem& problem) {
  Geometry g;
  const auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_input) {
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_input");
  }
  if (problem.dtype == DType::f64) return refuse("f64 has no mma.sync of this shape");
  if (problem.groups == 0) return refuse("no channels");
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  if (ci == 0 || co == 0) return refuse("no channels");
  g.per_word = size_of(problem.dtype) == 2 ? 2 : 1;
  g.parts = problem.dtype == DType::f32 && problem.precision == Precision::fp32 ? 2 : 1;
  const int64_t words = ceil_div(co, g.per_word), taps = volume(problem.kernel);
  if (words * taps > 8 * kMaxSteps || words > 64) {
    return refuse(std::to_string(words) + " words of channels times " + std::to_string(taps) + " taps, at most " +
                  std::to_string(8 * kMaxSteps) + " and 64 words");
  }
  for (int dim = 0; dim < 3; ++dim) {
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 64) {
      return refuse("stride or extent of the kernel too large for the tables");
    }
  }
  g.k = static_cast<int>(co);
  g.n = static_cast<int>(ci);
  g.words = static_cast<int>(words);
  g.steps = static_cast<int>(ceil_div(words * taps, 8));
  for (int dim = 0; dim < 3; ++dim) {
    for (int t = 0; t < problem.kernel[dim]; ++t)
      g.offset[dim].push_back(static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]));
  }
  return g;
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config, const Geometry& layer) {
  Geometry g = layer;
  if (!g.refusal.empty()) return g;
  const auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  g.lines = config.block_m / 16 / kWarps;
  const int column_tiles = config.block_n / 8;
  if (config.block_n > 8 && config.block_n / 2 >= g.n) return refuse("block_n is over twice the channels");
  g.n_blocks = static_cast<int>(ceil_div(g.n, config.block_n));
  const std::size_t weight_bytes = static_cast<std::size_t>(g.steps) * (column_tiles * 32 * 2 * g.parts + 8) * 4;
  if (weight_bytes > kMaxWeightBytes) {
    return refuse(std::to_string(weight_bytes) + " bytes of weights, at most " + std::to_string(kMaxWeightBytes));
  }
  const int steps[3] = {static_cast<int>(problem.stride[0]), static_cast<int>(problem.stride[1]),
                        static_cast<int>(problem.stride[2])};
  const int64_t lattice[3] = {problem.input[0], problem.input[1], problem.input[2]};
  // channels_last: lanes run over the words of a position, so planes start in different banks.
  const int residue = problem.layout == Layout::channels_last && g.words > 1 ? (g.words >= 4 ? 8 : 16) : 0;
  g.tile = row_tile(problem, device, config.block_m, lattice, steps, g.offset, g.words, residue, weight_bytes,
                    config.block_k);
  if (g.tile.tile[2] == 0) return refuse("no tile fits shared memory");
  g.shared_bytes = weight_bytes + g.tile.bytes;
  g.registers =
      g.lines * column_tiles * 4 + column_tiles * 2 * g.parts + g.lines + 4 * g.parts + 56 + (g.parts == 2 ? 12 : 0);
  if (g.registers > 255) return refuse(std::to_string(g.registers) + " registers a thread");
  g.blocks_per_multiprocessor = resident_blocks(device, kThreads, g.registers, g.shared_bytes);
  const int64_t others = problem.groups * g.n_blocks;
  const int64_t resident = int64_t{g.blocks_per_multiprocessor} * std::max(device.multiprocessors, 1);
  g.shares = static_cast<int>(std::clamp<int64_t>(resident / others, 1, std::max<int64_t>(1, g.tile.num_tiles)));
  if (others * g.shares > INT32_MAX) return refuse("more than 2^31 blocks");
  return g;
}

Fit fit(const Problem& problem, const Epilogue&, const Device& device, const Config& config) {
  Fit fit;
  const Geometry& layer = of_last_problem(problem, layer_geometry);
  const Geometry g = geometry(problem, device, config, layer);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  // Cycles of one multiprocessor for a tile. Fragments and staged words come at one access of 128 bytes a cycle; a
  // mma.sync of 1024 word products takes 1.7 (phase_gemm_sm80.cpp).
  const double clock =
      device.tf32_tflops > 0 ? device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors : 1.5e9;
  const int column_tiles = config.block_n / 8;
  const bool last = problem.layout == Layout::channels_last;
  const double load_slots = g.per_word == 1 || (last && g.k % 2 == 0) ? 5.0 : 10.0;
  const double steps = static_cast<double>(kWarps) * g.steps, lines = g.lines;
  const double accesses = steps * (2.0 + 4.0 * lines + 2.0 * column_tiles * g.parts);
  const double products = steps * lines * column_tiles * (g.parts == 2 ? 3.0 : 1.0) * 1.7;
  const double issue = steps *
                       (8.0 + column_tiles +
                        lines * ((g.per_word == 1 ? 9.0 : 5.0) * g.parts + column_tiles * (g.parts == 2 ? 7.0 : 1.0))) /
                       4.0;
  const double store = static_cast<double>(config.block_m) * config.block_n / 32.0 * 3.5;
  const double tile = std::max({accesses, products, issue}) + 0.3 * std::min(accesses, products) +
                      g.tile.copies * load_slots / 4.0 + store;
  const double resident = g.blocks_per_multiprocessor;
  const double latency = resident * kWarps >= 12 ? 1.0 : 1.0 + (12.0 - resident * kWarps) / 12.0;
  const double all = static_cast<double>(g.tile.num_tiles) * static_cast<double>(problem.groups) * g.n_blocks;
  const double rounds = std::max(all / device.multiprocessors, 1.0);
  const double compute = 1.7 * rounds * tile * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.8) * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.3 * std::min(compute, traffic) + 10.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.device, config, layer_geometry(problem));
  std::ostringstream text;
  text << layer_prelude(step);
  const auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  std::vector<int> offset, tap, channel;
  for (int word = 0; word < g.words; ++word) {
    int index = 0;
    for (std::size_t t_0 = 0; t_0 < g.offset[0].size(); ++t_0) {
      for (std::size_t t_1 = 0; t_1 < g.offset[1].size(); ++t_1) {
        for (const int column : g.offset[2]) {
          offset.push_back(word * g.tile.plane + g.tile.word(t_0, t_1, column));
          tap.push_back(index++);
          channel.push_back(word);
        }
      }
    }
  }
  while (offset.size() % 8) {
    offset.push_back(offset[0]);
    tap.push_back(-1);
    channel.push_back(0);
  }
  text << row_tile_text(g.tile, g.k, g.words, kWarps);
  define("FG_PARTS", g.parts);
  define("FG_STEPS", g.steps);
  define("FG_WORD_OFFSET", list(offset));
  define("FG_WORD_TAP", list(tap));
  define("FG_WORD_CHANNEL", list(channel));
  define("FG_MT", g.lines);
  define("FG_NT", config.block_n / 8);
  define("FG_NBLOCKS", g.n_blocks);
  define("FG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  return {{"fold_gemm_sm80.cu", "fold_gemm", text.str(), kThreads, g.shared_bytes}};
}

void prepare_launch(Step& step) {
  prepare_with(step, geometry(step.problem, step.device, step.config, layer_geometry(step.problem)));
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  if (g.tile.num_tiles == 0) return;
  struct {
    const void* grad_output;
    const void* weight;
    void* grad_input;
    long long grad_plane, input_plane;
    int grad_size[3], input_size[3], tiles[3];
    int shares, wide, weight_last, pairs;
    long long num_tiles;
  } args{};
  const Dims output = output_size(problem);
  args.grad_output = tensors.grad_output;
  args.weight = tensors.weight;
  args.grad_input = tensors.output;
  args.grad_plane = volume(output);
  args.input_plane = volume(problem.input);
  for (int dim = 0; dim < 3; ++dim) {
    args.grad_size[dim] = static_cast<int>(output[dim]);
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.tiles[dim] = static_cast<int>(g.tile.tiles[dim]);
  }
  args.shares = g.shares;
  args.weight_last = tensors.weight_channels_last;
  args.wide = reinterpret_cast<std::uintptr_t>(args.grad_output) % 4 == 0;
  args.pairs = reinterpret_cast<std::uintptr_t>(args.grad_input) % (2 * size_of(problem.dtype)) == 0 &&
               (problem.layout == Layout::channels_last || problem.input[2] % 2 == 0);
  args.num_tiles = g.tile.num_tiles;
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(problem.groups * g.n_blocks * g.shares)}, stream, pointers);
}

}  // namespace

extern const Kernel fold_gemm_sm80;
const Kernel fold_gemm_sm80{"fold_gemm_sm80", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
