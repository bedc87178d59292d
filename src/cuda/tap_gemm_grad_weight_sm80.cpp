// tap_gemm_grad_weight_sm80 — host side: tap slices, tiles, price, specialisation and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "driver.h"
#include "tile_geometry.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m input channels, block_n output channels, block_k positions per tile, two stages, warps.
#define POSITIONS(m, n, w) {m, n, 32, 2, w, 0}, {m, n, 64, 2, w, 0}, {m, n, 128, 2, w, 0}, {m, n, 256, 2, w, 0}
constexpr Config kConfigs[] = {POSITIONS(64, 64, 8), POSITIONS(32, 64, 8), POSITIONS(64, 32, 8), POSITIONS(32, 32, 8),
                               POSITIONS(32, 32, 4), POSITIONS(16, 64, 8), POSITIONS(64, 16, 8), POSITIONS(32, 16, 8),
                               POSITIONS(16, 32, 8), POSITIONS(16, 16, 8), POSITIONS(16, 8, 8),  POSITIONS(64, 8, 8),
                               POSITIONS(32, 8, 8),  POSITIONS(16, 8, 4)};
#undef POSITIONS

constexpr int kMaxAccumulators = 64;  // twice: the tile's sum and the running total
constexpr int kMaxTaps = 4096;        // tables in constant memory
constexpr int kSegmentLength = 8192;  // positions a block of channel_sum adds

struct Geometry {
  std::string refusal;
  int wm = 0, wn = 0, warps_m = 1, warps_n = 1, warps_k = 1;
  int blocks_m = 1, blocks_n = 1, slices = 1, taps = 1, num_taps = 1;
  bool split3 = false, exact = false;
  int tile[3] = {1, 1, 1};
  Rows rows[2];
  Columns columns;
  int input_pitch = 0, grad_pitch = 0, grad_positions = 0;
  std::vector<int> slice_offset, tap_word, slice_tap;
  std::size_t shared_bytes = 0;
  int threads = 0, blocks_per_multiprocessor = 1, shares = 1;
  int64_t tiles[3] = {1, 1, 1}, num_tiles = 0, blocks = 0;
};

int64_t segments_of(int64_t positions) { return std::max<int64_t>(1, ceil_div(positions, kSegmentLength)); }

