// box_gemm_grad_weight_sm90.cpp — host side: pieces, tiles, copies, price, specialisation and launch of the kernel of that
// name.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <tuple>

#include "tap_tiling.h"
#include "tensor_map.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m rows (pieces of 64), at most block_n columns, block_k positions a tile for 16-bit types (half of them for
// fp32), at least two stages; warps are those that multiply, one more loads. split 1: the rows are taps and output
// channels, the columns input channels, instead of the other way round; 2: 16-bit channels_last from copies too, which
// fold the width taps into the channels; 3: both.
#define SPLITS(m, n, warps) \
  {m, n, 64, 2, warps, 0}, {m, n, 64, 2, warps, 1}, {m, n, 64, 2, warps, 2}, {m, n, 64, 2, warps, 3}
constexpr Config kConfigs[] = {SPLITS(64, 32, 4),    SPLITS(64, 64, 4),  SPLITS(64, 128, 4),  SPLITS(64, 256, 4),
                               SPLITS(128, 32, 8),   SPLITS(128, 64, 8), SPLITS(128, 128, 8), SPLITS(128, 256, 8),
                               SPLITS(192, 144, 12), SPLITS(256, 64, 8), SPLITS(256, 128, 8), SPLITS(256, 64, 16)};
#undef SPLITS

constexpr int kMaxOuter = 4096;  // a table in constant memory
// Positions that the tensor core sums before they move to memory, as in tap_gemm_half_grad_weight_sm90 (16 bits) and
// ring_gemm_grad_weight_sm90 (TF32).
constexpr int kFlush16 = 8192, kFlush32 = 2048;
constexpr std::size_t kMostPackedBytes = std::size_t{256} << 20;
constexpr std::size_t kPackShared = 72 << 10;  // three blocks a multiprocessor

struct Geometry {
  std::string refusal;
  bool packed = false, inner = false, input_rows = true;  // inner: positions innermost
  int warpgroups = 1, rows = 1, columns = 1, n = 64, line = 128;
  int fold = 1, outer = 1, tap_pieces = 1;  // width taps in the channels; other taps; pieces of each
  int blocks_m = 1, blocks_n = 1, shares = 1, stages = 2;
  int positions = 64, tile[4] = {1, 1, 1, 64}, tiles[3] = {1, 1, 1};  // tile: images, depth, height, width
  int classes = 1, class_pitch = 0, input_pitch = 0;
  int64_t extent[3] = {1, 1, 1}, length = 0;  // of the copies: depth, height, width; all positions
  std::vector<int> outer_table, class_table, fold_offset;
  int pack_tw = 64, low = 0, reach = 0, input_lot = 32, grad_lot = 32;  // of box_gemm_pack_sm90
  std::size_t pack_shared = 0;
  int64_t num_tiles = 0, blocks = 0;
  std::size_t shared_bytes = 0;
};

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The least waste, then the widest.
int best_piece(int64_t channels, std::initializer_list<int> widths) {
  int best = 0;
  for (int width : widths)
    if (best == 0 || round_up(channels, width) < round_up(channels, best)) best = width;
  return best;
}

// Tensors that the copy engine takes as they are.
bool direct_fits(const Problem& problem, std::string& why) {
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  if (problem.layout != Layout::channels_last || size_of(problem.dtype) != 2)
    why = "not a 16-bit channels_last tensor";
  else if (ci % 8 != 0 || co % 8 != 0)
    why = "channels are no multiple of 8";
  else if (*std::max_element(problem.stride.begin(), problem.stride.end()) > 8)
    why = "stride above 8";
  return why.empty();
}

