// tap_gemm_grad_weight_sm90 — host side: blocks, price, specialisation and launch of tap_gemm_grad_weight_sm90.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <sstream>

#include "tap_tiling.h"
#include "wgmma_product.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m output channels (times 64 / block_m taps make the 64 rows), block_n input channels, block_k positions per tile,
// two stages, one warpgroup.
#define POSITIONS(m, n) {m, n, 64, 2, 4, 0}, {m, n, 128, 2, 4, 0}
constexpr Config kConfigs[] = {POSITIONS(64, 64), POSITIONS(64, 32), POSITIONS(64, 16), POSITIONS(64, 8),
                               POSITIONS(32, 64), POSITIONS(32, 32), POSITIONS(32, 16), POSITIONS(32, 8),
                               POSITIONS(16, 64), POSITIONS(16, 32), POSITIONS(16, 16), POSITIONS(16, 8)};
#undef POSITIONS

constexpr int kMaxSums = 96;  // registers; with two sets of rows and addresses about 170, three blocks a multiprocessor
constexpr int kMaxTaps = 4096;  // tables in constant memory
constexpr int kFlush =
    2048;  // positions summed by the tensor core before they move to memory: truncation 8e-6 at worst

struct Geometry : TapTiling {
  std::string refusal;
  int blocks_m = 1, blocks_n = 1, shares = 1, sets = 1;
  bool exact = false;
  int blocks_per_multiprocessor = 1;
  int64_t blocks = 0;
};

Geometry geometry(const Problem& problem, const Device& device, const Config& config) {
  Geometry g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not grad_weight");
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
  if (config.block_m > 16 && config.block_m / 2 >= co) return refuse("block_m is over twice the output channels");
  if (config.block_n > 8 && config.block_n / 2 >= ci) return refuse("block_n is over twice the input channels");
  const int tap_rows = 64 / config.block_m;
  g.exact = size_of(problem.dtype) == 2;
  g.blocks_m = static_cast<int>(ceil_div(co, config.block_m));
  g.blocks_n = static_cast<int>(ceil_div(ci, config.block_n));
  static_cast<TapTiling&>(g) = tap_tiling(
      problem, config.block_k, kMaxSums / (config.block_n / 2) * tap_rows, tap_rows, config.block_n, config.block_m,
      [&](int grad_pitch) {
        const std::size_t words = static_cast<std::size_t>(config.block_k) * (config.block_n + 1) +
                                  static_cast<std::size_t>(config.block_m) * grad_pitch;
        return 2 * 4 * ((words + 31) / 32 * 32);
      },
      device.shared_memory_per_block);
  if (g.tile[2] == 0) return refuse("no tile fits shared memory");
  g.sets = g.taps / tap_rows;
  if (g.sets > 12) return refuse(std::to_string(g.sets) + " sums a thread at once");
  const int registers = g.sets * (config.block_n / 2 + 9) + 60;
  if (registers > 240) return refuse(std::to_string(registers) + " registers a thread");
  const int by_shared =
      std::max<int>(1, static_cast<int>(device.shared_memory_per_multiprocessor / (g.shared_bytes + 1024)));
  g.blocks_per_multiprocessor = std::min({std::max(1, 65536 / (registers * 128)), by_shared, 8});
  const int64_t others = problem.groups * g.blocks_m * g.blocks_n * g.slices;
  const int64_t wanted = ceil_div(int64_t{2} * device.multiprocessors * g.blocks_per_multiprocessor, others);
  g.shares = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, g.num_tiles)));
  g.blocks = others * g.shares;
  return g;
}

int64_t block_floats(const Config& config, const Geometry& g) { return int64_t{g.sets} * 64 * config.block_n; }

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
  // A step is 8 positions: per set 16 shared accesses for the rows and one product; the tensor core needs block_n / 2.
  const double product = g.sets * std::max(config.block_n / 2.0, 16.0) / 0.8;
  const double issue = g.sets * (g.exact ? 6.0 : 10.0) + 20.0;
  const double access = g.sets * (16.0 + config.block_n / 4.0);
  const double step = std::max({product, issue, access}) + 0.3 * std::min(product, access);
  const double words =
      config.block_n * static_cast<double>(config.block_k) + config.block_m * static_cast<double>(g.grad_positions);
  const double load = words / 32.0 * (g.exact ? 2.5 : problem.layout == Layout::channels_last ? 2.4 : 1.4) + 400.0;
  const double tiles_per_share = static_cast<double>(ceil_div(g.num_tiles, g.shares));
  const double rounds = std::ceil(static_cast<double>(g.blocks) / device.multiprocessors);
  const double latency = g.blocks_per_multiprocessor >= 3 ? 1.0 : g.blocks_per_multiprocessor == 2 ? 1.2 : 1.8;
  const double compute = rounds * tiles_per_share * (config.block_k / 8 * step + load) * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.85) * 1e6;
  const double partial = 2.0 * static_cast<double>(fit.workspace_bytes) / (device.bandwidth_tbs * 1e12) * 1e6;
  // 16 bits: 3x3 taps of 64 x 64 channels at 2^23 positions took 8.56 ms (9.01 channels_last) on an H100 instead of 4.43,
  // twelve layers between 1.1 and 2.3 times the price without this factor.
  const double widening = !g.exact ? 1.0 : problem.layout == Layout::channels_last ? 2.1 : 1.7;
  fit.microseconds = (std::max(compute, traffic) + 0.3 * std::min(compute, traffic)) * widening + partial + 10.0;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Geometry g = geometry(step.problem, step.device, step.config);
  const std::string layer = layer_prelude(step);
  std::ostringstream text;
  text << layer;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TAPS", g.taps);
  define("TG_SLICES", g.slices);
  define("TG_CHANNELS", step.config.block_m);
  define("TG_BN", step.config.block_n);
  define("TG_BLOCKS_M", g.blocks_m);
  define("TG_BLOCKS_N", g.blocks_n);
  define("TG_WARPGROUP", 1);
  define("TG_BLOCK_FLOATS", block_floats(step.config, g));
  define("TG_SLICE_TAP", list(g.slice_tap));
  const std::string finish = text.str();
  define("TG_EXACT", g.exact ? 1 : 0);
  define("TG_ASYNC", step.problem.dtype == DType::f32 ? 1 : 0);
  define("TG_FLUSH", std::max(1, kFlush / step.config.block_k));
  define("TG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  text << tiling_text(g) << product_text(DType::f32, step.config.block_n);
  return {{"tap_gemm_grad_weight_sm90.cu", "tap_gemm_grad_weight", text.str(), 128, g.shared_bytes},
          {"tap_gemm_finish.cu", "tap_gemm_finish", finish, 256, 0},
          {"channel_sum.cu", "channel_sum", layer, 256, 0},
          {"channel_sum.cu", "channel_sum_finish", layer, 32, 0}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device, step.config)); }

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  TapArguments args = tap_arguments(step.problem, tensors, g, g.shares);
  void* pointers[] = {&args};
  launch(function(step), {static_cast<unsigned>(g.blocks)}, stream, pointers);
  launch_sums(step, tensors, stream, g.blocks / g.shares * block_floats(step.config, g), g.shares,
              partial_floats(step.config, g));
}

}  // namespace

extern const Kernel tap_gemm_grad_weight_sm90;
const Kernel tap_gemm_grad_weight_sm90{"tap_gemm_grad_weight_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
