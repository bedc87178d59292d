// phase_gemm_sm90 — host side: tile geometry, price, specialisation and launch of phase_gemm_sm90.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <sstream>

#include "driver.h"
#include "lattice.h"
#include "tile_geometry.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m rows (channel x width phase), block_n positions at most, block_k words per chunk, stages 1 (the whole reduction
// fits one chunk) or 2, warps, split 1: every phase pair its own block.
#define SPLITS(m, n, k, s, w) {m, n, k, s, w, 0}, {m, n, k, s, w, 1}
#define CHUNKS(m, n, w) \
  SPLITS(m, n, 8, 1, w), SPLITS(m, n, 16, 1, w), SPLITS(m, n, 32, 1, w), SPLITS(m, n, 16, 2, w), SPLITS(m, n, 32, 2, w)
constexpr Config kConfigs[] = {CHUNKS(64, 256, 4),  CHUNKS(64, 128, 4),  CHUNKS(64, 64, 4),
                               CHUNKS(128, 256, 8), CHUNKS(128, 128, 8), CHUNKS(128, 64, 8)};
#undef CHUNKS
#undef SPLITS

constexpr int kMaxWidthPhases = 8;
constexpr int kMaxTaps = 4096;      // tables in constant memory
constexpr int kStageFloats = 8192;  // a part of the results on its way to whole lines: 64 channels x 128 positions

struct Entry {
  int tap_d, tap_h;
  int shift_w;             // where it reads
  std::vector<int> tap_w;  // per live width phase: the tap, or -1
};

struct Pass {
  int phase[3];
  std::vector<Entry> entries;
};

struct Geometry {
  std::string refusal;
  bool forward = true;
  int k = 0, n = 0, words = 0, chunks = 1, warpgroups = 1;
  int source_step[3] = {1, 1, 1}, result_step[3] = {1, 1, 1};
  std::vector<int> offset[3];
  int64_t lattice[3] = {1, 1, 1}, tiles[3] = {1, 1, 1};
  std::vector<Pass> passes;
  int num_entries = 0, num_taps = 1;
  int width_phases = 1, num_live = 1, channels = 64, row_blocks = 1;
  std::vector<int> live;
  int th = 1, tw = 1, columns = 8;  // columns: positions of a product
  Columns staged[3];
  int positions = 0, plane = 0;
  int part = 8, stage_pitch = 0, stage_words = 0;
  std::size_t shared_bytes = 0;
  int threads = 128, registers = 0, blocks_per_multiprocessor = 1;
};

