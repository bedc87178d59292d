// line_gemm_grad_weight_sm90.cpp — host side: sets, stages, segments, price, specialisation and launch of the kernel of that
// name.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "tap_tiling.h"
#include "tensor_map.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// Rows of a product, input channels of a block, positions of a row of the input at all depths of a stage at most, stages
// at least (beside those that the window holds), warps that multiply; two more stage.
constexpr Config kConfigs[] = {{64, 16, 64, 2, 12},  {64, 32, 64, 2, 12},  {64, 64, 64, 2, 12}, {64, 16, 128, 2, 12},
                               {64, 32, 128, 2, 12}, {64, 64, 128, 2, 12}, {64, 16, 64, 2, 8},  {64, 32, 64, 2, 8},
                               {64, 64, 64, 2, 8},   {64, 32, 128, 2, 8},  {64, 64, 128, 2, 8}};

constexpr int kMaxSets = 512;                  // of a block
constexpr int64_t kMostTableWords = 12 << 10;  // in constant memory, which has 16 Ki
constexpr int kMaxStages = 12;
constexpr int kMostBox = 256;
constexpr int kFlush = 8192;  // positions, as in tap_gemm_half_grad_weight_sm90

// A piece of 64 elements of the long row, shifted by so many lines.
struct Shift {
  int piece, lines;
  friend bool operator==(const Shift&, const Shift&) = default;
};

// What width and height taps need; of a problem, whatever the config.
struct Taps {
  std::vector<int> offset[3];                 // d * t - p
  std::vector<int> pieces;                    // in units of 64 elements
  std::vector<Shift> shifts;                  // that width taps need
  int first_line = 0, more_lines = 0;         // least shift; greatest, less that
  std::vector<int> rows;                      // staged residues of the height
  std::vector<int> row_of_tap, stage_of_tap;  // which of them, and how far ahead
  int low_row = 0, reach = 0;                 // first row of stage 0; stages of the window before the last

  std::size_t shifts_of(int piece) const {
    return static_cast<std::size_t>(
        std::count_if(shifts.begin(), shifts.end(), [piece](const Shift& shift) { return shift.piece == piece; }));
  }
};

struct Geometry {
  std::string refusal;
  std::shared_ptr<const Taps> taps;
  int warpgroups = 1, sets = 1;  // sets of a warpgroup
  int blocks_n = 1, shares = 1;
  // A slice is what a block sums: all depth taps or one of them, all pieces or one of them.
  int depth_slices = 1, piece_slices = 1;
  int td = 0, tw = 0, lines = 0;
  Rows depths;
  int stages = 0;
  std::size_t shared_bytes = 0;
  double item_cycles = 0;
  int64_t tiles_d = 1, tiles_w = 1, segment = 1, segments_h = 1, segments = 1, blocks = 0;

  int slices() const { return depth_slices * piece_slices; }
  int depth_taps() const { return static_cast<int>(taps->offset[0].size()) / depth_slices; }
  int block_sets() const { return warpgroups * sets; }
  int slice_pieces() const { return static_cast<int>(taps->pieces.size()) / piece_slices; }
  int boxes() const { return slice_pieces() * static_cast<int>(depths.relative.size() * taps->rows.size()); }
};

int line_bytes(const Config& config) { return 2 * config.block_n; }

// Which elements of which lines the width taps are, and which rows of which stages the height taps.
std::shared_ptr<const Taps> lay_out_taps(const Problem& problem) {
  auto made = std::make_shared<Taps>();
  Taps& g = *made;
  for (int dim = 0; dim < 3; ++dim)
    for (int t = 0; t < problem.kernel[dim]; ++t)
      g.offset[dim].push_back(static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]));
  const int stride = static_cast<int>(problem.stride[2]), channels = static_cast<int>(problem.out_channels);
  int low = std::numeric_limits<int>::max(), high = std::numeric_limits<int>::min();
  for (int o : g.offset[2]) {
    const int lines = floor_div(o, stride), first = (o - lines * stride) * channels;
    low = std::min(low, lines), high = std::max(high, lines);
    for (int piece = first / 64; piece <= (first + channels - 1) / 64; ++piece) {
      if (std::find(g.pieces.begin(), g.pieces.end(), piece) == g.pieces.end()) g.pieces.push_back(piece);
      if (std::find(g.shifts.begin(), g.shifts.end(), Shift{piece, lines}) == g.shifts.end())
        g.shifts.push_back({piece, lines});
    }
  }
  g.first_line = low, g.more_lines = high - low;
  std::sort(g.pieces.begin(), g.pieces.end());

  const int step = static_cast<int>(problem.stride[1]);
  g.low_row = *std::min_element(g.offset[1].begin(), g.offset[1].end());
  for (int o : g.offset[1]) {
    const int residue = (o - g.low_row) % step;
    auto found = std::find(g.rows.begin(), g.rows.end(), residue);
    if (found == g.rows.end()) found = g.rows.insert(found, residue);
    g.row_of_tap.push_back(static_cast<int>(found - g.rows.begin()));
    g.stage_of_tap.push_back((o - g.low_row) / step);
    g.reach = std::max(g.reach, g.stage_of_tap.back());
  }
  return made;
}

