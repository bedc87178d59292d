// tap_gemm_grad_weight_sm80 — host side: tap slices, tiles, price, specialisation and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "driver.h"
#include "tap_tiling.h"

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

struct Geometry : TapTiling {
  std::string refusal;
  int wm = 0, wn = 0, warps_m = 1, warps_n = 1, warps_k = 1;
  int blocks_m = 1, blocks_n = 1;
  bool split3 = false, exact = false;
  int threads = 0, blocks_per_multiprocessor = 1, shares = 1;
  int64_t blocks = 0;
};

// = 4 mod 32 words.
int input_pitch_of(const Config& config) { return static_cast<int>(ceil_div(config.block_k - 4, 32) * 32 + 4); }

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

  static_cast<TapTiling&>(g) = tap_tiling(
      problem, config.block_k, kMaxAccumulators / (g.wm / 16 * (g.wn / 8) * 4), 1, config.block_m, config.block_n,
      [&](int grad_pitch) {
        return 2 * 4 *
               (static_cast<std::size_t>(config.block_m) * input_pitch_of(config) +
                static_cast<std::size_t>(config.block_n) * grad_pitch);
      },
      device.shared_memory_per_block);
  if (g.tile[2] == 0) return refuse("no tile fits shared memory");

  const int accumulators = g.wm / 16 * (g.wn / 8) * 4 * g.taps;
  const int registers = std::min(255, 2 * accumulators + (g.exact ? 72 : 60) + (g.split3 ? 16 : 0));
  const int by_shared =
      std::max<int>(1, static_cast<int>(device.shared_memory_per_multiprocessor / (g.shared_bytes + 1024)));
  g.blocks_per_multiprocessor =
      std::min({std::max(1, 65536 / (registers * g.threads)), by_shared, 2048 / g.threads, 8});
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
  const double issue = (accesses * (g.split3  ? 4.0
                                    : g.exact ? 1.2
                                              : 2.2) +
                        g.taps * lines * columns * factor + 10.0) /
                       4.0;
  const double step = std::max({products, accesses, issue}) + 0.25 * std::min(products, accesses);
  const double load =
      (config.block_m * static_cast<double>(config.block_k) + config.block_n * static_cast<double>(g.grad_positions)) /
      32.0 *
      (g.exact                                   ? 2.5
       : problem.layout == Layout::channels_last ? 2.2
                                                 : 1.2);
  const double tiles_per_share = static_cast<double>(ceil_div(g.num_tiles, g.shares));
  const double rounds = std::ceil(static_cast<double>(g.blocks) / device.multiprocessors);
  const double warps = static_cast<double>(g.blocks_per_multiprocessor) * config.warps;
  const double latency = warps >= 12 ? 1.0 : 1.0 + (12.0 - warps) / 16.0;
  const double compute = rounds * tiles_per_share * (steps * step + load) * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6;
  const double partial = 2.0 * static_cast<double>(fit.workspace_bytes) / (device.bandwidth_tbs * 1e12) * 1e6;
  // 16 bits on an H200: 1.37 ms channels_last and 1.62 contiguous for both gradients of 2x2 taps of 1024 to 512
  // channels, 0.36 of them expected here; about twice and three times the price without this factor.
  const double widening = !g.exact || device.compute_capability < 90 ? 1.0
                          : problem.layout == Layout::channels_last  ? 3.0
                                                                     : 2.0;
  // TF32 on an H100: 2.3 times the price without this factor on average over ten layers, where the wgmma kernels take 1.4
  // to 1.5 times theirs.
  const double synchronous = device.compute_capability == 90 && !g.exact && !g.split3 ? 1.6 : 1.0;
  fit.microseconds =
      (std::max(compute, traffic) + 0.3 * std::min(compute, traffic)) * widening * synchronous + partial + 10.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Geometry g = geometry(step.problem, step.device, step.config);
  std::ostringstream text;
  text << layer_prelude(step);
  const std::string layer = text.str();
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TAPS", g.taps);
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
  define("TG_WARPGROUP", 0);
  define("TG_BLOCK_FLOATS", block_floats(step.config, g));
  const std::string finish = text.str();
  define("TG_SPLIT3", g.split3 ? 1 : 0);
  define("TG_EXACT", g.exact ? 1 : 0);
  define("TG_ASYNC", step.problem.dtype == DType::f32 ? 1 : 0);
  define("TG_INPUT_PITCH", input_pitch_of(step.config));
  define("TG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  text << tiling_text(g);
  return {{"tap_gemm_grad_weight_sm80.cu", "tap_gemm_grad_weight", text.str(), g.threads, g.shared_bytes},
          {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
          {"channel_sum.cu", "channel_sum", layer, 256, 0},
          {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  const Problem& problem = step.problem;
  TapArguments args = tap_arguments(problem, tensors, g, g.shares);
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(g.blocks)}, stream, pointers);
  launch_sums(step, tensors, stream,
              int64_t{problem.groups} * g.blocks_m * g.blocks_n * g.slices * block_floats(step.config, g),
              g.shares * g.warps_k, partial_floats(problem, step.config, g));
}

}  // namespace

extern const Kernel tap_gemm_grad_weight_sm80;
const Kernel tap_gemm_grad_weight_sm80{"tap_gemm_grad_weight_sm80", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
