// ring_gemm_grad_weight_sm90.cpp — host side: slices of taps, tiles, price, specialisation and launch of the kernel of that
// name.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

#include "tap_tiling.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m output channels (times 64 / block_m taps where that is below 64 make the rows of a product), block_n input
// channels, strips of at most block_k columns, at least two stages; warps are those that multiply, four more load. split:
// products that a warpgroup has under way, 0 stands for two.
#define COLUMNS(m, warps) \
  {m, 64, 128, 2, warps, 0}, {m, 32, 128, 2, warps, 0}, {m, 16, 128, 2, warps, 0}, {m, 8, 128, 2, warps, 0}
constexpr Config kConfigs[] = {
    COLUMNS(64, 12),          {64, 48, 128, 2, 12, 0}, {64, 128, 128, 2, 12, 0},  COLUMNS(64, 8),
    {64, 48, 128, 2, 8, 0},   {64, 128, 128, 2, 8, 0}, COLUMNS(32, 12),           {32, 48, 128, 2, 12, 0},
    {32, 128, 128, 2, 12, 0}, COLUMNS(32, 8),          COLUMNS(16, 12),           COLUMNS(8, 12),
    {128, 64, 128, 2, 12, 0}, {128, 64, 128, 2, 8, 0}, {128, 128, 128, 2, 12, 0}, {128, 128, 128, 2, 8, 0},
    {64, 64, 128, 2, 12, 4},  {64, 48, 128, 2, 12, 4}, {64, 128, 128, 2, 12, 4},  {64, 64, 128, 2, 8, 4},
    {64, 128, 128, 2, 8, 4},  {32, 64, 128, 2, 12, 4}, {32, 64, 128, 2, 8, 4}};
#undef COLUMNS

constexpr int kMaxTaps = 4096;  // tables in constant memory
constexpr int kFlush =
    2048;  // positions summed by the tensor core before they move to memory, as tap_gemm_grad_weight_sm90

struct Geometry {
  std::string refusal;
  int warpgroups = 3, channels = 64, m_blocks = 1;  // output channels of a set of rows; sets of channels of a block
  int sets = 1, own = 1;                            // sets of rows per 64 channels; of a warpgroup
  int taps_h = 1, depths = 1, slices = 1, span = 0;
  std::vector<int> class_begin;
  std::vector<int> first, residue, back, depth, column, tap_word, tap_depth, slice_tap;
  int tile = 0, vectors = 0, pitch = 0, stages = 0;
  std::size_t shared_bytes = 0;
  int blocks_m = 1, blocks_n = 1, shares = 1;
  int64_t strips = 1, rows = 0, item_steps = 0, steps = 0, blocks = 0;
  double step_cycles = 0;
};

// Without height and depth, images take the place of rows.
bool images_are_rows(const Problem& problem) {
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 2; ++dim)
    if (problem.kernel[dim] != 1 || problem.input[dim] != 1 || problem.padding[dim] != 0 || output[dim] != 1)
      return false;
  return true;
}

// Bytes of the input that can be copied at a time, as far as the sizes go.
int copy_bytes(const Problem& problem, bool images) {
  for (int bytes : {16, 8})
    if (problem.input[2] * 4 % bytes == 0 && (images || volume(problem.input) * 4 % bytes == 0)) return bytes;
  return 4;
}