// Clock cycles of one row of the input at all depths of a stage: the copy engine takes 5 for a line, whatever its length,
// the products wait for shared memory, which gives 128 bytes.
double cycles_of(const Config& config, const Geometry& g) {
  const double columns = config.block_n, positions = g.td * g.tw;
  const double load = 5.0 * (g.boxes() * g.lines + positions);
  const double products = positions / 16 * g.block_sets() * std::max(columns / 2, 16 + columns / 4) / 0.9;
  return std::max(load, products) + 0.15 * std::min(load, products) + 60;
}

// How many rows of the input a block walks in one go: the rows of grad_output that the first needs are staged for it alone,
// but all blocks should have the same number of segments.
void set_segment(const Problem& problem, const Device& device, Geometry& g) {
  const int64_t side_by_side = problem.batch * g.tiles_d * g.tiles_w, others = int64_t{g.blocks_n} * g.slices();
  double best = std::numeric_limits<double>::max();
  for (int64_t pieces = 1; pieces <= std::min<int64_t>(problem.input[1], 64); ++pieces) {
    const int64_t segment = ceil_div(problem.input[1], pieces), count = ceil_div(problem.input[1], segment);
    const int shares = shares_of(others, side_by_side * count, device.multiprocessors);
    const double rounds =
        static_cast<double>(ceil_div(side_by_side * count, shares) * ceil_div(others * shares, device.multiprocessors));
    const double time = rounds * (static_cast<double>(segment) + 0.8 * g.taps->reach);
    if (time >= best) continue;
    best = time;
    g.segment = segment, g.segments_h = count, g.shares = shares;
  }
  g.segments = side_by_side * g.segments_h;
  g.blocks = others * g.shares;
}

// Time of the products and copies, in cycles of a multiprocessor.
double time_of(const Device& device, const Geometry& g) {
  const double rounds = static_cast<double>(ceil_div(g.segments, g.shares)) *
                        static_cast<double>(ceil_div(g.blocks, device.multiprocessors));
  return rounds * (static_cast<double>(g.segment) + 0.8 * g.taps->reach) * g.item_cycles;
}