// Of the tensors: which positions a tile has.
void choose_tile(const Problem& problem, Geometry& g) {
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int tw = 1; tw <= g.positions; tw *= 2)
    for (int th = 1; th * tw <= g.positions; th *= 2)
      for (int td = 1; td * th * tw <= g.positions; td *= 2) {
        const int tb = g.positions / (td * th * tw);
        if ((tw - 1) * problem.stride[2] >= 256 || (th - 1) * problem.stride[1] >= 256 ||
            (td - 1) * problem.stride[0] >= 256)
          continue;
        const int64_t tiles = ceil_div(problem.input[2], tw) * ceil_div(problem.input[1], th) *
                              ceil_div(problem.input[0], td) * ceil_div(problem.batch, tb);
        // Of equally many, those that lie closest together: wide, then high, then deep.
        if (tiles > best || (tiles == best && std::tuple(tw, th, td) <= std::tuple(g.tile[3], g.tile[2], g.tile[1])))
          continue;
        best = tiles;
        g.tile[0] = tb, g.tile[1] = td, g.tile[2] = th, g.tile[3] = tw;
      }
  g.num_tiles = best;
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = static_cast<int>(ceil_div(problem.input[dim], g.tile[1 + dim]));
  for (int d = 0; d < problem.kernel[0]; ++d)
    for (int h = 0; h < problem.kernel[1]; ++h)
      for (int w = 0; w < problem.kernel[2]; ++w) {
        const int at[3] = {d, h, w};
        for (int dim : {2, 1, 0})
          g.outer_table.push_back(static_cast<int>(problem.dilation[dim] * at[dim] - problem.padding[dim]));
      }
}

// A single channel lies as in a contiguous tensor.
bool has_channels_last(const Problem& problem, int64_t channels) {
  return problem.layout == Layout::channels_last && channels > 1;
}

// How box_gemm_pack_sm90 stages: positions of a row, and as many channels as fit.
void lay_out_packing(const Problem& problem, Geometry& g) {
  for (int tw = 64; tw >= 4; tw /= 2)
    if (round_up(g.extent[2], tw) < round_up(g.extent[2], g.pack_tw)) g.pack_tw = tw;
  g.low = *std::min_element(g.fold_offset.begin(), g.fold_offset.end());
  g.reach = *std::max_element(g.fold_offset.begin(), g.fold_offset.end()) - g.low;
  const int64_t bytes = static_cast<int64_t>(size_of(problem.dtype)), unit = 16 / bytes, rows = 64 / g.pack_tw;
  auto needed = [&](int64_t stride, int64_t reach, int lot, bool last) {
    int64_t columns = stride * (g.pack_tw - 1) + reach + 1;
    if (last) return rows * columns * (lot + 4 / bytes) * bytes;
    columns = round_up(columns + unit - 1, unit);
    return lot * (round_up(rows * columns, 16 / bytes) + 4 / bytes) * bytes;
  };
  auto choose = [&](int& lot, int64_t channels, int64_t stride, int64_t reach) {
    const bool last = has_channels_last(problem, channels);
    for (lot = 1; lot < 32 && lot < channels / problem.groups;) lot *= 2;
    while (lot > 8 && needed(stride, reach, lot, last) > static_cast<int64_t>(kPackShared)) lot /= 2;
    g.pack_shared = std::max(g.pack_shared, static_cast<std::size_t>(needed(stride, reach, lot, last)));
  };
  choose(g.input_lot, problem.in_channels, 1, 0);
  choose(g.grad_lot, problem.out_channels, problem.stride[2], g.reach);
}