Geometry geometry(const Problem& problem, const Device& device, const Config& config) {
  Geometry g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_weight");
  if (problem.dtype == DType::f64) return refuse("f64 has no mma.sync of this shape");
  const int ci = static_cast<int>(problem.in_channels / std::max<int64_t>(1, problem.groups));
  const int co = static_cast<int>(problem.out_channels / std::max<int64_t>(1, problem.groups));
  if (ci == 0 || co == 0) return refuse("no channels");
  if (volume(problem.kernel) > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " taps");
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 4096)
      return refuse("stride or kernel extent too large for the tables");
  if (config.block_m > 16 && config.block_m / 2 >= ci) return refuse("block_m is over twice the input channels");
  if (config.block_n > 8 && config.block_n / 2 >= co) return refuse("block_n is over twice the output channels");
  g.num_taps = static_cast<int>(volume(problem.kernel));
  g.exact = size_of(problem.dtype) == 2;
  g.split3 = problem.dtype == DType::f32 && problem.precision == Precision::fp32;
  g.threads = config.warps * 32;
  g.wm = std::min(config.block_m, 32);
  g.wn = std::min(config.block_n, 16);
  g.warps_m = config.block_m / g.wm;
  g.warps_n = config.block_n / g.wn;
  if (g.warps_m * g.warps_n > config.warps) return refuse("too few warps");
  g.warps_k = config.warps / (g.warps_m * g.warps_n);
  if (config.block_k / 8 < g.warps_k) return refuse("fewer positions than warps");
  g.blocks_m = static_cast<int>(ceil_div(ci, config.block_m));
  g.blocks_n = static_cast<int>(ceil_div(co, config.block_n));

  // Slices: as many whole trailing dimensions of the kernel as the accumulators allow, else a part of the width.
  const int limit = kMaxAccumulators / (g.wm / 16 * (g.wn / 8) * 4);
  const int kd = static_cast<int>(problem.kernel[0]), kh = static_cast<int>(problem.kernel[1]),
            kw = static_cast<int>(problem.kernel[2]);
  int fixed = 0;  // leading kernel dimensions that a slice fixes
  if (kd * kh * kw <= limit) fixed = 0;
  else if (kh * kw <= limit) fixed = 1;
  else fixed = 2;
  const int width_parts = fixed == 2 ? static_cast<int>(ceil_div(kw, limit)) : 1;
  const int width_taps = static_cast<int>(ceil_div(kw, width_parts));
  g.taps = fixed == 0 ? kd * kh * kw : fixed == 1 ? kh * kw : width_taps;
  g.slices = fixed == 0 ? 1 : fixed == 1 ? kd : kd * kh * width_parts;
  std::vector<int> offset[3];
  for (int dim = 0; dim < 3; ++dim)
    for (int t = 0; t < problem.kernel[dim]; ++t)
      offset[dim].push_back(static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]));
  const std::vector<int> zero{0};
  const std::vector<int>& staged_d = fixed >= 1 ? zero : offset[0];
  const std::vector<int>& staged_h = fixed >= 2 ? zero : offset[1];

  double best = std::numeric_limits<double>::max();
  for (int tw = 8; tw <= config.block_k; tw *= 2)
    for (int th = 1; th * tw <= config.block_k; th *= 2) {
      const int td = config.block_k / (tw * th);
      if (problem.stride[0] * (td - 1) > 4096 || problem.stride[1] * (th - 1) > 4096) continue;
      const Rows rows_d = rows_of(td, static_cast<int>(problem.stride[0]), staged_d);
      const Rows rows_h = rows_of(th, static_cast<int>(problem.stride[1]), staged_h);
      const Columns columns = columns_of(tw, static_cast<int>(problem.stride[2]), offset[2]);
      const int64_t positions = static_cast<int64_t>(rows_d.relative.size() * rows_h.relative.size() * columns.base.size()) *
                                columns.length;
      const int64_t grad_pitch = ceil_div(std::max<int64_t>(positions - 4, 0), 32) * 32 + 4;
      const int64_t input_pitch = ceil_div(config.block_k - 4, 32) * 32 + 4;
      const std::size_t shared = 2 * 4 * static_cast<std::size_t>(config.block_m * input_pitch + config.block_n * grad_pitch);
      if (shared > device.shared_memory_per_block) continue;
      const int64_t tiles = ceil_div(problem.input[0], td) * ceil_div(problem.input[1], th) * ceil_div(problem.input[2], tw);
      const double cost = static_cast<double>(tiles) *
                          (config.block_m * config.block_k + config.block_n * static_cast<double>(positions)) * (1.0 + 2.0 / tw);
      if (cost < best) {
        best = cost;
        g.tile[0] = td, g.tile[1] = th, g.tile[2] = tw;
        g.rows[0] = rows_d, g.rows[1] = rows_h, g.columns = columns;
        g.grad_positions = static_cast<int>(positions);
        g.grad_pitch = static_cast<int>(grad_pitch);
        g.input_pitch = static_cast<int>(input_pitch);
        g.shared_bytes = shared;
      }
    }
  if (best == std::numeric_limits<double>::max()) return refuse("no tile fits shared memory");
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = ceil_div(problem.input[dim], g.tile[dim]);
  g.num_tiles = g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch;

  const int row_words = static_cast<int>(g.columns.base.size()) * g.columns.length;
  const int staged_rows = static_cast<int>(g.rows[1].relative.size());
  for (int slice = 0; slice < g.slices; ++slice) {
    const int td0 = fixed == 1 ? slice : fixed == 2 ? slice / width_parts / kh : 0;
    const int th0 = fixed == 2 ? slice / width_parts % kh : 0;
    const int tw0 = fixed == 2 ? slice % width_parts * width_taps : 0;
    g.slice_offset.push_back(fixed >= 1 ? offset[0][td0] : 0);
    g.slice_offset.push_back(fixed >= 2 ? offset[1][th0] : 0);
    for (int j = 0; j < g.taps; ++j) {
      int td = td0, th = th0, tw = tw0 + (fixed == 2 ? j : j % kw);
      if (fixed <= 1) th = j / kw % kh;
      if (fixed == 0) td = j / kw / kh;
      const bool exists = tw < kw;
      if (!exists) tw = tw0;
      g.slice_tap.push_back(exists ? (td * kh + th) * kw + tw : -1);
      g.tap_word.push_back((g.rows[0].tap_slot[fixed >= 1 ? 0 : td] * staged_rows + g.rows[1].tap_slot[fixed >= 2 ? 0 : th]) *
                               row_words + g.columns.tap_word[tw]);
    }
  }
  const int accumulators = g.wm / 16 * (g.wn / 8) * 4 * g.taps;
  const int registers = std::min(255, 2 * accumulators + 56 + (g.split3 ? 16 : 0));
  const int by_shared = std::max<int>(1, static_cast<int>(device.shared_memory_per_multiprocessor / (g.shared_bytes + 1024)));
  g.blocks_per_multiprocessor = std::min({std::max(1, 65536 / (registers * g.threads)), by_shared, 2048 / g.threads, 8});
  // Two waves of blocks: enough to balance, few enough partial sums.
  const int64_t others = static_cast<int64_t>(problem.groups) * g.blocks_m * g.blocks_n * g.slices;
  const int64_t wanted = ceil_div(int64_t{2} * device.multiprocessors * g.blocks_per_multiprocessor, others);
  g.shares = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, g.num_tiles)));
  g.blocks = others * g.shares;
  return g;
}

