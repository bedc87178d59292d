// tap_gemm_half_grad_weight_sm90.cpp — host side: blocks, tiles, price, specialisation and launch of the kernel of that
// name.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "tap_tiling.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// split = 0: block_m input channels are the rows (64 a warpgroup), block_n output channels the columns, and warpgroups
// that share rows divide the taps. split > 0: block_m output channels times split taps are the rows, block_n input
// channels the columns. At most block_k positions a tile; warps are those that multiply, four more fill the stages.
#define COLUMNS(m, warps, split)                                                                \
  {m, 8, 256, 2, warps, split}, {m, 16, 256, 2, warps, split}, {m, 32, 256, 2, warps, split}, { \
    m, 64, 256, 2, warps, split                                                                 \
  }
constexpr Config kConfigs[] = {COLUMNS(64, 12, 0), {64, 48, 256, 2, 12, 0}, {64, 128, 256, 2, 12, 0},
                               COLUMNS(64, 8, 0),  COLUMNS(128, 8, 0),      {128, 128, 256, 2, 8, 0},
                               COLUMNS(64, 12, 1), COLUMNS(32, 12, 2),      COLUMNS(16, 12, 4),
                               COLUMNS(8, 12, 8),  {8, 8, 256, 2, 8, 8}};
#undef COLUMNS

constexpr int kMaxTaps = 4096;  // tables in constant memory
// Positions that the tensor core sums before they move to memory: truncation is 3e-5 at worst, a sixteenth of the
// rounding of a float16 result. At 2048 the traffic of the partial sums of 9 taps of 64 x 64 channels is 40 % of the
// staged bytes.
constexpr int kFlush = 8192;

struct Geometry : TapSlices {
  std::string refusal;
  int warpgroups = 1, row_blocks = 1, tap_parts = 1, sets = 1;
  int blocks_m = 1, blocks_n = 1, shares = 1;
  int input_groups = 1, grad_groups = 1;  // of 8 staged channels
  int tile[3] = {0, 0, 0};
  int64_t tiles[3] = {1, 1, 1}, num_tiles = 0;
  Rows rows[2];
  std::vector<int> residues, plane_of, column_word;  // planes of grad_output columns, by residue modulo the stride
  int window_first = 0, length = 0;                  // of a plane, in strides
  int input_pitch = 0, grad_pitch = 0;
  std::size_t shared_bytes = 0;
  double tile_cycles = 0;
  int64_t blocks = 0;
};

int pitch_of(int64_t positions) { return static_cast<int>(ceil_div(positions - 1, 8) * 8 + 1); }

// Planes of a row of grad_output: all start at the same multiple of the stride, an even column.
void set_window(Geometry& g, int stride) {
  const std::vector<int>& offsets = g.offset[2];
  g.residues.clear();
  g.plane_of.assign(stride, -1);
  int low = std::numeric_limits<int>::max(), high = std::numeric_limits<int>::min();
  for (int o : offsets) {
    const int q = floor_div(o, stride), residue = o - q * stride;
    if (g.plane_of[residue] < 0) {
      g.plane_of[residue] = static_cast<int>(g.residues.size());
      g.residues.push_back(residue);
    }
    low = std::min(low, q);
    high = std::max(high, q);
  }
  if (stride % 2 != 0) low = floor_div(low, 2) * 2;
  g.window_first = low;
  g.length = high - low;  // what a plane has beyond the tile; the caller adds the tile
}

// Clock cycles of one tile. Filling alone reaches about 11 bytes a cycle on an H100, and half of the products' time
// shows, because a team of warps waits for its stage: 0.466 ms (0.376 channels_last) for 3x3 taps of 64 x 64 channels
// at 2^21 positions, where the products alone take 0.188.
double cycles_of(const Problem& problem, const Config& config, const Geometry& g, int64_t positions, int64_t grad_units,
                 int64_t grad_columns, int64_t input_rows, int64_t grad_rows, std::size_t shared) {
  const double steps = static_cast<double>(positions) / 16, columns = config.block_n;
  const double units = static_cast<double>(g.input_groups * positions + g.grad_groups * grad_units);
  const double products = steps * g.warpgroups * g.sets * std::max(columns / 2, 12.0) / 0.9;
  const double operands =
      steps * g.warpgroups * (config.split == 0 ? 16 + g.sets * columns / 4 : g.sets * (16 + columns / 4));
  const double multiply = std::max(products, operands + units / 4);
  double fill;
  if (problem.layout == Layout::channels_last) {
    const bool whole = problem.in_channels / problem.groups % 8 == 0 && problem.out_channels / problem.groups % 8 == 0;
    fill = units * 16 / (whole ? 11.0 : 3.0) + 30.0 * static_cast<double>(input_rows + grad_rows);
  } else {  // windows of rows begin anywhere in a line
    fill = 16.0 / 11 *
           (g.input_groups * static_cast<double>(positions + 8 * input_rows) +
            g.grad_groups * static_cast<double>(grad_columns + 24 * grad_rows));
  }
  // L1 has little room left for lines on their way; channels_last goes past it.
  if (problem.layout == Layout::contiguous && shared > (std::size_t{164} << 10)) fill *= 1.15;
  return std::max(multiply, fill + 0.5 * multiply) + 300;
}

