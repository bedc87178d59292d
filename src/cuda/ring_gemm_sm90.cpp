// ring_gemm_sm90 — host side: tile geometry, price, specialisation and launch of ring_gemm_sm90.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <map>
#include <sstream>

#include "driver.h"
#include "ring_geometry.h"
#include "tensor_map.h"
#include "tile_geometry.h"
#include "wgmma_product.h"

namespace tconv::cuda {

using namespace ring;

namespace {

using std::int64_t;

// block_m 64 rows times the neighbouring results of a row that are folded into them (few channels would leave rows
// empty), block_n positions a warpgroup at most, block_k words per chunk, stages: warps that load (1: the copy engine
// does), warps: all; what is left of them stores. split 1: every phase pair an item of its own; 2: the warpgroups take
// neighbouring row blocks at the same positions; 4: blocks walk along the depth (the height of 2d layers), so that
// neighbouring items share what is staged of the source; 8: a pass has only so many width phases as have the same shifts.
// 24 warps have 80 registers each: fp32 rows of 32 words spill there.
#define SPLITS(m, n, k, s, w) {m, n, k, s, w, 0}, {m, n, k, s, w, 1}, {m, n, k, s, w, 2}, {m, n, k, s, w, 3}
#define CHUNKS(m, n, s, w) SPLITS(m, n, 8, s, w), SPLITS(m, n, 16, s, w), SPLITS(m, n, 32, s, w)
#define WALKS(m, n, s, w) {m, n, 16, s, w, 4}, {m, n, 32, s, w, 4}, {m, n, 16, s, w, 6}, {m, n, 32, s, w, 6}
#define WIDTHS(m, n, s, w) {m, n, 32, s, w, 8}, {m, n, 32, s, w, 9}, {m, n, 32, s, w, 10}, {m, n, 32, s, w, 11}
constexpr Config kConfigs[] = {
    CHUNKS(64, 184, 3, 16),  CHUNKS(64, 120, 7, 20),   CHUNKS(64, 120, 3, 20),    CHUNKS(64, 64, 7, 20),
    CHUNKS(64, 64, 3, 20),   SPLITS(64, 64, 8, 7, 24), SPLITS(64, 64, 16, 7, 24), CHUNKS(64, 32, 7, 20),
    CHUNKS(128, 184, 3, 16), CHUNKS(128, 120, 7, 20),  CHUNKS(256, 184, 3, 16),   CHUNKS(256, 120, 7, 20),
    CHUNKS(512, 120, 7, 20), CHUNKS(512, 64, 7, 20),   CHUNKS(64, 200, 1, 16),    CHUNKS(64, 136, 1, 20),
    CHUNKS(64, 96, 1, 20),   CHUNKS(64, 48, 1, 20),    CHUNKS(128, 200, 1, 16),   CHUNKS(256, 200, 1, 16),
    WALKS(64, 128, 7, 20),   WALKS(64, 128, 3, 20),    WALKS(64, 200, 1, 16),     WALKS(64, 136, 1, 20),
    WALKS(64, 96, 1, 20),    WIDTHS(64, 96, 1, 20),    WIDTHS(64, 136, 1, 20),    WIDTHS(64, 48, 1, 20)};

// A copy of the source holds so many images as fit the first number, at least one; that may not be over the second.
constexpr std::size_t kWantedPackedBytes = std::size_t{256} << 20, kMostPackedBytes = std::size_t{512} << 20;

std::size_t packed_words(const Problem& problem, const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(problem.groups) * g.row_blocks * g.num_entries * g.chunks * config.block_k * 64;
}

// Bytes of a copy of one image, of the whole batch where images are rows.
std::size_t packed_image_bytes(const Problem& problem, const Config& config, const Geometry& g) {
  if (!g.packed) return 0;
  return static_cast<std::size_t>((g.rows_are_images ? problem.batch : 1) * problem.groups *
                                  volume(g.forward ? problem.input : output_size(problem))) *
         static_cast<std::size_t>(g.chunks * config.block_k) * 4;
}
// Images that one pair of launches takes: all, or what the copy holds.
int64_t images_at_once(const Problem& problem, const Config& config, const Geometry& g) {
  const std::size_t image = packed_image_bytes(problem, config, g);
  if (image == 0 || g.batch <= 1) return std::max<int64_t>(g.batch, 1);
  const int64_t most = std::clamp<int64_t>(static_cast<int64_t>(kWantedPackedBytes / image), 1, g.batch);
  return ceil_div(g.batch, ceil_div(g.batch, most));  // pieces of about the same size
}
// Bytes of the source's copy, behind the weights in the workspace.
std::size_t packed_source_bytes(const Problem& problem, const Config& config, const Geometry& g) {
  return packed_image_bytes(problem, config, g) * static_cast<std::size_t>(images_at_once(problem, config, g));
}
std::size_t weight_workspace(const Problem& problem, const Config& config, const Geometry& g) {
  return (packed_words(problem, config, g) * 4 + 255) / 256 * 256;
}

// Whether the copy engine brings rows of the source: it takes those that are multiples of 16 bytes, and channels behind a
// group's are another's.
bool brings_rows(const Problem& problem, const Config& config, const Geometry& g) {
  return g.rows && g.source_size[2] * static_cast<int64_t>(size_of(problem.dtype)) % 16 == 0 &&
         (problem.groups == 1 || g.words % config.block_k == 0) && has_tensor_maps();
}

// Whether the program is one for sources that start on a 16-byte boundary, and others have one of their own: a first call
// should not wait for code that it does not run.
bool wants_alignment(const Problem& problem, const Config& config, const Geometry& g) {
  if (g.tensor) return false;
  return problem.layout == Layout::channels_last ? g.vector : brings_rows(problem, config, g);
}

Fit fit(const Problem& layer, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  if (device.backend != Backend::cuda || device.compute_capability != 90) {
    fit.refusal = "needs compute capability 9.0 (wgmma)";
    return fit;
  }
  const Problem problem = seen_by(config, layer);
  thread_local Problem cached_layer;
  thread_local std::map<int, Geometry> cached_layers;  // by layer_key
  if (!(cached_layer == layer)) {
    cached_layers.clear();
    cached_layer = layer;
  }
  auto cached = cached_layers.find(layer_key(config));
  if (cached == cached_layers.end())
    cached = cached_layers.emplace(layer_key(config), layer_geometry(problem, config)).first;
  const Geometry g = geometry(problem, epilogue, device, config, cached->second);
  fit.refusal = g.refusal;
  if (fit && problem.batch * volume(g.forward ? problem.input : output_size(problem)) == 0)
    fit.refusal = "empty source";
  if (!fit) return fit;
  const int64_t items = num_items(problem, config, g);
  if (items >= (int64_t{1} << 31)) {
    fit.refusal = "more than 2^31 items";
    return fit;
  }
  if (packed_source_bytes(problem, config, g) > kMostPackedBytes) {
    fit.refusal = "a copy of the source would take more than 512 MiB";
    return fit;
  }
  if (g.tensor && !has_tensor_maps()) {
    fit.refusal = "the driver cannot describe tensors to the copy engine (needs CUDA 12.0)";
    return fit;
  }
  if (packed_words(problem, config, g) >= (std::size_t{1} << 31)) {
    fit.refusal = "more than 2^31 packed words";
    return fit;
  }
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double pieces = static_cast<double>(ceil_div(g.batch, images_at_once(problem, config, g)));
  const double rounds =
      pieces * static_cast<double>(ceil_div(ceil_div(items, static_cast<int64_t>(pieces)), device.multiprocessors));
  // Ends: the first loads have nothing to hide behind, nor the last store.
  const double compute = (rounds * item_cycles(problem, epilogue, config, g) + pieces * 4560.0) / clock * 1e6;
  // A packed source is written, and read again: from L2 where it fits.
  const double packed_bytes = pieces * static_cast<double>(packed_source_bytes(problem, config, g));
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6;
  const double packing =
      packed_bytes == 0 ? 0 : packed_bytes * 2.2 / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6 + 2.0 * pieces;
  // 15: two launches, the weights' packing, and what a block does before its first stage.
  fit.microseconds = std::max(compute, traffic) + 0.15 * std::min(compute, traffic) + packing + 11.0 + 3.8 * pieces;
  fit.workspace_bytes = weight_workspace(problem, config, g) + packed_source_bytes(problem, config, g);
  for (const Op& op : epilogue.ops) {
    if (is_norm(op.kind)) break;
    ++fit.fused_ops;
  }
  return fit;
}

std::vector<Config> tiles_of(const Problem& problem, const Epilogue& epilogue, const Device& device,
                             const Config& config) {
  const Problem seen = seen_by(config, problem);
  return tiles(seen, epilogue, device, config, layer_geometry(seen, config));
}

std::vector<Unit> units(const Step& given) {
  Step step = given;
  step.problem = seen_by(step.config, step.problem);
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.epilogue, step.device, config, layer_geometry(problem, config));
  std::ostringstream text;
  text << layer_prelude(step);
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("RG_FORWARD", g.forward ? 1 : 0);
  define("RG_K", g.k);
  define("RG_N_CHANNELS", g.n);
  define("RG_NUM_TAPS", g.num_taps);
  define("RG_NUM_ENTRIES", g.num_entries);
  define("RG_NUM_LIVE", g.num_live);
  define("RG_CHANNELS", g.channels);
  // Two phases: rows r and r + 8, which one thread holds, so that it can store them interleaved.
  define("RG_ROW_CHANNEL(row)", g.num_live == 1   ? "(row)"
                                : g.num_live == 2 ? "((row) / 16 * 8 + (row) % 8)"
                                                  : "((row) / RG_NUM_LIVE)");
  define("RG_ROW_LIVE(row)", g.num_live == 1 ? "0" : g.num_live == 2 ? "((row) / 8 % 2)" : "((row) % RG_NUM_LIVE)");
  define("RG_KC", config.block_k);
  define("RG_CHUNKS", g.chunks);
  define("RG_ROW_BLOCKS", g.row_blocks);
  std::vector<int> begin{0}, word, phase, tap, entry_pass, entry_count, pass_row;
  const int kh = static_cast<int>(problem.kernel[1]), kw = static_cast<int>(problem.kernel[2]);
  const int rows_d = static_cast<int>(g.staged[0].base.size()) * g.staged[0].length;
  const int rows_h = static_cast<int>(g.staged[1].base.size()) * g.staged[1].length;
  const int length = g.staged[2].length;
  for (const Pass& pass : *g.passes) {
    phase.insert(phase.end(), pass.phase, pass.phase + 3);
    int last_row = 0;
    for (const Entry& entry : pass.entries) {
      const int in_row = g.staged[2].tap_word[entry.shift_w];     // plane * length + column
      const int depth = g.offset[0][entry.tap_d] - g.window_low;  // row of the window
      const int plane = in_row / length * rows_d + (g.window > 0 ? 0 : g.staged[0].tap_word[entry.tap_d]);
      const int in_rows = g.staged[1].tap_word[entry.tap_h];  // plane * length + row
      if (g.tensor) {                                         // units: the box, then its rows
        const int high = g.staged[1].length, planes_h = rows_h / high;
        word.push_back(((plane * planes_h + in_rows / high) * g.box + in_rows % high * length + in_row % length) *
                       (config.block_k / 4));
      } else {
        word.push_back((plane * rows_h + in_rows) * length + in_row % length);
      }
      if (g.window > 0) word.back() |= depth << 24, last_row = std::max(last_row, depth);
      for (int t : entry.tap_w) tap.push_back(t < 0 ? -1 : (entry.tap_d * kh + entry.tap_h) * kw + t);
    }
    entry_pass.resize(word.size(), begin.back());
    entry_count.resize(word.size(), static_cast<int>(pass.entries.size()));
    begin.push_back(static_cast<int>(word.size()));
    pass_row.push_back(last_row);
  }
  define("RG_ENTRY_BEGIN", list(begin));
  define("RG_NUM_PASSES", g.passes->size());
  // Stores of passes without taps are left out where a chain makes them long to compile; elsewhere the compiler lays out
  // the other stores better beside them (kernelbench_1_79 in fp16).
  const bool empty_passes = static_cast<std::size_t>(g.live_passes) < g.passes->size() || step.epilogue.ops.empty();
  define("RG_EMPTY_PASSES", empty_passes ? 1 : 0);
  const std::string layer = text.str();
  define("RG_ENTRY_TAP", list(tap));
  define("RG_ENTRY_PASS", list(entry_pass));
  define("RG_ENTRY_COUNT", list(entry_count));
  define("RG_PACK_SOURCE", g.packed ? 1 : 0);
  const std::string pack = text.str();
  text.str("");
  text << layer;
  define("RG_STAGES", g.stages);
  define("RG_SLOTS", g.slots);
  define("RG_LOAD_WARPS", config.stages);
  define("RG_STORE_GROUPS", (config.warps - 9 - config.stages) / 4);
  define("RG_RESIDENT", g.resident ? 1 : 0);
  define("RG_WINDOW", g.window);
  define("RG_RACECHECK", std::getenv("TCONV_RACECHECK") != nullptr ? 1 : 0);
  define("RG_PASS_ROW", list(pass_row));
  define("RG_TENSOR", g.tensor ? 1 : 0);
  define("RG_BOX", g.box);
  define("RG_RAW_WIDE", g.raw_wide);
  define("RG_RAW_ROWS", g.raw_rows);
  define("RG_RAW_UNITS", g.raw_units);
  define("RG_RAW_SLOTS", g.raw_slots);
  define("RG_ROW_GROUPS", g.row_groups);
  define("RG_PART", g.part);
  define("RG_EARLY_EPILOGUE", g.early_epilogue ? 1 : 0);
  define("RG_HALF_SUMS", g.half_sums ? 1 : 0);
  define("RG_WEIGHT_STAGES", g.weight_stages);
  define("RG_WEIGHTS_STAY", g.weights_stay ? 1 : 0);
  define("RG_ENTRIES_PER_STAGE", g.entries_per_stage);
  define("RG_N", g.columns);
  define("RG_TH", g.th);
  define("RG_TW", g.tw);
  define("RG_TILE_H", g.group_rows ? 2 * g.th : g.th);
  define("RG_TILE_W", g.group_columns ? 2 * g.tw : g.tw);
  define("RG_GROUP_ROWS", g.group_rows);
  define("RG_GROUP_COLUMNS", g.group_columns);
  define("RG_NPD", g.staged[0].base.size());
  define("RG_NPH", g.staged[1].base.size());
  define("RG_NPW", g.staged[2].base.size());
  define("RG_JD", g.staged[0].length);
  define("RG_JH", g.staged[1].length);
  define("RG_JW", g.staged[2].length);
  define("RG_PLANE", g.plane);
  define("RG_SPAN_BEGIN", '(' + std::to_string(g.span_begin) + ')');
  define("RG_SPAN", g.span);
  const char* names[2] = {"D", "H"};
  for (int dim = 0; dim < 2; ++dim) {
    const auto [low, high] = reach_of(g, dim);
    define((std::string("RG_LOW_") + names[dim]).c_str(), '(' + std::to_string(low) + ')');
    define((std::string("RG_HIGH_") + names[dim]).c_str(), '(' + std::to_string(high) + ')');
  }
  define("RG_SRC_D", g.source_step[0]);
  define("RG_SRC_H", g.source_step[1]);
  define("RG_SRC_W", g.source_step[2]);
  define("RG_OUT_D", g.result_step[0]);
  define("RG_OUT_H", g.result_step[1]);
  define("RG_OUT_W", g.result_step[2]);
  define("RG_PW", g.width_phases);
  define("RG_PASS_PER_ITEM", splits_passes(config) ? 1 : 0);
  define("RG_STAGE_PITCH", g.stage_pitch);
  define("RG_SUM_WORDS", g.sum_words);
  define("RG_WIDE_PAIRS", size_of(step.epilogue.output_dtype.value_or(problem.dtype)) == 2 ? 1 : 0);
  define("RG_PLANES_D", list(g.staged[0].base));
  define("RG_PLANES_H", list(g.staged[1].base));
  define("RG_PLANES_W", list(g.staged[2].base));
  define("RG_LIVE", list(g.live));
  define("RG_PASS", list(phase));
  define("RG_ENTRY_WORD", list(word));
  text << shared_product_text(problem.dtype, g.columns);
  const std::string common = text.str();
  auto gemm = [&](bool rows, bool vector, bool on_demand) {
    return Unit{"ring_gemm_sm90.cu",
                "ring_gemm",
                common + "#define RG_ROWS " + (rows ? "1" : "0") + "\n#define RG_VECTOR " + (vector ? "1" : "0") + '\n',
                config.warps * 32,
                g.shared_bytes,
                100,
                on_demand};
  };
  std::vector<Unit> units{gemm(brings_rows(problem, config, g), g.vector, false),
                          {"ring_gemm_pack_sm90.cu", "ring_gemm_pack", pack, 256, 0}};
  if (wants_alignment(problem, config, g))
    units.push_back(gemm(false, g.vector && problem.layout == Layout::contiguous, true));
  return units;
}

struct Ready : Loaded {
  Problem problem;  // as the config sees it
  Geometry geometry;
  bool brings_rows = false;
  int64_t items = 0, images_at_once = 0;
  unsigned pack_blocks = 0;
  std::vector<std::size_t> tensor_operands;  // slots of operands with a value per element
};

void prepare_launch(Step& step) {
  auto ready = std::make_shared<Ready>(load_units(step));
  ready->problem = seen_by(step.config, step.problem);
  ready->geometry =
      geometry(ready->problem, step.epilogue, step.device, step.config, layer_geometry(ready->problem, step.config));
  ready->brings_rows = brings_rows(ready->problem, step.config, ready->geometry);
  ready->items = num_items(ready->problem, step.config, ready->geometry);
  ready->images_at_once = images_at_once(ready->problem, step.config, ready->geometry);
  for (std::size_t i = 0; i < step.epilogue.ops.size(); ++i)
    if (operand_kind(step.epilogue.ops[i].kind) == OperandKind::tensor)
      ready->tensor_operands.push_back(static_cast<std::size_t>(operand_offset(step.epilogue, static_cast<int>(i))));
  ready->pack_blocks = static_cast<unsigned>(step.problem.groups * ready->geometry.row_blocks * ready->geometry.chunks *
                                             ceil_div(step.config.block_k / 4, 4));
  step.state = std::shared_ptr<Loaded>(ready);
}

// Elements between neighbours of a tensor with `channels` channels: images, depths, rows, and channels or positions.
void strides_of(long long (&stride)[4], const Problem& problem, const Geometry& g, int64_t channels, const Dims& size) {
  const int64_t plane = volume(size);
  const bool last = problem.layout == Layout::channels_last;
  stride[0] = channels * plane;
  stride[2] = g.rows_are_images ? stride[0] : size[2] * (last ? channels : 1);
  stride[1] = size[1] * size[2] * (last ? channels : 1);
  stride[3] = last ? channels : plane;
}

// What the copy engine stages: the tensor itself, or the copy of it with channels side by side.
TensorView view_of(const Problem& problem, const Config& config, const Geometry& g, const void* first,
                   const long long (&stride)[4]) {
  const int size = static_cast<int>(size_of(problem.dtype));
  TensorView view;
  view.first = first;
  view.element_bytes = size;
  view.exchange_bytes = config.block_k * 4;
  const int64_t channels = g.packed ? int64_t{g.chunks} * config.block_k * 4 / size : int64_t{g.k} * problem.groups;
  view.size[0] = channels;
  for (int dim = 0; dim < 3; ++dim) view.size[1 + dim] = g.source_size[2 - dim];
  view.size[4] = g.rows_are_images ? (g.packed ? problem.groups : 1) : g.batch * (g.packed ? problem.groups : 1);
  const int64_t position = channels * size;
  view.stride[0] = position;
  if (g.packed) {
    const int64_t plane =
        position * (g.rows_are_images ? g.source_size[2] : g.source_size[0] * g.source_size[1] * g.source_size[2]);
    view.stride[1] = g.rows_are_images ? plane * problem.groups : position * g.source_size[2];
    view.stride[2] = view.stride[1] * g.source_size[1];
    view.stride[3] = plane;
  } else {
    view.stride[1] = stride[2] * size, view.stride[2] = stride[1] * size, view.stride[3] = stride[0] * size;
  }
  view.box[0] = config.block_k * 4 / size;
  view.step[1] = g.source_step[2], view.step[2] = g.source_step[1];
  view.box[1] = (g.staged[2].length - 1) * view.step[1] + 1;
  view.box[2] = (g.staged[1].length - 1) * view.step[2] + 1;
  return view;
}

// Rows of a contiguous tensor, for a chunk of channels.
TensorView rows_of(const Problem& problem, const Geometry& g, const void* first, const long long (&stride)[4]) {
  const int size = static_cast<int>(size_of(problem.dtype)), unit = 16 / size;
  TensorView view;
  view.first = first;
  view.element_bytes = size;
  const int64_t sizes[5] = {g.source_size[2], g.source_size[1], g.source_size[0], int64_t{g.k} * problem.groups,
                            g.batch};
  std::copy(sizes, sizes + 5, view.size);
  const int64_t strides[4] = {stride[2], stride[1], stride[3], stride[0]};
  for (int i = 0; i < 4; ++i) view.stride[i] = strides[i] * size;
  view.step[1] = g.source_step[1];
  view.box[0] = g.raw_wide * unit;
  view.box[1] = (g.raw_rows - 1) * view.step[1] + 1;
  view.box[3] = g.raw_units * unit;
  return view;
}

void launch_packing(const Step& step, const Tensors& tensors, const Ready& ready, const void* source,
                    const long long (&stride)[4], int64_t images, bool with_weights, Stream stream) {
  const Problem& problem = ready.problem;
  const Geometry& g = ready.geometry;
  const void* weight = tensors.weight;
  void* packed = tensors.workspace;
  unsigned blocks = ready.pack_blocks, weight_grid = with_weights ? std::min(16384u, blocks) : 0;
  struct {
    const void* source;
    void* packed;
    long long image, inner, plane;
    int tiles, pairs;
    unsigned blocks;
  } copy{};
  unsigned grid = weight_grid;
  if (g.packed) {
    copy.source = source;
    copy.packed = static_cast<char*>(packed) + weight_workspace(problem, step.config, g);
    copy.image = stride[0], copy.inner = stride[3];
    copy.plane = volume(g.forward ? problem.input : output_size(problem));
    copy.tiles = static_cast<int>(ceil_div(copy.plane, 2048 / step.config.block_k));  // kTile of the kernel
    copy.pairs = copy.plane % 2 == 0 && reinterpret_cast<std::uintptr_t>(source) % 4 == 0;
    copy.blocks =
        static_cast<unsigned>((g.rows_are_images ? problem.batch : images) * problem.groups * copy.tiles * g.chunks);
    grid += std::min(65536u, copy.blocks);
  }
  int weight_last = tensors.weight_channels_last;
  void* args[] = {&weight, &packed, &blocks, &weight_last, &weight_grid, &copy};
  launch(*ready.functions[1], {grid}, stream, args);
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Current current(step.device.index);  // for the tensor maps
  const Ready& ready = static_cast<const Ready&>(loaded_of(step));
  const Geometry& g = ready.geometry;
  const Problem& problem = ready.problem;
  if (ready.items == 0) return;
  struct {
    const void* source;
    const void* weights;
    const void* bias;
    void* result;
    long long source_stride[4], result_stride[4];
    int source_size[3], result_size[3], tiles[3];
    int segment, segments_d, segments_behind;
    unsigned items;
    int wide_stores;
    const void* operands[kMaxOperands];
    int tensor, tensor_channels, tensor_images, tensor_groups;
    TensorMap map;
  } args{};
  const Dims output = output_size(problem);
  const Dims& source = g.forward ? problem.input : output;
  const Dims& result = g.forward ? output : problem.input;
  args.source = g.forward ? tensors.input : tensors.grad_output;
  args.weights = tensors.workspace;
  args.bias = tensors.bias;
  args.result = tensors.output;
  strides_of(args.source_stride, problem, g, int64_t{g.k} * problem.groups, source);
  strides_of(args.result_stride, problem, g, int64_t{g.n} * problem.groups, result);
  for (int dim = 0; dim < 3; ++dim) {
    args.source_size[dim] = static_cast<int>(g.source_size[dim]);
    args.result_size[dim] = static_cast<int>(g.result_size[dim]);
    args.tiles[dim] = static_cast<int>(g.tiles[dim]);
  }
  args.segment = static_cast<int>(g.segment), args.segments_d = static_cast<int>(ceil_div(g.tiles[0], g.segment));
  args.segments_behind = static_cast<int>(g.tiles[1] * g.tiles[2] * ceil_div(g.row_blocks, g.row_groups));
  const bool aligned = reinterpret_cast<std::uintptr_t>(args.source) % 16 == 0;
  const Function& gemm =
      aligned || ready.on_demand.empty() ? *ready.functions[0] : ready.on_demand[0]->get(step.device);
  for (int i = 0; i < kMaxOperands; ++i) args.operands[i] = tensors.operands[i];
  if (g.tensor && (g.packed || aligned)) {
    const void* first = g.packed
                            ? static_cast<const char*>(tensors.workspace) + weight_workspace(problem, step.config, g)
                            : args.source;
    args.tensor = 1;
    args.tensor_channels = g.packed ? 0 : g.k;
    args.tensor_images = g.packed && !g.rows_are_images ? static_cast<int>(problem.groups) : 1;
    args.tensor_groups = g.packed ? 1 : 0;
    args.map = tensor_map(view_of(problem, step.config, g, first, args.source_stride));
  } else if (ready.brings_rows && aligned) {
    args.map = tensor_map(rows_of(problem, g, args.source, args.source_stride));
  }
  const int64_t size = static_cast<int64_t>(size_of(problem.dtype));
  const int64_t result_size = static_cast<int64_t>(size_of(step.epilogue.output_dtype.value_or(problem.dtype)));
  const int64_t wide = 16 / result_size, at_once = ready.images_at_once;
  void* pointers[] = {&args};
  for (int64_t image = 0; image < g.batch; image += at_once) {
    const int64_t images = std::min(at_once, g.batch - image);
    const void* from = static_cast<const char*>(args.source) + image * args.source_stride[0] * size;
    launch_packing(step, tensors, ready, from, args.source_stride, images, image == 0, stream);
    args.items = static_cast<unsigned>(ready.items / g.batch * images);
    args.result = static_cast<char*>(tensors.output) + image * args.result_stride[0] * result_size;
    const auto to = reinterpret_cast<std::uintptr_t>(args.result);
    args.wide_stores = problem.layout == Layout::channels_last
                           ? to % 16 == 0 && g.n % wide == 0 && g.channels % wide == 0
                           : to % 4 == 0 && result[2] % 2 == 0;
    for (std::size_t slot : ready.tensor_operands)
      args.operands[slot] = static_cast<const char*>(tensors.operands[slot]) + image * args.result_stride[0] * size;
    launch_behind(gemm, {static_cast<unsigned>(std::min<int64_t>(args.items, step.device.multiprocessors))}, stream,
                  pointers);
  }
}

}  // namespace

extern const Kernel ring_gemm_sm90;
const Kernel ring_gemm_sm90{"ring_gemm_sm90", kConfigs, fit, units, prepare_launch, launch_step, tiles_of};

}  // namespace tconv::cuda