Geometry layer_geometry(const Problem& problem) {
  Geometry g;
  g.forward = problem.direction == Direction::forward;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (!g.forward && problem.direction != Direction::grad_input)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not a phase product");
  if (problem.dtype == DType::f64) return refuse("f64 has no wgmma");
  if (problem.dtype == DType::f32 && problem.precision == Precision::fp32)
    return refuse("fp32 accuracy: wgmma truncates its sums");
  const int64_t ci = problem.in_channels / std::max<int64_t>(1, problem.groups);
  const int64_t co = problem.out_channels / std::max<int64_t>(1, problem.groups);
  if (ci == 0 || co == 0) return refuse("no channels");
  if (volume(problem.kernel) > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " taps");
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 4096)
      return refuse("stride or kernel extent too large for the tables");
  g.k = static_cast<int>(g.forward ? ci : co);
  g.n = static_cast<int>(g.forward ? co : ci);
  g.words = static_cast<int>(size_of(problem.dtype) == 2 ? ceil_div(g.k, 2) : g.k);
  g.num_taps = static_cast<int>(volume(problem.kernel));
  const Dims output = output_size(problem);
  std::vector<std::vector<Tap>> phases[3];
  for (int dim = 0; dim < 3; ++dim) {
    const int stride = static_cast<int>(problem.stride[dim]);
    g.offset[dim].resize(problem.kernel[dim]);
    if (g.forward) {
      phases[dim] = lattice(problem, dim).phases;
      for (const auto& taps : phases[dim])
        for (const Tap& tap : taps) g.offset[dim][tap.tap] = tap.shift;
      g.result_step[dim] = stride;
      g.lattice[dim] = ceil_div(output[dim], stride);
    } else {
      std::vector<Tap> all;
      for (int t = 0; t < problem.kernel[dim]; ++t) {
        g.offset[dim][t] = static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]);
        all.push_back({t, g.offset[dim][t]});
      }
      phases[dim] = {all};
      g.source_step[dim] = stride;
      g.lattice[dim] = problem.input[dim];
    }
  }
  const int width = static_cast<int>(phases[2].size());
  g.width_phases = std::min(width, kMaxWidthPhases);
  for (int rw = 0; rw < g.width_phases; ++rw)
    if (width > kMaxWidthPhases || !phases[2][rw].empty()) g.live.push_back(rw);
  if (g.live.empty()) g.live.push_back(0);
  g.num_live = static_cast<int>(g.live.size());
  g.channels = 64 / g.num_live;
  const int64_t passes =
      static_cast<int64_t>(phases[0].size()) * static_cast<int64_t>(phases[1].size()) * ceil_div(width, g.width_phases);
  if (passes > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " phases");
  for (int rd = 0; rd < static_cast<int>(phases[0].size()); ++rd)
    for (int rh = 0; rh < static_cast<int>(phases[1].size()); ++rh)
      for (int rw0 = 0; rw0 < width; rw0 += g.width_phases) {
        Pass pass{{rd, rh, rw0}, {}};
        std::map<int, std::vector<int>> by_shift;  // width shift -> tap per live phase
        for (int l = 0; l < g.num_live; ++l) {
          if (rw0 + g.live[l] >= width) continue;
          for (const Tap& tap : phases[2][rw0 + g.live[l]]) {
            auto& taps = by_shift.try_emplace(tap.shift, g.num_live, -1).first->second;
            taps[l] = tap.tap;
          }
        }
        for (const Tap& td : phases[0][rd])
          for (const Tap& th : phases[1][rh])
            for (const auto& [shift, taps] : by_shift) pass.entries.push_back({td.tap, th.tap, shift, taps});
        g.num_entries += static_cast<int>(pass.entries.size());
        g.passes.push_back(std::move(pass));
      }
  if (g.num_entries > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " tap shifts");
  return g;
}

// A fixed set, so that images of changing size share a few specialisations; the last ones fill a run to the end.
std::vector<int> tile_widths(int block_n, int halo) {
  std::vector<int> widths;
  for (int tw = 8; tw <= 224; tw += tw < 144 ? 8 : 16) widths.push_back(tw);
  for (int run : {32, 64, 128, block_n}) widths.push_back(run - halo);
  widths.push_back(block_n);
  return widths;
}