// Of the copies: classes of rows and slabs, extents, and where a tap begins.
void lay_out_copies(const Problem& problem, Geometry& g) {
  std::vector<int> residue[2], quotient[2], residues[2];
  int low[2], high[2];
  for (int dim = 0; dim < 2; ++dim) {
    low[dim] = std::numeric_limits<int>::max(), high[dim] = std::numeric_limits<int>::min();
    for (int t = 0; t < problem.kernel[dim]; ++t) {
      const int offset = static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]);
      const int stride = static_cast<int>(problem.stride[dim]), q = floor_div(offset, stride);
      quotient[dim].push_back(q);
      residue[dim].push_back(offset - q * stride);
      if (std::find(residues[dim].begin(), residues[dim].end(), residue[dim].back()) == residues[dim].end())
        residues[dim].push_back(residue[dim].back());
      low[dim] = std::min(low[dim], q), high[dim] = std::max(high[dim], q);
    }
    g.extent[dim] = problem.input[dim] + high[dim] - low[dim];
  }
  g.extent[2] = round_up(problem.input[2], 4);
  g.length = problem.batch * g.extent[0] * g.extent[1] * g.extent[2];
  g.num_tiles = ceil_div(g.length, g.positions);
  g.classes = static_cast<int>(residues[0].size() * residues[1].size());
  const int64_t folded = problem.kernel[2] * (problem.out_channels / problem.groups);
  g.class_pitch = static_cast<int>(g.inner ? folded : round_up(folded, 8));
  const int64_t ci = problem.in_channels / problem.groups;
  g.input_pitch = static_cast<int>(g.inner ? ci : round_up(ci, 8));
  for (int d : residues[0])
    for (int h : residues[1]) {
      g.class_table.push_back(static_cast<int>(low[0] * problem.stride[0]) + d);
      g.class_table.push_back(static_cast<int>(low[1] * problem.stride[1]) + h);
    }
  for (int t = 0; t < problem.kernel[2]; ++t)
    g.fold_offset.push_back(static_cast<int>(problem.dilation[2] * t - problem.padding[2]));
  auto index_of = [&](int dim, int t) {
    return static_cast<int>(std::find(residues[dim].begin(), residues[dim].end(), residue[dim][t]) -
                            residues[dim].begin());
  };
  for (int d = 0; d < problem.kernel[0]; ++d)
    for (int h = 0; h < problem.kernel[1]; ++h) {
      const int kind = index_of(0, d) * static_cast<int>(residues[1].size()) + index_of(1, h);
      g.outer_table.push_back(kind * g.class_pitch);
      g.outer_table.push_back(
          static_cast<int>(((quotient[0][d] - low[0]) * g.extent[1] + quotient[1][h] - low[1]) * g.extent[2]));
    }
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config) {
  Geometry g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_weight");
  if (problem.dtype == DType::f64) return refuse("f64 is not a type of wgmma");
  if (problem.dtype == DType::f32 && problem.precision == Precision::fp32)
    return refuse("fp32 accuracy: wgmma truncates its sums");
  const int64_t ci = problem.in_channels / std::max<int64_t>(1, problem.groups);
  const int64_t co = problem.out_channels / std::max<int64_t>(1, problem.groups);
  if (ci == 0 || co == 0) return refuse("no channels");
  if (problem.batch * volume(problem.input) == 0) return refuse("empty input");
  if (volume(problem.kernel) > kMaxOuter) return refuse("more than " + std::to_string(kMaxOuter) + " taps");
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 1024 ||
        std::max(problem.input[dim] * problem.stride[dim], output[dim]) > (int64_t{1} << 30))
      return refuse("stride, kernel extent or size too large for 32-bit coordinates");
  if (problem.batch > (1 << 30)) return refuse("batch above 2^30");

  std::string why;
  const bool direct = direct_fits(problem, why);
  g.packed = config.split >= 2 || !direct;
  if (config.split >= 2 && !direct) return refuse("copies are made anyway: " + why);
  g.inner = size_of(problem.dtype) == 4;
  g.input_rows = config.split % 2 == 0;
  g.positions = g.inner ? config.block_k / 2 : config.block_k;
  g.warpgroups = config.warps / 4;
  g.rows = config.block_m / 64;
  if (g.packed) {
    lay_out_copies(problem, g);
    lay_out_packing(problem, g);
    if (g.pack_shared > kPackShared) return refuse("the columns of 64 positions do not fit shared memory");
    g.fold = static_cast<int>(problem.kernel[2]);
    if (g.length > (int64_t{1} << 30)) return refuse("more than 2^30 positions of the copies");
    if (problem.groups * std::max<int64_t>(int64_t{g.classes} * g.class_pitch, g.input_pitch) > (1 << 24))
      return refuse("more than 2^24 channels of the copies");
  } else {
    choose_tile(problem, g);
    g.input_pitch = static_cast<int>(ci), g.class_pitch = static_cast<int>(co);
  }
  g.outer = static_cast<int>(volume(problem.kernel)) / g.fold;

  const int64_t tap_channels = co * g.fold, column_channels = g.input_rows ? tap_channels : ci;
  if (g.inner)
    g.n = static_cast<int>(round_up(ceil_div(column_channels, ceil_div(column_channels, 64)), 8));
  else
    g.n = best_piece(column_channels, {64, 32, 16});
  g.line = g.inner ? 128 : 2 * g.n;
  g.tap_pieces = static_cast<int>(ceil_div(tap_channels, g.input_rows ? g.n : 64));
  const int64_t input_pieces = ceil_div(ci, g.input_rows ? 64 : g.n), grad_pieces = int64_t{g.outer} * g.tap_pieces;
  const int64_t row_pieces = g.input_rows ? input_pieces : grad_pieces;
  const int64_t column_pieces = g.input_rows ? grad_pieces : input_pieces;
  if (g.rows > 1 && g.rows / 2 >= row_pieces) return refuse("block_m is over twice the rows");
  if (config.block_n < g.n) return refuse("block_n is less than a piece of the columns");
  if (config.block_n / 2 >= column_pieces * g.n && config.block_n > 32)
    return refuse("block_n is over twice the columns");
  g.blocks_n = static_cast<int>(ceil_div(column_pieces, config.block_n / g.n));
  g.columns = static_cast<int>(ceil_div(column_pieces, g.blocks_n));
  g.blocks_m = static_cast<int>(ceil_div(row_pieces, g.rows));
  if (g.blocks_m * int64_t{g.blocks_n} * problem.groups > (1 << 24)) return refuse("more than 2^24 blocks");

  const std::size_t stage_bytes =
      static_cast<std::size_t>(g.rows) * 8192 +
      static_cast<std::size_t>(g.columns) * static_cast<std::size_t>(g.inner ? g.n * 128 : g.positions * g.line);
  g.stages = static_cast<int>(std::min<std::size_t>(12, (device.shared_memory_per_block - 1024) / (stage_bytes + 16)));
  if (g.stages < config.stages) return refuse("stages do not fit shared memory");
  g.shared_bytes = static_cast<std::size_t>(g.stages) * (stage_bytes + 16);

  const int64_t others = problem.groups * g.blocks_m * g.blocks_n;
  g.shares = shares_of(others, g.num_tiles, device.multiprocessors);
  g.blocks = others * g.shares;
  return g;
}