int64_t block_floats(const Config& config, const Geometry& g) {
  return int64_t{g.taps} * config.block_m * config.block_n;
}

std::size_t partial_floats(const Problem& problem, const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(problem.groups * g.blocks_m * g.blocks_n * g.slices * g.shares * g.warps_k *
                                  block_floats(config, g));
}

std::size_t bias_floats(const Problem& problem) {
  return static_cast<std::size_t>(problem.out_channels * problem.batch * segments_of(volume(output_size(problem))));
}

Fit fit(const Problem& problem, const Epilogue&, const Device& device, const Config& config) {
  Fit fit;
  if (device.backend != Backend::cuda || device.compute_capability < 80) {
    fit.refusal = "needs a CUDA device of compute capability 8.0 or later";
    return fit;
  }
  const Geometry g = geometry(problem, device, config);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  if (g.blocks >= (int64_t{1} << 31)) {
    fit.refusal = "more than 2^31 blocks";
    return fit;
  }
  fit.workspace_bytes = 4 * (partial_floats(problem, config, g) + bias_floats(problem));
  if (fit.workspace_bytes > (std::size_t{1} << 30)) {
    fit.refusal = std::to_string(fit.workspace_bytes >> 20) + " MiB of partial sums";
    return fit;
  }
  const double clock = device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors;
  const double steps = config.block_k / 8.0 * g.warps_m * g.warps_n;  // of all warps
  const double lines = g.wm / 16, columns = g.wn / 8, factor = g.split3 ? 3.0 : 1.0;
  const double products = g.taps * lines * columns * factor * 1.7;
  const double accesses = 4.0 * lines + 2.0 * columns * g.taps;
  const double issue = (accesses * (g.split3 ? 4.0 : g.exact ? 1.2 : 2.2) + g.taps * lines * columns * factor + 10.0) / 4.0;
  const double step = std::max({products, accesses, issue}) + 0.25 * std::min(products, accesses);
  const double load = (config.block_m * static_cast<double>(config.block_k) + config.block_n * static_cast<double>(g.grad_positions)) /
                      32.0 * (g.exact ? 2.5 : problem.layout == Layout::channels_last ? 2.2 : 1.2);
  const double tiles_per_share = static_cast<double>(ceil_div(g.num_tiles, g.shares));
  const double rounds = std::ceil(static_cast<double>(g.blocks) / device.multiprocessors);
  const double warps = static_cast<double>(g.blocks_per_multiprocessor) * config.warps;
  const double latency = warps >= 12 ? 1.0 : 1.0 + (12.0 - warps) / 16.0;
  const double compute = rounds * tiles_per_share * (steps * step + load) * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6;
  const double partial = 2.0 * static_cast<double>(fit.workspace_bytes) / (device.bandwidth_tbs * 1e12) * 1e6;
  fit.microseconds = std::max(compute, traffic) + 0.3 * std::min(compute, traffic) + partial + 10.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Geometry g = geometry(step.problem, step.device, step.config);
  std::ostringstream text;
  text << layer_prelude(step);
  const std::string layer = text.str();
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TAPS", g.taps);
  define("TG_NUM_TAPS", g.num_taps);
  define("TG_SLICES", g.slices);
  define("TG_BM", step.config.block_m);
  define("TG_BN", step.config.block_n);
  define("TG_BLOCKS_M", g.blocks_m);
  define("TG_BLOCKS_N", g.blocks_n);
  define("TG_WM", g.wm);
  define("TG_WN", g.wn);
  define("TG_WARPS_M", g.warps_m);
  define("TG_WARPS_N", g.warps_n);
  define("TG_WARPS_K", g.warps_k);
  define("TG_SLICE_TAP", list(g.slice_tap));
  const std::string finish = text.str();
  define("TG_SPLIT3", g.split3 ? 1 : 0);
  define("TG_EXACT", g.exact ? 1 : 0);
  define("TG_ASYNC", step.problem.dtype == DType::f32 ? 1 : 0);
  define("TG_TD", g.tile[0]);
  define("TG_TH", g.tile[1]);
  define("TG_TW", g.tile[2]);
  define("TG_ND", g.rows[0].relative.size());
  define("TG_NH", g.rows[1].relative.size());
  define("TG_NPW", g.columns.base.size());
  define("TG_JW", g.columns.length);
  define("TG_STEP_D", g.rows[0].step);
  define("TG_STEP_H", g.rows[1].step);
  define("TG_INPUT_PITCH", g.input_pitch);
  define("TG_GRAD_PITCH", g.grad_pitch);
  define("TG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  define("TG_ROWS_D", list(g.rows[0].relative));
  define("TG_ROWS_H", list(g.rows[1].relative));
  define("TG_PLANES_W", list(g.columns.base));
  define("TG_SLICE_OFFSET", list(g.slice_offset));
  define("TG_TAP_WORD", list(g.tap_word));
  return {{"tap_gemm_grad_weight_sm80.cu", "tap_gemm_grad_weight", text.str(), g.threads, g.shared_bytes},
          {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
          {"channel_sum.cu", "channel_sum", layer, 256, 0},
          {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
}

struct Ready : Loaded {
  Geometry geometry;
};

void prepare_launch(Step& step) {
  prepare(step);
  auto ready = std::make_shared<Ready>();
  ready->functions = static_cast<const Loaded*>(step.state.get())->functions;
  ready->geometry = geometry(step.problem, step.device, step.config);
  step.state = std::shared_ptr<Loaded>(ready);
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Ready& ready = *static_cast<const Ready*>(static_cast<const Loaded*>(step.state.get()));
  const Geometry& g = ready.geometry;
  const Problem& problem = step.problem;
  const Dims output = output_size(problem);
  struct {
    const void* input;
    const void* grad_output;
    void* partial;
    int input_size[3], grad_size[3], tiles[3];
    int shares;
    long long num_tiles;
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
  void* pointers[] = {&args};
  launch(*ready.functions[0], {static_cast<unsigned>(g.blocks)}, stream, pointers);
  {
    const void* partial = tensors.workspace;
    void* grad_weight = tensors.output;
    int summands = g.shares * g.warps_k;
    void* finish[] = {&partial, &grad_weight, &summands};
    const int64_t elements = int64_t{problem.groups} * g.blocks_m * g.blocks_n * g.slices * block_floats(step.config, g);
    launch(*ready.functions[1], {static_cast<unsigned>(elements / 32)}, stream, finish);
  }
  if (tensors.grad_bias == nullptr) return;
  const void* grad_output = tensors.grad_output;
  void* partial = static_cast<float*>(tensors.workspace) + partial_floats(problem, step.config, g);
  void* grad_bias = tensors.grad_bias;
  int channels = static_cast<int>(problem.out_channels);
  long long positions = volume(output), length = kSegmentLength;
  int segments = static_cast<int>(segments_of(positions));
  int count = static_cast<int>(problem.batch) * segments;
  const int64_t strips = problem.layout == Layout::channels_last ? ceil_div(channels, 32) : channels;
  if (count > 0) {
    void* sum[] = {&grad_output, &partial, &channels, &positions, &segments, &length};
    launch(*ready.functions[2], {static_cast<unsigned>(strips * count)}, stream, sum);
  }
  void* finish[] = {&partial, &grad_bias, &count};
  launch(*ready.functions[3], {static_cast<unsigned>(channels)}, stream, finish);
}

}  // namespace

extern const Kernel tap_gemm_grad_weight_sm80;
const Kernel tap_gemm_grad_weight_sm80{"tap_gemm_grad_weight_sm80", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