void choose_tile(const Problem& problem, const Device& device, const Config& config, Geometry& g) {
  const int stride = static_cast<int>(problem.stride[2]);
  set_window(g, stride);
  const std::vector<int> staged_d = g.staged(0), staged_h = g.staged(1);
  const int overhang = g.length;
  double best = std::numeric_limits<double>::max();
  Geometry chosen = g;
  for (int tw = 16; tw <= config.block_k; tw *= 2)
    for (int th = 1; th * tw <= config.block_k; th *= 2)
      for (int td = 1; td * th * tw <= config.block_k; td *= 2) {
        if (td * th * tw % 32 != 0) continue;
        if (problem.stride[0] * (td - 1) > 4096 || problem.stride[1] * (th - 1) > 4096) continue;
        const Rows rows_d = rows_of(td, static_cast<int>(problem.stride[0]), staged_d);
        const Rows rows_h = rows_of(th, static_cast<int>(problem.stride[1]), staged_h);
        int length = tw + overhang;
        if (stride % 2 != 0) length = (length + 1) / 2 * 2;
        const int64_t rows = static_cast<int64_t>(rows_d.relative.size() * rows_h.relative.size());
        const int64_t grad_units = rows * static_cast<int64_t>(g.residues.size()) * length;
        if (grad_units > 16000) continue;  // the descriptor's offset has 14 bits
        const int64_t positions = int64_t{td} * th * tw;
        const int input_pitch = pitch_of(positions), grad_pitch = pitch_of(grad_units);
        const int64_t stage_units =
            ceil_div(ceil_div(int64_t{g.input_groups} * input_pitch, 8) * 8 + int64_t{g.grad_groups} * grad_pitch, 8) *
            8;
        // The barriers of a stage take 16 bytes behind the stages.
        const std::size_t shared = static_cast<std::size_t>(stage_units + 1) * 16 * config.stages;
        if (shared > device.shared_memory_per_block) continue;
        const double cycles = cycles_of(problem, config, g, positions, grad_units, rows * stride * length,
                                        int64_t{td} * th, rows, shared);
        const int64_t tiles =
            ceil_div(problem.input[0], td) * ceil_div(problem.input[1], th) * ceil_div(problem.input[2], tw);
        const double cost = static_cast<double>(tiles) * cycles;
        if (cost >= best) continue;
        best = cost;
        chosen.tile[0] = td, chosen.tile[1] = th, chosen.tile[2] = tw;
        chosen.rows[0] = rows_d, chosen.rows[1] = rows_h;
        chosen.length = length;
        chosen.input_pitch = input_pitch, chosen.grad_pitch = grad_pitch;
        chosen.shared_bytes = shared;
        chosen.tile_cycles = cycles;
      }
  g = chosen;
  if (g.tile[2] == 0) return;
  for (int o : g.offset[2]) {
    const int q = floor_div(o, stride);
    g.column_word.push_back(g.plane_of[o - q * stride] * g.length + q - g.window_first);
  }
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = ceil_div(problem.input[dim], g.tile[dim]);
  g.num_tiles = g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch;
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config) {
  Geometry g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_weight");
  if (size_of(problem.dtype) != 2) return refuse(std::string(to_string(problem.dtype)) + " is not a 16-bit type");
  const int64_t ci = problem.in_channels / std::max<int64_t>(1, problem.groups);
  const int64_t co = problem.out_channels / std::max<int64_t>(1, problem.groups);
  if (ci == 0 || co == 0) return refuse("no channels");
  if (ci * co < 8) return refuse(std::to_string(ci * co) + " products a position and tap");
  if (problem.groups > 1 && std::min(ci, co) < 8)
    return refuse("groups of " + std::to_string(std::min(ci, co)) + " channels: units hold 8");
  if (volume(problem.kernel) > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " taps");
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 1024)
      return refuse("stride or kernel extent too large for the tables");
  const bool input_rows = config.split == 0;
  const int64_t of_rows = input_rows ? ci : co, of_columns = input_rows ? co : ci;
  if (config.block_m > (input_rows ? 64 : 8) && config.block_m / 2 >= of_rows)
    return refuse("block_m is over twice the channels");
  if (config.block_n > 8 && config.block_n / 2 >= of_columns) return refuse("block_n is over twice the channels");
  g.warpgroups = config.warps / 4;
  g.row_blocks = input_rows ? config.block_m / 64 : 1;
  g.tap_parts = g.warpgroups / g.row_blocks;
  g.blocks_m = static_cast<int>(ceil_div(of_rows, config.block_m));
  g.blocks_n = static_cast<int>(ceil_div(of_columns, config.block_n));
  const int row_groups = static_cast<int>(std::min<int64_t>(config.block_m / 8, ceil_div(of_rows, 8)));
  g.input_groups = input_rows ? row_groups : config.block_n / 8;
  g.grad_groups = input_rows ? config.block_n / 8 : row_groups;
  // Registers for sums and, per set, offsets and two sets of rows, beside about 28 of 128 or 50 of 192.
  const int registers = g.warpgroups == 3 ? 100 : 140, per_set = config.block_n / 2 + (input_rows ? 1 : 9);
  const int most = std::min(registers / per_set, 12), multiple = g.tap_parts * std::max(1, config.split);
  if (most == 0) return refuse("sums do not fit registers");
  static_cast<TapSlices&>(g) = tap_slices(problem, most * multiple, multiple);
  g.sets = g.taps / multiple;
  choose_tile(problem, device, config, g);
  if (g.tile[2] == 0) return refuse("no tile fits shared memory");
  const int64_t others = problem.groups * g.blocks_m * g.blocks_n * g.slices;
  g.shares = shares_of(others, g.num_tiles, device.multiprocessors);
  g.blocks = others * g.shares;
  return g;
}