// One way to divide the taps: `fixed` leading dimensions of depth and width and `parts_w` parts of the width are slices,
// and so are `parts_h` parts of the height. False where the parts of the height differ in kind.
bool divide(const Problem& problem, int fixed, int parts_w, int parts_h, Geometry& g) {
  const int kd = static_cast<int>(problem.kernel[0]), kh = static_cast<int>(problem.kernel[1]),
            kw = static_cast<int>(problem.kernel[2]);
  auto offset = [&](int dim, int t) { return static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]); };
  const int stride = static_cast<int>(problem.stride[1]);
  std::vector<int> height(kh);
  std::iota(height.begin(), height.end(), 0);
  auto residue_of = [&](int t) { return offset(1, t) - floor_div(offset(1, t), stride) * stride; };
  std::stable_sort(height.begin(), height.end(), [&](int a, int b) { return residue_of(a) < residue_of(b); });
  g.taps_h = kh / parts_h;
  g.class_begin.clear();
  for (int part = 0; part < parts_h; ++part) {
    std::vector<int> begin{0};
    for (int k = 1; k < g.taps_h; ++k)
      if (residue_of(height[part * g.taps_h + k]) != residue_of(height[part * g.taps_h + k - 1])) begin.push_back(k);
    begin.push_back(g.taps_h);
    if (part == 0) g.class_begin = begin;
    if (begin != g.class_begin) return false;
  }
  const int width = static_cast<int>(ceil_div(kw, parts_w)), tap_rows = 64 / g.channels;
  const int row_taps = fixed == 0 ? kd * kw : width;
  g.depths = fixed == 0 ? kd : 1;
  g.sets = static_cast<int>(ceil_div(row_taps, tap_rows));
  while (g.sets * g.m_blocks % g.warpgroups != 0) ++g.sets;
  g.own = g.sets * g.m_blocks / g.warpgroups;
  g.slices = (fixed == 0 ? 1 : kd) * parts_w * parts_h;
  g.span = 0;
  for (auto* table : {&g.first, &g.residue, &g.back, &g.depth, &g.column, &g.tap_word, &g.tap_depth, &g.slice_tap})
    table->clear();
  int reach = 0;  // columns that the taps of a slice are apart
  for (int slice = 0; slice < g.slices; ++slice) {
    const int part_h = slice % parts_h, part_w = slice / parts_h % parts_w, td0 = slice / parts_h / parts_w;
    const int* taps = height.data() + part_h * g.taps_h;
    int low = std::numeric_limits<int>::max(), high = std::numeric_limits<int>::min();
    for (int k = 0; k < g.taps_h; ++k) {
      low = std::min(low, floor_div(offset(1, taps[k]), stride));
      high = std::max(high, floor_div(offset(1, taps[k]), stride));
    }
    g.first.push_back(low);
    g.span = std::max(g.span, high - low);
    for (std::size_t c = 0; c + 1 < g.class_begin.size(); ++c) g.residue.push_back(residue_of(taps[g.class_begin[c]]));
    for (int k = 0; k < g.taps_h; ++k) g.back.push_back(floor_div(offset(1, taps[k]), stride) - low);
    for (int z = 0; z < g.depths; ++z) g.depth.push_back(offset(0, td0 + z));
    const int tw0 = std::min(part_w * width, kw - 1), tw1 = std::min(tw0 + width, kw);
    g.column.push_back(offset(2, tw0));
    reach = std::max(reach, offset(2, tw1 - 1) - offset(2, tw0));
    for (int i = 0; i < g.sets * tap_rows; ++i) {
      const int z = i / width, tw = tw0 + i % width;
      const bool exists = part_w * width < kw && z < g.depths && tw < tw1;
      g.tap_depth.push_back(exists ? z : 0);
      g.tap_word.push_back(exists ? offset(2, tw) - offset(2, tw0) : 0);  // choose_tile adds the depth
    }
    for (int set = 0; set < g.sets; ++set)
      for (int k = 0; k < g.taps_h; ++k)
        for (int row = 0; row < tap_rows; ++row) {
          const int i = set * tap_rows + row, z = i / width, tw = tw0 + i % width;
          const bool exists = part_w * width < kw && z < g.depths && tw < tw1;
          g.slice_tap.push_back(exists ? ((td0 + z) * kh + taps[k]) * kw + tw : -1);
        }
  }
  g.vectors = reach;  // until the tile is known
  return true;
}