Geometry geometry(const Problem& problem, const Device& device, const Config& config, const Geometry& layer) {
  Geometry g = layer;
  if (!g.refusal.empty()) return g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  g.warpgroups = config.block_m / 64;
  g.threads = config.warps * 32;
  g.chunks = static_cast<int>(ceil_div(g.words, config.block_k));
  if ((config.stages == 1) != (g.chunks == 1))
    return refuse(g.chunks == 1 ? "one chunk needs no pipeline" : "several chunks need a pipeline");
  if (config.block_k > 8 && config.block_k / 2 >= g.words) return refuse("block_k is over twice the channels");
  if (config.split && g.passes.size() == 1) return refuse("one pass cannot be split");
  if (config.block_m > 64 && g.n <= g.channels) return refuse("one warpgroup holds all rows");
  g.row_blocks = static_cast<int>(ceil_div(g.n, int64_t{g.channels} * g.warpgroups));

  g.staged[0] = columns_of(1, g.source_step[0], g.offset[0]);
  const int halo = columns_of(8, g.source_step[2], g.offset[2]).length - 8;
  double best = std::numeric_limits<double>::max();
  for (int tw : tile_widths(config.block_n, halo)) {
    if (tw < 4 || tw > config.block_n) continue;
    const Columns columns = columns_of(tw, g.source_step[2], g.offset[2]);
    const int most = (config.block_n - tw) / columns.length + 1;
    for (int th : {most, static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(1, g.lattice[1])))}) {
      if (th > 256) continue;
      const Columns rows = columns_of(th, g.source_step[1], g.offset[1]);
      const int run = static_cast<int>(ceil_div((th - 1) * columns.length + tw, 8) * 8);
      const int64_t positions = static_cast<int64_t>(columns.base.size() * rows.base.size() * g.staged[0].base.size()) *
                                columns.length * rows.length * g.staged[0].length;
      const int64_t plane = ceil_div(positions + 8, 8) * 8;
      if (plane * 16 > 262128) continue;
      if (static_cast<std::size_t>(config.stages) * (config.block_k / 4) * plane * 16 + 1024 >
          device.shared_memory_per_block)
        continue;
      const int64_t tiles = ceil_div(g.lattice[1], th) * ceil_div(g.lattice[2], tw);
      const double cost =
          static_cast<double>(tiles) * (run + 0.6 * static_cast<double>(positions) + 16) * (1.0 + 6.0 / tw);
      if (cost < best) {
        best = cost;
        g.th = th, g.tw = tw, g.columns = run;
        g.staged[1] = rows, g.staged[2] = columns;
        g.positions = static_cast<int>(positions), g.plane = static_cast<int>(plane);
      }
    }
  }
  if (best == std::numeric_limits<double>::max()) return refuse("no tile fits shared memory");
  g.tiles[0] = std::max<int64_t>(1, g.lattice[0]);
  g.tiles[1] = std::max<int64_t>(1, ceil_div(g.lattice[1], g.th));
  g.tiles[2] = std::max<int64_t>(1, ceil_div(g.lattice[2], g.tw));
  g.part = std::clamp(kStageFloats / (g.channels * g.width_phases) / 8 * 8, 8, g.columns);
  if (problem.layout == Layout::channels_last) {
    g.stage_pitch = static_cast<int>(ceil_div(g.channels, 4) * 4 + 4);
    g.stage_words = g.part * g.width_phases * g.stage_pitch;
  } else {
    // One phase: = 8 mod 32 for 8-byte stores; two: = 16 mod 32 for 16-byte stores.
    const int points = g.part * g.width_phases;
    g.stage_pitch = static_cast<int>(g.num_live == 2 && g.width_phases == 2 ? ceil_div(points - 16, 32) * 32 + 16
                                                                            : ceil_div(points - 8, 32) * 32 + 8);
    g.stage_words = g.channels * g.stage_pitch;
  }
  g.stage_words = static_cast<int>(ceil_div(g.stage_words, 32) * 32);
  g.shared_bytes = static_cast<std::size_t>(config.stages) * (config.block_k / 4) * g.plane * 16 +
                   static_cast<std::size_t>(g.warpgroups) * g.stage_words * 4;
  if (g.shared_bytes > device.shared_memory_per_block)
    return refuse(std::to_string(g.shared_bytes) + " bytes of shared memory");
  const bool planar16 = size_of(problem.dtype) == 2 && problem.layout == Layout::contiguous;
  // Sums, four sets of rows, addresses; with a pipeline also two batches on their way.
  g.registers = g.columns / 2 + config.block_k * 2 + (config.stages == 1 && planar16 ? 56 : 44) +
                (config.stages == 2 ? config.block_k / 2 * (planar16 ? 8 : 4) : 0);
  if (g.registers > 255) return refuse(std::to_string(g.registers) + " registers a thread");
  const int by_shared =
      std::max<int>(1, static_cast<int>(device.shared_memory_per_multiprocessor / (g.shared_bytes + 1024)));
  g.blocks_per_multiprocessor = std::min({std::max(1, 65536 / (g.registers * g.threads)), by_shared, 8});
  return g;
}