int64_t block_floats(const Config& config, const Geometry& g) {
  return int64_t{g.warpgroups} * g.sets * 64 * config.block_n;
}

std::size_t partial_floats(const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(g.blocks * block_floats(config, g));
}

Fit fit(const Problem& problem, const Epilogue&, const Device& device, const Config& config) {
  Fit fit;
  if (device.backend != Backend::cuda || device.compute_capability != 90) {
    fit.refusal = "needs compute capability 9.0 (wgmma)";
    return fit;
  }
  const Geometry g = geometry(problem, device, config);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  if (g.blocks >= (int64_t{1} << 31)) {
    fit.refusal = "more than 2^31 blocks";
    return fit;
  }
  fit.workspace_bytes = 4 * (partial_floats(config, g) + bias_floats(problem));
  if (fit.workspace_bytes > (std::size_t{1} << 30)) {
    fit.refusal = std::to_string(fit.workspace_bytes >> 20) + " MiB of partial sums";
    return fit;
  }
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double rounds = std::ceil(static_cast<double>(g.blocks) / device.multiprocessors);
  const double tiles_per_share = static_cast<double>(ceil_div(g.num_tiles, g.shares));
  // The first tile of a block waits for memory alone; the last for the partial sums.
  const double compute = rounds * (tiles_per_share * g.tile_cycles + 5000.0) / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6;
  const double partial =
      2.0 * 4.0 * static_cast<double>(partial_floats(config, g)) / (device.bandwidth_tbs * 1e12) * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.3 * std::min(compute, traffic) + partial + 6.0;
  return fit;
}

// What one block needs: the warps that fill read through L1, which with all of it shared has room for 200 lines on
// their way.
int shared_percent(const Device& device, const Geometry& g) {
  const std::size_t all = device.shared_memory_per_multiprocessor;
  return static_cast<int>(std::min<std::size_t>(100, ((g.shared_bytes + 1024) * 100 + all - 1) / all));
}