// Cycles of one step of a block, and the tile and stages that make the whole cheapest. Products take half of what shared
// memory delivers; the rest is rows, copies and rounding. On an H100 ten layers took 1.38 times the price on average, with
// a spread of 12 %, as tap_gemm_grad_weight_sm90 takes 1.5 times its own: the factor is left out so that both compare.
void choose_tile(const Problem& problem, const Device& device, const Config& config, Geometry& g) {
  const int reach = g.vectors, classes = static_cast<int>(g.class_begin.size()) - 1;
  const int stride = static_cast<int>(problem.stride[2]), block_m = g.channels * g.m_blocks;
  const bool images = images_are_rows(problem);
  const int bytes = copy_bytes(problem, images);
  const double conflict = stride % 4 == 0 ? 4 : stride % 2 == 0 ? 2 : 1;
  const int co = static_cast<int>(std::min<int64_t>(problem.out_channels / problem.groups, block_m));
  const int ci = static_cast<int>(std::min<int64_t>(problem.in_channels / problem.groups, config.block_n));
  double best = std::numeric_limits<double>::max();
  Geometry chosen = g;
  for (int tile = 16; tile <= config.block_k; tile *= 2) {
    const int64_t words = int64_t{stride} * (tile - 1) + reach + 1 + 3;
    if (words > 16384) continue;
    const int vectors = static_cast<int>(ceil_div(words, 4)), pitch = vectors * 4 + (vectors % 2 == 0 ? 4 : 0);
    const std::size_t input_bytes = static_cast<std::size_t>(tile) / 4 * (config.block_n + 1) * 16;
    const std::size_t grad_bytes = static_cast<std::size_t>(g.depths) * classes * block_m * pitch * 4;
    const std::size_t available = device.shared_memory_per_block - 1024;
    if (g.span * input_bytes >= available) continue;
    // Two stages less than there are hold copies on their way: 128 KB keep memory busy, however small a stage is.
    const std::size_t useful = std::clamp<std::size_t>(128 * 1024 / (input_bytes + grad_bytes) + 3, 4, 16);
    const int stages =
        static_cast<int>(std::min(useful, (available - g.span * input_bytes) / (input_bytes + grad_bytes)));
    if (stages < config.stages) continue;
    const double parts = tile / 8.0, sets = g.sets * g.m_blocks;
    const double products = parts * sets * g.taps_h * std::max(config.block_n / 2.0, 16.0) / 0.92;
    const double input_words = double(ci) * tile, grad_words = double(g.depths) * classes * co * 4 * vectors;
    const double access = parts * sets * (classes * 16.0 * conflict + g.taps_h * config.block_n / 4.0) +
                          (3 * input_words + grad_words) / 32;
    // What a warp that loads issues, at 3.5 cycles an instruction: about 200 a step, 30 a row, 5 a copy of grad_output and
    // 20 a piece of the input, which is rounded.
    const double lanes = block_m >= 16 ? 8 : 16, rows = double(g.depths) * classes;
    const double issue = 700 + rows * (100 + std::ceil(vectors / lanes) * ceil_div(co * int(lanes), 128) * 18) +
                         std::ceil(input_words * 4 / bytes / 128) * (bytes == 16  ? 65
                                                                     : bytes == 8 ? 45
                                                                                  : 35);
    const double memory = (input_words + grad_words) * 4 / 18;
    const double cycles =
        std::max({products, access, issue, memory * (stages < 3 ? 1.5 : 1)}) + 0.15 * std::min(products, access) + 150;
    const int64_t strips = ceil_div(problem.input[2], tile);
    const double cost = cycles * static_cast<double>(strips) * g.slices;
    if (cost >= best) continue;
    best = cost;
    chosen.tile = tile, chosen.vectors = vectors, chosen.pitch = pitch, chosen.stages = stages;
    chosen.strips = strips;
    chosen.shared_bytes = (stages + g.span) * input_bytes + stages * grad_bytes;
    chosen.step_cycles = cycles;
  }
  g = chosen;
  if (g.tile == 0) return;
  for (std::size_t i = 0; i < g.tap_word.size(); ++i) g.tap_word[i] += g.tap_depth[i] * classes * block_m * g.pitch;
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config) {
  Geometry g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_weight");
  if (problem.dtype != DType::f32) return refuse(std::string(to_string(problem.dtype)) + " is not f32");
  if (problem.precision == Precision::fp32) return refuse("fp32 accuracy: wgmma truncates its sums");
  if (problem.layout == Layout::channels_last) return refuse("layout channels_last");
  const int64_t ci = problem.in_channels / std::max<int64_t>(1, problem.groups);
  const int64_t co = problem.out_channels / std::max<int64_t>(1, problem.groups);
  if (ci == 0 || co == 0) return refuse("no channels");
  if (volume(problem.kernel) > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " taps");
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 1024)
      return refuse("stride or kernel extent too large for the tables");
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 3; ++dim)
    if (std::max(problem.input[dim] * problem.stride[dim], output[dim]) > (int64_t{1} << 30))
      return refuse("more than 2^30 positions in a dimension");
  if (problem.batch > (1 << 30)) return refuse("batch above 2^30");
  if (config.block_m > 8 && config.block_m / 2 >= co) return refuse("block_m is over twice the output channels");
  if (config.block_n > 8 && config.block_n / 2 >= ci) return refuse("block_n is over twice the input channels");
  g.warpgroups = config.warps / 4;
  g.channels = std::min(config.block_m, 64);
  g.m_blocks = config.block_m / g.channels;
  g.blocks_m = static_cast<int>(ceil_div(co, config.block_m));
  g.blocks_n = static_cast<int>(ceil_div(ci, config.block_n));
  const bool images = images_are_rows(problem);
  g.rows = images ? problem.batch : problem.input[1];

  // Of the ways to divide the taps, the one that costs least. Sums: 96 of 152 registers, 144 of 208.
  const int most = g.warpgroups == 3 ? 96 : 144;
  const int kw = static_cast<int>(problem.kernel[2]), kh = static_cast<int>(problem.kernel[1]);
  double best = std::numeric_limits<double>::max();
  const Geometry empty = g;
  for (int fixed = problem.kernel[0] > 1 ? 0 : 1; fixed <= 1; ++fixed)
    for (int parts_w = 1; parts_w <= (fixed == 0 ? 1 : std::min(kw, 16)); ++parts_w)
      for (int parts_h = 1; parts_h <= std::min(kh, 64); ++parts_h) {
        if (kh % parts_h != 0 || (parts_w - 1) * ceil_div(kw, parts_w) >= kw) continue;
        Geometry candidate = empty;
        const int tap_rows = 64 / g.channels;
        const int row_taps = static_cast<int>(fixed == 0 ? problem.kernel[0] * kw : ceil_div(kw, parts_w));
        if (ceil_div(row_taps, tap_rows) * g.m_blocks * (kh / parts_h) * config.block_n / 2 > most * g.warpgroups)
          continue;  // before tables are made
        if (!divide(problem, fixed, parts_w, parts_h, candidate)) continue;
        if (candidate.own * (candidate.taps_h * config.block_n / 2 + 4) > most + 8 || candidate.own > 8) continue;
        choose_tile(problem, device, config, candidate);
        if (candidate.tile == 0) continue;
        const double cost = candidate.step_cycles * static_cast<double>(candidate.strips) * candidate.slices *
                            static_cast<double>(candidate.rows + candidate.span);
        if (cost >= best) continue;
        best = cost;
        g = candidate;
      }
  if (g.tile == 0) return refuse("no division of the taps fits registers and shared memory");
  if (config.split > 2 && (g.own > 1 || g.tile < 64))
    return refuse("more than two products under way: several sets of rows or few steps make the compiler wait");
  g.item_steps = g.rows + g.span;
  const int64_t items = g.strips * (images ? 1 : problem.input[0] * problem.batch);
  g.steps = g.rows == 0 ? 0 : items * g.item_steps;
  const int64_t others = problem.groups * g.blocks_m * g.blocks_n * g.slices;
  g.shares = shares_of(others, g.steps / (4 + 4 * g.span), device.multiprocessors);
  g.blocks = others * g.shares;
  return g;
}