// The quickest tile of the slices at hand; cost is that of the best so far.
void choose_tile(const Problem& problem, const Device& device, const Config& config, const Geometry& g, double& best,
                 Geometry& chosen) {
  for (int tw = 16; tw <= config.block_k; tw *= 2)
    for (int td = 1; td * tw <= config.block_k; td *= 2) {
      if (td > 1 && td / 2 >= problem.input[0]) continue;
      if (tw > 16 && tw / 2 >= problem.input[2]) continue;
      Geometry t = g;
      t.td = td, t.tw = tw;
      t.lines = tw + g.taps->more_lines;
      t.depths = rows_of(td, static_cast<int>(problem.stride[0]),
                         g.depth_slices > 1 ? std::vector<int>{0} : g.taps->offset[0]);
      if (t.lines > kMostBox || t.boxes() > 1024) continue;
      const int64_t stage_bytes =
          (ceil_div(int64_t{td} * tw * line_bytes(config), 1024) + ceil_div(int64_t{t.boxes()} * t.lines, 8)) * 1024;
      // Three barriers of a stage lie behind the stages.
      const int64_t fitting = static_cast<int64_t>(device.shared_memory_per_block) / (stage_bytes + 24);
      if (fitting < g.taps->reach + config.stages) continue;
      t.stages = static_cast<int>(std::min<int64_t>(fitting, g.taps->reach + kMaxStages));
      if (t.stages > 32) continue;  // a bit each
      t.shared_bytes = static_cast<std::size_t>(t.stages * (stage_bytes + 24));
      t.tiles_d = ceil_div(problem.input[0], td), t.tiles_w = ceil_div(problem.input[2], tw);
      t.item_cycles = cycles_of(config, t);
      set_segment(problem, device, t);
      const double cost = time_of(device, t);
      if (cost >= best) continue;
      best = cost;
      chosen = t;
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
  if (problem.layout != Layout::channels_last || size_of(problem.dtype) != 2)
    return refuse("not a 16-bit channels_last tensor");
  if (problem.groups != 1) return refuse("groups " + std::to_string(problem.groups));
  const int64_t ci = problem.in_channels, co = problem.out_channels;
  if (ci == 0 || co == 0) return refuse("no channels");
  if (ci % 8 != 0 || co % 8 != 0) return refuse("channels are no multiple of 8");
  const Dims output = output_size(problem);
  if (problem.batch * volume(problem.input) * volume(output) == 0) return refuse("empty tensors");
  if (volume(problem.kernel) > kMaxSets) return refuse("more than " + std::to_string(kMaxSets) + " taps");
  if (problem.batch > (1 << 30)) return refuse("batch above 2^30");
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 1024 ||
        std::max(problem.input[dim] * problem.stride[dim], output[dim]) > (int64_t{1} << 30))
      return refuse("stride, kernel extent or size too large for 32-bit coordinates");
  if (problem.stride[2] * co > (1 << 16)) return refuse("stride times channels above 2^16");
  if (config.block_n > 16 && config.block_n / 2 >= ci) return refuse("block_n is over twice the channels");
  if (config.block_n == 16 && ci > 16) return refuse("16 columns are for at most 16 channels");
  g.warpgroups = config.warps / 4;
  g.blocks_n = static_cast<int>(ceil_div(ci, config.block_n));
  g.taps = of_last_problem<std::shared_ptr<const Taps>>(problem, lay_out_taps);
  // Of 144 or 200 registers; a set has an offset beside its sums.
  const int registers = g.warpgroups == 3 ? 108 : 152, most = registers / (config.block_n / 2 + 1);
  // Sets of all shifts, or of the piece that has most of them.
  const std::vector<int>& pieces = g.taps->pieces;
  std::size_t of_piece = 0;
  for (int piece : pieces) of_piece = std::max(of_piece, g.taps->shifts_of(piece));
  int fewest = kMaxSets;
  double best = std::numeric_limits<double>::max();
  const Geometry layer = g;
  for (bool by_depth : {false, true})
    for (bool by_piece : {false, true}) {
      if ((by_depth && problem.kernel[0] == 1) || (by_piece && pieces.size() == 1)) continue;
      Geometry t = layer;
      t.depth_slices = by_depth ? static_cast<int>(problem.kernel[0]) : 1;
      t.piece_slices = by_piece ? static_cast<int>(pieces.size()) : 1;
      const int sets =
          t.depth_taps() * static_cast<int>(problem.kernel[1] * (by_piece ? of_piece : g.taps->shifts.size()));
      fewest = std::min(fewest, sets);
      if (sets > most * g.warpgroups) continue;
      t.sets = static_cast<int>(ceil_div(sets, g.warpgroups));
      if (int64_t{t.slices()} * t.block_sets() * (problem.stride[2] + 3) > kMostTableWords) continue;
      choose_tile(problem, device, config, t, best, g);
    }
  if (fewest > most * g.warpgroups) return refuse(std::to_string(fewest) + " sets of sums do not fit registers");
  if (g.tw == 0) return refuse("no tile fits shared memory, or no table of the taps constant memory");
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
  fit.workspace_bytes = 4 * (partial_floats(config, g) + bias_floats(problem));
  if (!has_tensor_maps())
    fit.refusal = "the driver cannot describe tensors to the copy engine (needs CUDA 12.0)";
  else if (g.blocks >= (int64_t{1} << 31) || g.segments >= (int64_t{1} << 31))
    fit.refusal = "more than 2^31 blocks or segments";
  else if (fit.workspace_bytes > (std::size_t{1} << 30))
    fit.refusal = std::to_string(fit.workspace_bytes >> 20) + " MiB of partial sums";
  if (!fit) return fit;
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double compute = (time_of(device, g) + 5000.0) / clock * 1e6;
  const double bandwidth = device.bandwidth_tbs * 1e12 * 0.85;
  const double traffic = minimum_bytes(problem) / bandwidth * 1e6;
  const double partial = 2.0 * 4.0 * static_cast<double>(partial_floats(config, g)) / bandwidth * 1e6;
  // tap_gemm_finish stores weight by weight, each into a sector: with 2 million (512 > 256 channels, 16 taps) the whole took
  // 44 us on an H200, with box_gemm_grad_weight_sm90 and its finish 21.
  const double finish =
      static_cast<double>(problem.in_channels * problem.out_channels * volume(problem.kernel)) * 32 / 2.8e12 * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.05 * std::min(compute, traffic) + partial + finish + 5.0;
  return fit;
}

