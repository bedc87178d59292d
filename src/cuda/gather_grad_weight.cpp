// gather_grad_weight — host side: tile, split of the positions, price and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "driver.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr Config kConfigs[] = {{0, 0, 0, 0, kWarps, 0}};
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

// As in gather_grad_weight.cu.
struct Arguments {
  const void* input;
  const void* grad_output;
  void* result;
  void* grad_bias;
  void* partial;
  void* bias_partial;
  long long batch;
  long long input_size[3];
  long long output_size[3];
  long long splits, share;
  long long chunk, chunks;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The power of two that covers count, at most limit.
int64_t tile_of(int64_t count, int64_t limit) {
  int64_t tile = 1;
  while (tile < limit && tile < count) tile *= 2;
  return tile;
}

struct Geometry {
  std::string refusal;
  int64_t tile_m, tile_n, tile_h, tile_t;
  int64_t items = 0;  // blocks of one split
  int64_t weights = 0;
  int64_t bias_blocks = 0;
  std::size_t partial_bytes = 0, bias_bytes = 0;
  Arguments arguments{};
};

std::size_t align(int64_t bytes) { return static_cast<std::size_t>((bytes + 255) / 256 * 256); }

Geometry geometry(const Problem& problem, const Device& device) {
  Geometry g;
  if (problem.direction != Direction::grad_weight) {
    g.refusal = "direction " + std::string(to_string(problem.direction)) + " is not grad_weight";
    return g;
  }
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  const int64_t accum = problem.dtype == DType::f64 ? 8 : 4;
  g.tile_m = tile_of(ci, 4);
  g.tile_n = tile_of(co, 4);
  g.tile_t = std::min<int64_t>({problem.kernel[2], 64 / (g.tile_m * g.tile_n), 8});
  g.tile_h = std::clamp<int64_t>(32 / (g.tile_m * g.tile_n * g.tile_t), 1, problem.kernel[1]);
  g.items = problem.groups * problem.kernel[0] * ceil_div(problem.kernel[1], g.tile_h) * ceil_div(ci, g.tile_m) *
            ceil_div(co, g.tile_n) * ceil_div(problem.kernel[2], g.tile_t);
  g.weights = weight_elements(problem);
  Arguments& a = g.arguments;
  const Dims output = output_size(problem);
  a.batch = problem.batch;
  for (int dim = 0; dim < 3; ++dim) {
    a.input_size[dim] = problem.input[static_cast<std::size_t>(dim)];
    a.output_size[dim] = output[static_cast<std::size_t>(dim)];
    if (a.input_size[dim] > INT32_MAX / 2) {
      g.refusal = "a dimension of " + std::to_string(a.input_size[dim]) + ", at most 2^30 - 1";
      return g;
    }
  }
  // Sixteen blocks of 128 threads fill a multiprocessor; a share is worth 8 steps of each thread.
  const int64_t positions = problem.batch * volume(problem.input);
  const int64_t machine = std::max(device.multiprocessors, 1);
  a.splits = g.items ? ceil_div(16 * machine, g.items) : 1;
  a.splits = std::min<int64_t>(a.splits, std::max<int64_t>(positions / (8 * kThreads), 1));
  if (g.weights > 0)
    a.splits = std::min<int64_t>(a.splits, std::max<int64_t>(kMaxPartialBytes / (g.weights * accum), 1));
  a.share = ceil_div(positions, a.splits);
  if (g.items * a.splits > INT32_MAX) {
    g.refusal = std::to_string(g.items * a.splits) + " blocks, at most 2^31 - 1";
    return g;
  }
  g.partial_bytes = align(a.splits * g.weights * accum);

  const int64_t output_positions = volume(output);
  int64_t rows = problem.batch * problem.out_channels, least = 8 * kThreads;
  if (problem.layout == Layout::channels_last) {
    rows = problem.batch * ceil_div(problem.out_channels, kThreads);
    const int64_t columns = std::clamp<int64_t>(problem.out_channels, 1, kThreads);
    least = 8 * (kThreads / columns);
  }
  a.chunks = rows > 0
                 ? std::clamp<int64_t>(ceil_div(32 * machine, rows), 1, std::max<int64_t>(output_positions / least, 1))
                 : 1;
  a.chunk = std::max<int64_t>(ceil_div(output_positions, a.chunks), 1);
  a.chunks = ceil_div(output_positions, a.chunk);
  g.bias_blocks = rows * a.chunks;
  g.bias_bytes = align(problem.out_channels * problem.batch * a.chunks * accum);
  if (g.bias_blocks > INT32_MAX) g.refusal = std::to_string(g.bias_blocks) + " blocks, at most 2^31 - 1";
  return g;
}

Fit fit(const Problem& problem, const Epilogue&, const Device& device, const Config&) {
  Fit fit;
  const Geometry g = geometry(problem, device);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  const double positions = static_cast<double>(problem.batch) * volume(problem.input);
  const bool wide = problem.dtype == DType::f64;
  const double slow = wide ? device.fp32_tflops / std::max(device.fp64_tflops, 1e-3) : 1;
  const double loads = static_cast<double>(g.tile_m + g.tile_n * g.tile_h * g.tile_t);
  const double apart =
      problem.layout == Layout::channels_last ? 6 : std::min<double>(static_cast<double>(problem.stride[2]), 6);
  const double products = static_cast<double>(g.tile_m * g.tile_n * g.tile_h * g.tile_t);
  const double slots = std::max(products * slow + loads + 30, 4 * loads * apart);
  const double busy = positions / 32 * static_cast<double>(g.items) * slots * 64 / (device.fp32_tflops * 1e6);
  const double memory = minimum_bytes(problem) / (0.8 * device.bandwidth_tbs * 1e6);
  const double partial = 2 * static_cast<double>(g.partial_bytes) / (0.8 * device.bandwidth_tbs * 1e6);
  fit.microseconds = 10 + std::max(1.3 * busy, memory) + partial;
  fit.workspace_bytes = g.partial_bytes + g.bias_bytes;
  fit.fused_pre = true;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Geometry g = geometry(step.problem, step.device);
  Step plain = step;  // bias and chain do not enter
  plain.epilogue.bias = false;
  plain.epilogue.ops.clear();
  std::string text = layer_prelude(plain);
  text += "#define TILE_M " + std::to_string(g.tile_m) + "\n#define TILE_N " + std::to_string(g.tile_n) +
          "\n#define TILE_H " + std::to_string(g.tile_h) + "\n#define TILE_T " + std::to_string(g.tile_t) +
          "\nconstexpr int kThreads = " + std::to_string(kThreads) + ";\n";
  std::vector<Unit> list;
  for (const char* entry : {"gather_grad_weight", "gather_sum_weight", "gather_bias", "gather_sum_bias"}) {
    list.push_back({"gather_grad_weight.cu", entry, text, kThreads, 0});
  }
  return list;
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device)); }