std::vector<Unit> units(const Step& step) {
  const Config& config = step.config;
  const Geometry g = geometry(step.problem, step.device, config);
  const std::string layer = layer_prelude(step);
  std::ostringstream text;
  text << layer;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TAPS", g.taps);
  define("TG_SLICES", g.slices);
  define("TG_INPUT_ROWS", config.split == 0 ? 1 : 0);
  define("TG_CHANNELS", config.split == 0 ? 64 : config.block_m);
  define("TG_BM", config.block_m);
  define("TG_BN", config.block_n);
  define("TG_BLOCKS_M", g.blocks_m);
  define("TG_BLOCKS_N", g.blocks_n);
  define("TG_WARPGROUP", 1);
  define("TG_BLOCK_FLOATS", block_floats(config, g));
  define("TG_SLICE_TAP", list(g.slice_tap));
  const std::string finish = text.str();
  define("TG_N", config.block_n);
  define("TG_WARPGROUPS", g.warpgroups);
  define("TG_TAP_PARTS", g.tap_parts);
  define("TG_SETS", g.sets);
  define("TG_STAGES", config.stages);
  define("TG_TAKE", 8);
  define("TG_LANES(groups)", "((groups) >= 8 ? 8 : (groups) > 2 ? (groups) > 4 ? 8 : 4 : (groups))");
  define("TG_FLUSH", std::max(1, kFlush / (g.tile[0] * g.tile[1] * g.tile[2])));
  define("TG_TD", g.tile[0]);
  define("TG_TH", g.tile[1]);
  define("TG_TW", g.tile[2]);
  define("TG_ND", g.rows[0].relative.size());
  define("TG_NH", g.rows[1].relative.size());
  define("TG_STEP_D", g.rows[0].step);
  define("TG_STEP_H", g.rows[1].step);
  define("TG_PLANES", g.residues.size());
  define("TG_LENGTH", g.length);
  define("TG_WINDOW_FIRST", '(' + std::to_string(g.window_first) + ')');
  define("TG_INPUT_GROUPS", g.input_groups);
  define("TG_INPUT_PITCH", g.input_pitch);
  define("TG_GRAD_GROUPS", g.grad_groups);
  define("TG_GRAD_PITCH", g.grad_pitch);
  define("TG_ROWS_D", list(g.rows[0].relative));
  define("TG_ROWS_H", list(g.rows[1].relative));
  define("TG_RESIDUE0", g.residues[0]);
  define("TG_RESIDUES", list(g.residues));
  define("TG_PLANE_OF", list(g.plane_of));
  define("TG_SLICE_OFFSET", list(g.slice_offset));
  const int row_units = static_cast<int>(g.residues.size()) * g.length;
  define("TG_TAP_WORD", list(g.tap_words(g.rows[0], g.rows[1], g.column_word, row_units)));
  text << product_text(step.problem.dtype, config.block_n, true);
  return {{"tap_gemm_half_grad_weight_sm90.cu", "tap_gemm_half_grad_weight", text.str(), 128 * (g.warpgroups + 1),
           g.shared_bytes, shared_percent(step.device, g)},
          {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
          {"channel_sum.cu", "channel_sum", layer, 256, 0},
          {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  const Dims output = output_size(problem);
  struct {
    const void* input;
    const void* grad_output;
    void* partial;
    int input_size[3], grad_size[3], tiles[3];
    int shares;
    long long num_tiles;
    int input_wide, grad_wide;
  } args{};
  args.input = tensors.input;
  args.grad_output = tensors.grad_output;
  args.partial = tensors.workspace;
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.grad_size[dim] = static_cast<int>(output[dim]);
    args.tiles[dim] = static_cast<int>(g.tiles[dim]);
  }
  args.shares = g.shares;
  args.num_tiles = g.num_tiles;
  auto wide = [&](const void* tensor, const Dims& size) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor);
    return problem.layout == Layout::channels_last ? address % 16 == 0 : address % 4 == 0 && size[2] % 2 == 0;
  };
  args.input_wide = wide(tensors.input, problem.input);
  args.grad_wide = wide(tensors.grad_output, output);
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(g.blocks)}, stream, pointers);
  launch_sums(step, tensors, stream, g.blocks / g.shares * block_floats(step.config, g), g.shares,
              partial_floats(step.config, g));
}

}  // namespace

extern const Kernel tap_gemm_half_grad_weight_sm90;
const Kernel tap_gemm_half_grad_weight_sm90{
    "tap_gemm_half_grad_weight_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