int64_t block_floats(const Geometry& g) { return int64_t{g.rows} * 64 * g.columns * g.n; }
std::size_t partial_floats(const Geometry& g) { return static_cast<std::size_t>(g.blocks * block_floats(g)); }

// box_gemm_finish_sm90 instead of tap_gemm_finish: whole fragments of output channels, and too few shares for several
// threads a fragment.
bool by_fragments(const Problem& problem, const Geometry& g) {
  return problem.out_channels / problem.groups % (g.input_rows ? 8 : 16) == 0 && g.shares <= 8;
}

// The workspace: partial sums and those of the bias, the input's copy, that of grad_output.
struct Workspace {
  std::size_t input = 0, grad = 0, all = 0;
};
Workspace workspace(const Problem& problem, const Geometry& g) {
  auto aligned = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
  Workspace w;
  w.input = w.grad = w.all = aligned(4 * (partial_floats(g) + bias_floats(problem)));
  if (!g.packed) return w;
  const std::size_t row = static_cast<std::size_t>(problem.groups * g.length) * size_of(problem.dtype);
  w.grad = w.input + aligned(row * static_cast<std::size_t>(g.input_pitch));
  w.all = w.grad + aligned(row * static_cast<std::size_t>(g.classes * g.class_pitch));
  return w;
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
  const Workspace bytes = workspace(problem, g);
  if (!has_tensor_maps())
    fit.refusal = "the driver cannot describe tensors to the copy engine (needs CUDA 12.0)";
  else if (bytes.input > (std::size_t{1} << 30))
    fit.refusal = std::to_string(bytes.input >> 20) + " MiB of partial sums";
  else if (bytes.all - bytes.input > kMostPackedBytes)
    fit.refusal = "copies of the tensors would take more than 256 MiB";
  if (!fit) return fit;
  fit.workspace_bytes = bytes.all;
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double rounds = std::ceil(static_cast<double>(g.blocks) / device.multiprocessors);
  const double tiles = static_cast<double>(ceil_div(g.num_tiles, g.shares));
  const double width = g.n * g.columns;
  const double products = 4.0 * g.rows * std::max(width / 2, 16 + width / 4) / 0.9;
  // The copy engine: 38 bytes a cycle and 3 cycles a row from copies, which lie in L2; from tensors 5 cycles a row (4 where
  // it is a sector), whatever its length.
  const double row_lines = g.rows * (g.inner ? 64 : g.positions);
  const double column_lines = g.columns * (g.inner ? g.n : g.positions);
  const double load =
      g.packed ? std::max(static_cast<double>(g.shared_bytes) / g.stages / 38, 3 * (row_lines + column_lines))
               : (g.input_rows || g.n >= 64 ? 5 : 4) * row_lines + (g.line == 32 ? 4 : 5) * column_lines;
  const double compute = rounds * (tiles * (std::max(products, load) + 40) + 5000.0) / clock * 1e6;
  const double bandwidth = device.bandwidth_tbs * 1e12 * 0.85;
  // Of grad_output only what taps reach.
  double reached = 1;
  for (int dim = 0; dim < 3; ++dim)
    reached *= std::min(1.0, static_cast<double>(problem.kernel[dim]) / static_cast<double>(problem.stride[dim]));
  const double input_bytes =
      static_cast<double>(input_elements(problem) * static_cast<int64_t>(size_of(problem.dtype)));
  const double grad_bytes =
      static_cast<double>(output_elements(problem) * static_cast<int64_t>(size_of(problem.dtype)));
  const double traffic = (input_bytes + reached * grad_bytes) / bandwidth * 1e6;
  const double partial = 2.0 * 4.0 * static_cast<double>(partial_floats(g)) / bandwidth * 1e6;
  const double packing = g.packed ? (2.5 * static_cast<double>(bytes.all - bytes.input)) / bandwidth * 1e6 + 3 : 0;
  fit.microseconds = std::max(compute, traffic) + 0.2 * std::min(compute, traffic) + partial + packing + 8.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Geometry g = geometry(problem, step.device, step.config);
  const std::string layer = layer_prelude(step);
  std::ostringstream text;
  text << layer;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("BW_ROWS", g.rows);
  define("BW_COLUMNS", g.columns);
  define("BW_N", g.n);
  define("BW_INPUT_ROWS", g.input_rows ? 1 : 0);
  define("BW_BLOCKS_M", g.blocks_m);
  define("BW_BLOCKS_N", g.blocks_n);
  define("BW_FOLD", g.fold);
  define("BW_NUM_OUTER", g.outer);
  define("BW_TAP_PIECES", g.tap_pieces);
  const std::string pieces = text.str();
  define("TG_BOXES", 1);
  define("TG_BLOCK_FLOATS", block_floats(g));
  const int finish_threads = 32 * static_cast<int>(std::min<int64_t>(8, volume(problem.kernel)));
  define("BW_FINISH_THREADS", finish_threads);
  const std::string finish = text.str();
  text.str("");
  text << pieces;
  define("BW_POSITIONS_INNER", g.inner ? 1 : 0);
  define("BW_CLASSES", g.classes);
  define("BW_INPUT_PITCH", g.input_pitch);
  define("BW_CLASS_PITCH", g.class_pitch);
  define("BW_GRAD_PITCH", g.classes * g.class_pitch);
  const std::string copies = text.str();
  define("BW_PACKED", g.packed ? 1 : 0);
  define("BW_LINE", g.line);
  define("BW_POSITIONS", g.positions);
  define("BW_TB", g.tile[0]);
  define("BW_TD", g.tile[1]);
  define("BW_TH", g.tile[2]);
  define("BW_TW", g.tile[3]);
  define("BW_WARPGROUPS", g.warpgroups);
  const int threads = 128 * g.warpgroups + (g.warpgroups == 2 ? 128 : 32);
  define("BW_THREADS", threads);
  define("BW_STAGES", g.stages);
  define("BW_FLUSH", (g.inner ? kFlush32 : kFlush16) / g.positions);
  define("BW_OUTER", list(g.outer_table));
  text << shared_product_text(problem.dtype, g.n * g.columns, !g.inner);
  std::vector<Unit> all = {
      {"box_gemm_grad_weight_sm90.cu", "box_gemm_grad_weight", text.str(), threads, g.shared_bytes},
      by_fragments(problem, g) ? Unit{"box_gemm_finish_sm90.cu", "box_gemm_finish", finish, finish_threads, 0}
                               : Unit{"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
      {"channel_sum.cu", "channel_sum", layer, 256, 0},
      {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
  if (g.packed) {
    text.str("");
    text << copies;
    define("BW_CLASS", list(g.class_table));
    define("BW_FOLD_OFFSET", list(g.fold_offset));
    define("BP_TW", g.pack_tw);
    define("BP_ROWS", 64 / g.pack_tw);
    define("BP_LOW", '(' + std::to_string(g.low) + ')');
    define("BP_REACH", g.reach);
    define("BP_INPUT_LOT", g.input_lot);
    define("BP_GRAD_LOT", g.grad_lot);
    define("BP_SHARED", g.pack_shared);
    all.push_back({"box_gemm_pack_sm90.cu", "box_gemm_pack", text.str(), 256, g.pack_shared});
  }
  return all;
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

// A side of the product as the copy engine reads it; pieces of `width` channels.
TensorView view_of(const Problem& problem, const Geometry& g, const void* first, bool grad) {
  const int64_t bytes = static_cast<int64_t>(size_of(problem.dtype));
  const bool is_rows = grad != g.input_rows;
  const int width = is_rows ? 64 : g.n;
  TensorView view;
  view.first = first;
  view.element_bytes = static_cast<int>(bytes);
  view.exchange_bytes = g.inner || is_rows ? 128 : g.line;
  const int64_t pitch = problem.groups * (grad ? int64_t{g.classes} * g.class_pitch : g.input_pitch);
  if (g.packed) {
    view.size[0] = g.inner ? g.length : pitch;
    view.size[1] = g.inner ? pitch : g.length;
    for (int i = 0; i < 4; ++i) view.stride[i] = view.size[0] * bytes;  // of dimensions of size 1 any will do
    view.box[0] = g.inner ? g.positions : width;
    view.box[1] = g.inner ? width : g.positions;
    return view;
  }
  const Dims size = grad ? output_size(problem) : problem.input;
  view.size[0] = pitch;
  int64_t stride = pitch * bytes;  // between neighbours of a dimension
  for (int dim = 2; dim >= 0; --dim) {
    const int at = 3 - dim;
    view.size[at] = size[dim];
    view.stride[at - 1] = stride;
    view.step[at] = grad ? static_cast<int>(problem.stride[dim]) : 1;
    view.box[at] = (g.tile[1 + dim] - 1) * view.step[at] + 1;
    stride *= size[dim];
  }
  view.size[4] = problem.batch;
  view.stride[3] = stride;
  view.box[0] = width;
  view.box[4] = g.tile[0];
  return view;
}

// Kernel parameters of box_gemm_grad_weight and box_gemm_pack.
struct Arguments {
  TensorMap input_map, grad_map;
  const void* input;
  const void* grad_output;
  void* partial;
  int input_size[3], grad_size[3], batch, tensor, tiles[3], shares;
  long long num_tiles;
};
struct PackSide {
  const void* from;
  void* to;
  long long image, channel, pitch;
  int size[3], wide;
  unsigned blocks;
};
struct PackArguments {
  PackSide input, grad;
  int extent[3], width, rows, strips;
};

void launch_packing(const Step& step, const Tensors& tensors, const Geometry& g, void* input_to, void* grad_to,
                    Stream stream) {
  const Problem& problem = step.problem;
  PackArguments args{};
  const int64_t rows = problem.batch * g.extent[0] * g.extent[1], strips = ceil_div(g.extent[2], g.pack_tw);
  const int64_t tiles = ceil_div(rows, 64 / g.pack_tw) * strips * problem.groups;
  const int64_t unit = 16 / static_cast<int64_t>(size_of(problem.dtype));
  auto side = [&](const void* from, void* to, int64_t channels, const Dims& size, int64_t pitch, int64_t lots) {
    PackSide side{};
    const bool last = has_channels_last(problem, channels);
    side.from = from, side.to = to;
    side.image = channels * volume(size);
    side.channel = last ? channels : volume(size);
    side.pitch = g.inner ? g.length : pitch;
    for (int dim = 0; dim < 3; ++dim) side.size[dim] = static_cast<int>(size[dim]);
    side.wide =
        reinterpret_cast<std::uintptr_t>(from) % 16 == 0 && (last ? channels / problem.groups : size[2]) % unit == 0;
    side.blocks = static_cast<unsigned>(tiles * lots);
    return side;
  };
  args.input = side(tensors.input, input_to, problem.in_channels, problem.input, problem.groups * g.input_pitch,
                    ceil_div(problem.in_channels / problem.groups, g.input_lot));
  args.grad = side(tensors.grad_output, grad_to, problem.out_channels, output_size(problem),
                   problem.groups * g.classes * g.class_pitch,
                   g.classes * ceil_div(problem.out_channels / problem.groups, g.grad_lot));
  for (int dim = 0; dim < 3; ++dim) args.extent[dim] = static_cast<int>(g.extent[dim]);
  args.width = static_cast<int>(problem.input[2]);
  args.rows = static_cast<int>(rows);
  args.strips = static_cast<int>(strips);
  unsigned input_grid = std::min(65536u, args.input.blocks);
  void* pointers[] = {&args, &input_grid};
  launch(function(step, 4), {input_grid + std::min(65536u, args.grad.blocks)}, stream, pointers);
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Current current(step.device.index);  // for the tensor maps
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  const Workspace at = workspace(problem, g);
  char* const first = static_cast<char*>(tensors.workspace);
  Arguments args{};
  args.input = g.packed ? first + at.input : tensors.input;
  args.grad_output = g.packed ? first + at.grad : tensors.grad_output;
  args.partial = tensors.workspace;
  if (g.packed) launch_packing(step, tensors, g, first + at.input, first + at.grad, stream);
  args.tensor = reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0 &&
                reinterpret_cast<std::uintptr_t>(args.grad_output) % 16 == 0;
  if (args.tensor) {
    args.input_map = tensor_map(view_of(problem, g, args.input, false));
    args.grad_map = tensor_map(view_of(problem, g, args.grad_output, true));
  }
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.grad_size[dim] = static_cast<int>(output[dim]);
    args.tiles[dim] = g.tiles[dim];
  }
  args.batch = static_cast<int>(problem.batch);
  args.shares = g.shares;
  args.num_tiles = g.num_tiles;
  void* pointers[] = {&args};
  launch_behind(function(step), {static_cast<unsigned>(g.blocks)}, stream, pointers);
  if (!by_fragments(problem, g)) {
    launch_sums(step, tensors, stream, g.blocks / g.shares * block_floats(g), g.shares, partial_floats(g));
    return;
  }
  const void* partial = tensors.workspace;
  void* grad_weight = tensors.output;
  int shares = g.shares;
  void* sums[] = {&partial, &grad_weight, &shares};
  const int64_t inputs = ceil_div(problem.in_channels / problem.groups, g.input_rows ? 16 : 8);
  const int64_t outputs = problem.out_channels / problem.groups / (g.input_rows ? 8 : 16);
  launch_behind(function(step, 1), {static_cast<unsigned>(problem.groups * inputs * outputs)}, stream, sums);
  launch_bias_sums(step, tensors, stream, partial_floats(g));
}

}  // namespace

extern const Kernel box_gemm_grad_weight_sm90;
const Kernel box_gemm_grad_weight_sm90{"box_gemm_grad_weight_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