int64_t block_floats(const Config& config, const Geometry& g) {
  return int64_t{g.sets} * g.taps_h * 64 * config.block_n;
}

std::size_t partial_floats(const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(g.blocks * g.m_blocks * block_floats(config, g));
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
  const double steps = static_cast<double>(ceil_div(g.steps, g.shares));
  const double starts = 1 + steps / static_cast<double>(std::max<int64_t>(1, g.item_steps));
  // A block's first steps wait for memory alone, the last for the partial sums.
  const double compute = rounds * (steps * g.step_cycles + starts * g.span * 600.0 + 6000.0) / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.8) * 1e6;
  const double partial =
      2.0 * 4.0 * static_cast<double>(partial_floats(config, g)) / (device.bandwidth_tbs * 1e12) * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.2 * std::min(compute, traffic) + partial + 6.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Config& config = step.config;
  const Geometry g = geometry(step.problem, step.device, config);
  const std::string layer = layer_prelude(step);
  std::ostringstream text;
  text << layer;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TAPS", g.sets * g.taps_h * (64 / g.channels));
  define("TG_SLICES", g.slices);
  define("TG_CHANNELS", g.channels);
  define("TG_BN", config.block_n);
  define("TG_BLOCKS_M", g.blocks_m * g.m_blocks);
  define("TG_BLOCKS_N", g.blocks_n);
  define("TG_WARPGROUP", 1);
  define("TG_BLOCK_FLOATS", block_floats(config, g));
  define("TG_SLICE_TAP", list(g.slice_tap));
  const std::string finish = text.str();
  define("RW_M", config.block_m);
  define("RW_M_BLOCKS", g.m_blocks);
  define("RW_CHANNELS", g.channels);
  define("RW_N", config.block_n);
  define("RW_BLOCKS_M", g.blocks_m);
  define("RW_BLOCKS_N", g.blocks_n);
  define("RW_SLICES", g.slices);
  define("RW_WARPGROUPS", g.warpgroups);
  define("RW_SETS", g.sets);
  define("RW_OWN", g.own);
  define("RW_TAPS_H", g.taps_h);
  define("RW_CLASSES", g.class_begin.size() - 1);
  // An expression and no table: sums must not be indexed by what the compiler looks up.
  std::string class_of = "0";
  for (std::size_t c = 1; c + 1 < g.class_begin.size(); ++c)
    class_of = "((k) < " + std::to_string(g.class_begin[c]) + " ? " + class_of + " : " + std::to_string(c) + ')';
  define("RW_CLASS_OF(k)", class_of);
  define("RW_DEPTHS", g.depths);
  define("RW_SPAN", g.span);
  define("RW_TILE", g.tile);
  define("RW_VECTORS", g.vectors);
  define("RW_PITCH", g.pitch);
  define("RW_STAGES", g.stages);
  define("RW_UNDER_WAY", std::max(2, config.split));
  define("RW_FLUSH", std::max(1, kFlush / g.tile));
  define("RW_FIRST", list(g.first));
  define("RW_RESIDUE", list(g.residue));
  define("RW_BACK", list(g.back));
  define("RW_DEPTH", list(g.depth));
  define("RW_COLUMN", list(g.column));
  define("RW_TAP_WORD", list(g.tap_word));
  define("RW_TAP_DEPTH", list(g.tap_depth));
  text << product_text(DType::f32, config.block_n);
  const std::string common = text.str();
  auto gemm = [&](int bytes, bool on_demand) {
    return Unit{"ring_gemm_grad_weight_sm90.cu",
                "ring_gemm_grad_weight",
                common + "#define RW_COPY_BYTES " + std::to_string(bytes) + '\n',
                128 * (g.warpgroups + 1),
                g.shared_bytes,
                100,
                on_demand};
  };
  const int bytes = copy_bytes(step.problem, images_are_rows(step.problem));
  std::vector<Unit> units{gemm(bytes, false),
                          {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
                          {"channel_sum.cu", "channel_sum", layer, 256, 0},
                          {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
  if (bytes > 4) units.push_back(gemm(4, true));  // for an input that starts off such a boundary
  return units;
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

// Kernel parameters of ring_gemm_grad_weight.
struct Arguments {
  const void* input;
  const void* grad_output;
  void* partial;
  long long input_image, input_slab, input_row, input_channel;
  long long grad_image, grad_slab, grad_row, grad_channel;
  int input_size[3], grad_size[3];
  int strips, shares, item_steps;
  long long steps;
};

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  const Dims output = output_size(problem);
  const bool images = images_are_rows(problem);
  Arguments args{};
  args.input = tensors.input;
  args.grad_output = tensors.grad_output;
  args.partial = tensors.workspace;
  args.input_channel = volume(problem.input);
  args.grad_channel = volume(output);
  args.input_image = args.input_channel * problem.in_channels;
  args.grad_image = args.grad_channel * problem.out_channels;
  args.input_slab = problem.input[1] * problem.input[2];
  args.grad_slab = output[1] * output[2];
  args.input_row = images ? args.input_image : problem.input[2];
  args.grad_row = images ? args.grad_image : output[2];
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(images && dim == 1 ? problem.batch : problem.input[dim]);
    args.grad_size[dim] = static_cast<int>(images && dim == 1 ? problem.batch : output[dim]);
  }
  args.strips = static_cast<int>(g.strips);
  args.shares = g.shares;
  args.item_steps = static_cast<int>(g.item_steps);
  args.steps = g.steps;
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(tensors.input) % static_cast<unsigned>(copy_bytes(problem, images)) == 0;
  void* pointers[] = {&args};
  launch(aligned ? function(step) : loaded_of(step).on_demand[0]->get(step.device), {static_cast<unsigned>(g.blocks)},
         stream, pointers);
  launch_sums(step, tensors, stream, g.blocks / g.shares * g.m_blocks * block_floats(step.config, g), g.shares,
              partial_floats(step.config, g));
}

}  // namespace

extern const Kernel ring_gemm_grad_weight_sm90;
const Kernel ring_gemm_grad_weight_sm90{
    "ring_gemm_grad_weight_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