void launch(const Step& step, const Tensors& tensors, Stream stream) {
  const Geometry& g = prepared<Geometry>(step);
  Arguments a = g.arguments;
  a.input = tensors.input;
  a.grad_output = tensors.grad_output;
  a.result = tensors.output;
  a.grad_bias = tensors.grad_bias;
  a.partial = tensors.workspace;
  a.bias_partial = static_cast<std::byte*>(tensors.workspace) + g.partial_bytes;
  void* arguments[] = {&a};
  auto enqueue = [&](std::size_t index, int64_t blocks) {
    cuda::launch(function(step, index), {static_cast<unsigned>(blocks), 1, 1}, stream, arguments);
  };
  if (g.weights > 0 && tensors.output) {
    if (a.share > 0) {
      enqueue(0, g.items * a.splits);
      enqueue(1, ceil_div(g.weights, kThreads));
    } else {
      fill_zero(step.device, tensors.output, static_cast<std::size_t>(g.weights) * size_of(step.problem.dtype), stream);
    }
  }
  if (tensors.grad_bias && step.problem.out_channels > 0) {
    enqueue(2, g.bias_blocks);
    enqueue(3, ceil_div(step.problem.out_channels, kWarps));
  }
}

}  // namespace

extern const Kernel gather_grad_weight;
const Kernel gather_grad_weight{"gather_grad_weight", kConfigs, fit, units, prepare_launch, launch};

}  // namespace tconv::cuda