int64_t num_blocks(const Problem& problem, const Config& config, const Geometry& g) {
  return g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch * problem.groups * g.row_blocks *
         (config.split ? static_cast<int64_t>(g.passes.size()) : 1);
}

std::size_t packed_words(const Problem& problem, const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(problem.groups) * g.row_blocks * g.warpgroups * g.num_entries * g.chunks *
         (config.block_k / 8) * 512;
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  if (device.backend != Backend::cuda || device.compute_capability != 90) {
    fit.refusal = "needs compute capability 9.0 (wgmma)";
    return fit;
  }
  const Geometry& layer = of_last_problem(problem, layer_geometry);
  const Geometry g = geometry(problem, device, config, layer);
  fit.refusal = g.refusal;
  if (fit && problem.batch * volume(g.forward ? problem.input : output_size(problem)) == 0)
    fit.refusal = "empty source";
  if (!fit) return fit;
  const int64_t blocks = num_blocks(problem, config, g);
  if (blocks >= (int64_t{1} << 31)) {
    fit.refusal = "more than 2^31 blocks";
    return fit;
  }
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double passes_in_block = config.split ? 1.0 : static_cast<double>(g.passes.size());
  const double entries = g.num_entries * passes_in_block / static_cast<double>(g.passes.size());
  // A product of n positions takes n / 2 cycles at the peak; two blocks on a multiprocessor reach some 75 % of it.
  const double multiply =
      g.warpgroups * entries * g.chunks * ((config.block_k / 8) * std::max(g.columns / 2.0, 24.0) / 0.75 + 40.0);
  const double unit = problem.layout == Layout::channels_last ? 8.0 : size_of(problem.dtype) == 2 ? 26.0 : 16.0;
  const double loads = (g.chunks == 1 ? 1.0 : passes_in_block * g.chunks) * (config.block_k / 4) * g.positions;
  const double load = loads / 32.0 * unit / 3.0;
  double math = 0;
  for (const Op& op : epilogue.ops)
    math += is_norm(op.kind) ? 0 : op.kind == OpKind::gelu || op.kind == OpKind::mish ? 30 : 8;
  const double results = static_cast<double>(g.columns) * g.channels * g.width_phases * g.warpgroups * passes_in_block;
  const double store = results / 32.0 * (14.0 + math) / 3.5;
  const double resident =
      std::min<double>(g.blocks_per_multiprocessor, std::ceil(static_cast<double>(blocks) / device.multiprocessors));
  const double rounds = std::ceil(static_cast<double>(blocks) / device.multiprocessors);
  // One resident block cannot overlap its own loads, products and stores; two overlap most of it.
  const double serial = multiply + load + store,
               parallel = std::max(multiply, load + store) + 0.3 * std::min(multiply, load + store);
  const double block_cycles = resident >= 3 ? parallel : resident >= 2 ? 0.7 * parallel + 0.3 * serial : serial;
  // What measurements on an H200 and an H100 took beyond this model, geometric means over some 40 layers.
  const double beyond = size_of(problem.dtype) == 2 ? 1.8 : 1.6;
  const double compute = beyond * (rounds * block_cycles + 2000.0) / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.8) * 1e6;
  const double cache = static_cast<double>(blocks) *
                       (loads * 16.0 + g.warpgroups * entries * g.chunks * (config.block_k / 8) * 2048.0) /
                       (device.bandwidth_tbs * 1e12 * 1.3) * 1e6;
  fit.microseconds = std::max({compute, traffic, cache}) + 0.3 * std::min(compute, traffic) + 20.0;  // two launches
  fit.workspace_bytes = packed_words(problem, config, g) * 4;
  for (const Op& op : epilogue.ops) {
    if (is_norm(op.kind)) break;
    ++fit.fused_ops;
  }
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.device, config, layer_geometry(problem));
  std::ostringstream text;
  text << layer_prelude(step);
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("P9_FORWARD", g.forward ? 1 : 0);
  define("P9_K", g.k);
  define("P9_N_CHANNELS", g.n);
  define("P9_NUM_TAPS", g.num_taps);
  define("P9_NUM_ENTRIES", std::max(1, g.num_entries));
  define("P9_NUM_LIVE", g.num_live);
  define("P9_CHANNELS", g.channels);
  // Two phases: rows r and r + 8, which one thread holds, so that it can store them interleaved.
  define("P9_ROW_CHANNEL(row)", g.num_live == 1   ? "(row)"
                                : g.num_live == 2 ? "((row) / 16 * 8 + (row) % 8)"
                                                  : "((row) / P9_NUM_LIVE)");
  define("P9_ROW_LIVE(row)", g.num_live == 1 ? "0" : g.num_live == 2 ? "((row) / 8 % 2)" : "((row) % P9_NUM_LIVE)");
  define("P9_K8", g.chunks * (config.block_k / 8));
  define("P9_ROW_WARPGROUPS", g.row_blocks * g.warpgroups);
  std::vector<int> begin{0}, word, phase, tap;
  const int kh = static_cast<int>(problem.kernel[1]), kw = static_cast<int>(problem.kernel[2]);
  const int rows_d = static_cast<int>(g.staged[0].base.size()) * g.staged[0].length;
  const int rows_h = static_cast<int>(g.staged[1].base.size()) * g.staged[1].length;
  const int length = g.staged[2].length;
  for (const Pass& pass : g.passes) {
    phase.insert(phase.end(), pass.phase, pass.phase + 3);
    for (const Entry& entry : pass.entries) {
      const auto at = std::find(g.offset[2].begin(), g.offset[2].end(), entry.shift_w) - g.offset[2].begin();
      const int in_row = g.staged[2].tap_word[at];  // plane * length + column
      word.push_back(((in_row / length * rows_d + g.staged[0].tap_word[entry.tap_d]) * rows_h +
                      g.staged[1].tap_word[entry.tap_h]) *
                         length +
                     in_row % length);
      for (int t : entry.tap_w) tap.push_back(t < 0 ? -1 : (entry.tap_d * kh + entry.tap_h) * kw + t);
    }
    begin.push_back(static_cast<int>(word.size()));
  }
  if (word.empty()) {
    word.push_back(0);
    tap.assign(g.num_live, -1);
  }
  const std::string layer = text.str();
  define("P9_ENTRY_TAP", list(tap));
  const std::string pack = text.str();
  text.str("");
  text << layer;
  define("P9_KC", config.block_k);
  define("P9_CHUNKS", g.chunks);
  define("P9_STAGES", config.stages);
  define("P9_WARPGROUPS", g.warpgroups);
  define("P9_ROW_BLOCKS", g.row_blocks);
  define("P9_MIN_BLOCKS", g.blocks_per_multiprocessor);
  define("P9_N", g.columns);
  define("P9_TH", g.th);
  define("P9_TW", g.tw);
  define("P9_NPD", g.staged[0].base.size());
  define("P9_NPH", g.staged[1].base.size());
  define("P9_NPW", g.staged[2].base.size());
  define("P9_JD", g.staged[0].length);
  define("P9_JH", g.staged[1].length);
  define("P9_JW", g.staged[2].length);
  define("P9_PLANE", g.plane);
  define("P9_SRC_D", g.source_step[0]);
  define("P9_SRC_H", g.source_step[1]);
  define("P9_SRC_W", g.source_step[2]);
  define("P9_OUT_D", g.result_step[0]);
  define("P9_OUT_H", g.result_step[1]);
  define("P9_OUT_W", g.result_step[2]);
  define("P9_PW", g.width_phases);
  define("P9_NUM_PASSES", g.passes.size());
  define("P9_PASS_PER_BLOCK", config.split);
  define("P9_PART", g.part);
  define("P9_STAGE_PITCH", g.stage_pitch);
  define("P9_WIDE_PAIRS", size_of(step.epilogue.output_dtype.value_or(problem.dtype)) == 2 ? 1 : 0);
  define("P9_STAGE_WORDS", g.stage_words);
  define("P9_PLANES_D", list(g.staged[0].base));
  define("P9_PLANES_H", list(g.staged[1].base));
  define("P9_PLANES_W", list(g.staged[2].base));
  define("P9_LIVE", list(g.live));
  define("P9_PASS", list(phase));
  define("P9_ENTRY_BEGIN", list(begin));
  define("P9_ENTRY_WORD", list(word));
  text << product_text(problem.dtype, g.columns);
  return {{"phase_gemm_sm90.cu", "phase_gemm", text.str(), g.threads, g.shared_bytes},
          {"phase_gemm_pack_sm90.cu", "phase_gemm_pack", pack, 256, 0}};
}