// A set of a slice; those behind the last repeat the first, with results that nothing reads.
struct Set {
  bool exists;
  Shift shift;
  int depth_tap, row_tap;  // depth_tap: of the slice
};
Set set_of(const Problem& problem, const Geometry& g, int slice, int index) {
  std::vector<Shift> shifts = g.taps->shifts;
  if (g.piece_slices > 1)
    std::erase_if(shifts, [piece = g.taps->pieces[static_cast<std::size_t>(slice % g.piece_slices)]](
                              const Shift& shift) { return shift.piece != piece; });
  const int count = static_cast<int>(shifts.size()), kh = static_cast<int>(problem.kernel[1]);
  const bool exists = index < g.depth_taps() * kh * count;
  if (!exists) index = 0;
  return {exists, shifts[static_cast<std::size_t>(index % count)], index / count / kh, index / count % kh};
}

// [slice][set][residue of the width] -> packed tap, or -1.
std::vector<int> tap_table(const Problem& problem, const Geometry& g) {
  const int stride = static_cast<int>(problem.stride[2]), kw = static_cast<int>(problem.kernel[2]);
  std::vector<int> table;
  for (int slice = 0; slice < g.slices(); ++slice)
    for (int index = 0; index < g.block_sets(); ++index) {
      const Set set = set_of(problem, g, slice, index);
      const int first_depth = g.depth_slices > 1 ? slice / g.piece_slices : 0;
      const int row = (first_depth + set.depth_tap) * static_cast<int>(problem.kernel[1]) + set.row_tap;
      for (int residue = 0; residue < stride; ++residue) {
        int tap = -1;
        for (int t = 0; t < kw && set.exists; ++t)
          if (g.taps->offset[2][t] == set.shift.lines * stride + residue) tap = row * kw + t;
        table.push_back(tap);
      }
    }
  return table;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.device, config);
  const std::string layer = layer_prelude(step);
  std::ostringstream text;
  text << layer;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_LINES", 1);
  define("TG_SLICES", g.slices());
  define("TG_BN", config.block_n);
  define("TG_BLOCKS_M", 1);
  define("TG_BLOCKS_N", g.blocks_n);
  define("TG_BLOCK_FLOATS", block_floats(config, g));
  define("TG_SETS", g.block_sets());
  std::vector<int> pieces, slice_depth, set_piece, set_stage, set_unit;  // by slice
  for (int slice = 0; slice < g.slices(); ++slice) {
    slice_depth.push_back(g.depth_slices > 1 ? g.taps->offset[0][static_cast<std::size_t>(slice / g.piece_slices)] : 0);
    const auto first = g.taps->pieces.begin() + (g.piece_slices > 1 ? slice % g.piece_slices : 0);
    for (int i = 0; i < g.slice_pieces(); ++i) pieces.push_back(first[i] * 64);
    for (int index = 0; index < g.block_sets(); ++index) {
      const Set set = set_of(problem, g, slice, index);
      const int slot = static_cast<int>(std::find(first, first + g.slice_pieces(), set.shift.piece) - first);
      const int depth = g.depths.tap_slot[set.depth_tap], depths = static_cast<int>(g.depths.relative.size());
      const int box = (slot * depths + depth) * static_cast<int>(g.taps->rows.size()) + g.taps->row_of_tap[set.row_tap];
      set_piece.push_back(set.shift.piece);
      set_stage.push_back(g.taps->stage_of_tap[set.row_tap]);
      set_unit.push_back((box * g.lines + set.shift.lines - g.taps->first_line) * 8);
    }
  }
  define("TG_SET_PIECE", list(set_piece));
  define("TG_SET_TAP", list(tap_table(problem, g)));
  const std::string finish = text.str();
  text.str("");
  text << layer;
  std::vector<int> rows;
  for (int residue : g.taps->rows) rows.push_back(g.taps->low_row + residue);
  define("LG_SLICE_DEPTH", list(slice_depth));
  define("LG_DEPTHS", list(g.depths.relative));
  define("LG_ROW", list(rows));
  define("LG_PIECES", list(pieces));
  define("LG_SET_STAGE", list(set_stage));
  define("LG_SET_UNIT", list(set_unit));
  define("LG_NUM_DEPTHS", g.depths.relative.size());
  define("LG_ROWS", rows.size());
  define("LG_NUM_PIECES", g.slice_pieces());
  define("LG_SETS", g.sets);
  define("LG_WARPGROUPS", g.warpgroups);
  define("LG_N", config.block_n);
  define("LG_LINE", line_bytes(config));
  define("LG_BLOCKS_N", g.blocks_n);
  define("LG_SLICES", g.slices());
  define("LG_STAGES", g.stages);
  define("LG_REACH", g.taps->reach);
  define("LG_TD", g.td);
  define("LG_TW", g.tw);
  define("LG_STEP_D", g.depths.step);
  define("LG_LINES", g.lines);
  define("LG_FIRST_LINE", '(' + std::to_string(g.taps->first_line) + ')');
  define("LG_FLUSH", std::max(1, kFlush / (g.td * g.tw)));
  text << shared_product_text(problem.dtype, config.block_n, true);
  return {
      {"line_gemm_grad_weight_sm90.cu", "line_gemm_grad_weight", text.str(), 128 * (g.warpgroups + 1), g.shared_bytes},
      {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
      {"channel_sum.cu", "channel_sum", layer, 256, 0},
      {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

// A tensor whose innermost dimension is `line` elements of a row, the next the lines of a row.
TensorView view_of(const void* first, int64_t line, int64_t lines, int64_t row, const Dims& size, int64_t batch) {
  TensorView view;
  view.first = first;
  view.element_bytes = 2;
  view.size[0] = line, view.size[1] = lines, view.size[2] = size[1], view.size[3] = size[0], view.size[4] = batch;
  view.stride[0] = line * 2;
  view.stride[1] = row * 2;
  view.stride[2] = view.stride[1] * size[1];
  view.stride[3] = view.stride[2] * size[0];
  return view;
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Current current(step.device.index);  // for the tensor maps
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  const Dims output = output_size(problem);
  struct {
    TensorMap input_map, grad_map, tail_map;
    const void* input;
    const void* grad_output;
    void* partial;
    int input_size[3], grad_size[3];
    int tensor, tail;
    int tiles_d, tiles_w, segment, segments_h, shares;
    unsigned segments;
  } args{};
  args.input = tensors.input;
  args.grad_output = tensors.grad_output;
  args.partial = tensors.workspace;
  const int64_t stride = problem.stride[2], whole = output[2] / stride, rest = output[2] % stride;
  const int64_t line = stride * problem.out_channels, row = output[2] * problem.out_channels;
  args.tensor = whole > 0 && reinterpret_cast<std::uintptr_t>(tensors.input) % 16 == 0 &&
                reinterpret_cast<std::uintptr_t>(tensors.grad_output) % 16 == 0;
  args.tail = rest > 0 ? static_cast<int>(whole) : -1;
  if (args.tensor) {
    TensorView input = view_of(tensors.input, problem.in_channels, problem.input[2],
                               problem.input[2] * problem.in_channels, problem.input, problem.batch);
    input.box[0] = step.config.block_n, input.box[1] = g.tw, input.box[3] = g.td;
    input.exchange_bytes = line_bytes(step.config);
    args.input_map = tensor_map(input);
    TensorView grad = view_of(tensors.grad_output, line, whole, row, output, problem.batch);
    grad.box[0] = 64, grad.box[1] = g.lines;
    grad.exchange_bytes = 128;
    args.grad_map = tensor_map(grad);
    if (rest > 0) {
      grad.size[0] = rest * problem.out_channels, grad.size[1] = whole + 1;
      grad.box[1] = 1;
      args.tail_map = tensor_map(grad);
    }
  }
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.grad_size[dim] = static_cast<int>(output[dim]);
  }
  args.tiles_d = static_cast<int>(g.tiles_d), args.tiles_w = static_cast<int>(g.tiles_w);
  args.segment = static_cast<int>(g.segment), args.segments_h = static_cast<int>(g.segments_h);
  args.shares = g.shares;
  args.segments = static_cast<unsigned>(g.segments);
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(g.blocks)}, stream, pointers);
  launch_sums(step, tensors, stream, g.blocks / g.shares * block_floats(step.config, g), g.shares,
              partial_floats(step.config, g));
}

}  // namespace

extern const Kernel line_gemm_grad_weight_sm90;
const Kernel line_gemm_grad_weight_sm90{
    "line_gemm_grad_weight_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