struct Ready : Loaded {
  Geometry geometry;
  int64_t blocks = 0;
  unsigned packed = 0;
};

void prepare_launch(Step& step) {
  auto ready = std::make_shared<Ready>(load_units(step));
  ready->geometry = geometry(step.problem, step.device, step.config, layer_geometry(step.problem));
  ready->blocks = num_blocks(step.problem, step.config, ready->geometry);
  ready->packed = static_cast<unsigned>(packed_words(step.problem, step.config, ready->geometry));
  step.state = std::shared_ptr<Loaded>(ready);
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Ready& ready = static_cast<const Ready&>(loaded_of(step));
  const Geometry& g = ready.geometry;
  const Problem& problem = step.problem;
  if (ready.blocks == 0) return;
  if (ready.packed != 0) {
    const void* weight = tensors.weight;
    void* packed = tensors.workspace;
    unsigned total = ready.packed;
    int weight_last = tensors.weight_channels_last;
    void* args[] = {&weight, &packed, &total, &weight_last};
    launch(*ready.functions[1], {std::min(4096u, (total + 255) / 256)}, stream, args);
  }
  struct {
    const void* source;
    const void* weights;
    const void* bias;
    void* result;
    long long source_plane, result_plane;
    int source_size[3], result_size[3], tiles[3];
    int vector_loads, pair_stores;
    const void* operands[kMaxOperands];
  } args{};
  const Dims output = output_size(problem);
  const Dims& source = g.forward ? problem.input : output;
  const Dims& result = g.forward ? output : problem.input;
  args.source = g.forward ? tensors.input : tensors.grad_output;
  args.weights = tensors.workspace;
  args.bias = tensors.bias;
  args.result = tensors.output;
  args.source_plane = volume(source);
  args.result_plane = volume(result);
  for (int dim = 0; dim < 3; ++dim) {
    args.source_size[dim] = static_cast<int>(source[dim]);
    args.result_size[dim] = static_cast<int>(result[dim]);
    args.tiles[dim] = static_cast<int>(g.tiles[dim]);
  }
  const int64_t unit = 16 / static_cast<int64_t>(size_of(problem.dtype));
  args.vector_loads = reinterpret_cast<std::uintptr_t>(args.source) % 16 == 0 && g.k % unit == 0;
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensors.output) % 4 == 0;
  args.pair_stores =
      aligned && (problem.layout == Layout::channels_last ? g.n % 2 == 0 && g.channels % 2 == 0 : result[2] % 2 == 0);
  for (int i = 0; i < kMaxOperands; ++i) args.operands[i] = tensors.operands[i];
  void* pointers[] = {&args};
  launch_behind(*ready.functions[0], {static_cast<unsigned>(ready.blocks)}, stream, pointers);
}

}  // namespace

extern const Kernel phase_gemm_sm90;
const Kernel phase_gemm_sm90{"phase_gemm_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
