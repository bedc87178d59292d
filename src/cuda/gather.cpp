// gather — host side: the tables of taps, the choice of the tile's cost, launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "driver.h"
#include "lattice.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr std::size_t kStageBytes = 32 * 1024;  // weights in shared memory: three blocks of 60 KB fit a multiprocessor
constexpr int64_t kMaxUnrolledTaps = 32, kMaxWidthPhases = 16;

// block_m lattice positions per thread, block_n result channels.
#define POSITIONS(n) {4, n, 0, 0, kWarps, 0}, {2, n, 0, 0, kWarps, 0}, {1, n, 0, 0, kWarps, 0}
constexpr Config kConfigs[] = {POSITIONS(16), POSITIONS(8), POSITIONS(4), POSITIONS(2), POSITIONS(1)};
#undef POSITIONS

// As in gather.cu.
struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
  long long batch;
  long long source_size[3];
  long long result_size[3];
  long long lattice[3];
  int weight_last;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The taps of one dimension: those of phase r are first[r] + j * tap_step, j < count[r], and read from shift
// first_shift[r] + j * shift_step. They are an arithmetic sequence because t feeds r when d * t = r + p modulo s.
struct Dim {
  std::vector<int64_t> first, count, first_shift;
  int64_t tap_step = 1, shift_step = 0, most = 0;
};

Dim dim_of(const Problem& problem, int dim) {
  Dim table;
  const auto at = static_cast<std::size_t>(dim);
  const int64_t s = problem.stride[at], d = problem.dilation[at];
  if (problem.direction == Direction::grad_input) {
    table.first = {0};
    table.count = {problem.kernel[at]};
    table.first_shift = {-problem.padding[at]};
    table.shift_step = d;
    table.most = problem.kernel[at];
    return table;
  }
  const int64_t common = std::gcd(s, d);
  table.tap_step = s / common;
  table.shift_step = -d / common;
  for (const std::vector<Tap>& taps : lattice(problem, dim).phases) {
    table.first.push_back(taps.empty() ? 0 : taps[0].tap);
    table.count.push_back(static_cast<int64_t>(taps.size()));
    table.first_shift.push_back(taps.empty() ? 0 : taps[0].shift);
    table.most = std::max(table.most, table.count.back());
  }
  return table;
}

struct WidthTap {
  int64_t tap, phase, shift;
};

struct Geometry {
  std::string refusal;
  bool forward = true, split_width = false;
  int64_t sum = 0, result = 0;  // channels per group
  Dim dims[3];
  std::vector<WidthTap> width_taps;  // by shift
  std::vector<int64_t> shifts;       // distinct, ascending
  int64_t width_phases = 1;
  int64_t result_step[3], source_step[3];
  int64_t stage_rows = 1, stage_sum = 1;
  std::size_t shared_bytes = 0;
  // Depend on sizes
  Dims source_size, result_size;
  int64_t lattice[3];
  int64_t blocks = 0;
};

Geometry geometry(const Problem& problem, const Config& config) {
  Geometry g;
  g.forward = problem.direction == Direction::forward;
  if (!g.forward && problem.direction != Direction::grad_input) {
    g.refusal = "direction " + std::string(to_string(problem.direction)) + " is not a gather over taps";
    return g;
  }
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  g.sum = g.forward ? ci : co;
  g.result = g.forward ? co : ci;
  g.source_size = g.forward ? problem.input : output_size(problem);
  g.result_size = g.forward ? output_size(problem) : problem.input;
  for (int dim = 0; dim < 3; ++dim) {
    const auto at = static_cast<std::size_t>(dim);
    g.dims[dim] = dim_of(problem, dim);
    g.result_step[dim] = g.forward ? problem.stride[at] : 1;
    g.source_step[dim] = g.forward ? 1 : problem.stride[at];
  }
  g.split_width = problem.kernel[2] > kMaxUnrolledTaps || g.result_step[2] > kMaxWidthPhases;
  if (g.split_width) {
    g.width_taps = {{0, 0, 0}};
  } else {
    g.width_phases = g.result_step[2];
    const Dim& width = g.dims[2];
    for (std::size_t r = 0; r < width.first.size(); ++r) {
      for (int64_t j = 0; j < width.count[r]; ++j) {
        g.width_taps.push_back({width.first[r] + j * width.tap_step, static_cast<int64_t>(r),
                                width.first_shift[r] + j * width.shift_step});
      }
    }
    std::stable_sort(g.width_taps.begin(), g.width_taps.end(),
                     [](const WidthTap& a, const WidthTap& b) { return a.shift < b.shift; });
  }
  for (const WidthTap& tap : g.width_taps) {
    if (g.shifts.empty() || g.shifts.back() != tap.shift) g.shifts.push_back(tap.shift);
  }

  const std::size_t accum = problem.dtype == DType::f64 ? 8 : 4;
  const int64_t accumulators = config.block_m * config.block_n * g.width_phases;
  const int64_t most = problem.dtype == DType::f64 ? 32 : 64;
  if (config.block_m * config.block_n > 1 && accumulators > most) {
    g.refusal = std::to_string(accumulators) + " accumulators a thread, at most " + std::to_string(most);
    return g;
  }
  if (config.block_n > 1 && config.block_n / 2 >= g.result) {
    g.refusal = "block_n " + std::to_string(config.block_n) + " for " + std::to_string(g.result) + " result channels";
    return g;
  }
  const auto unit = g.width_taps.size() * static_cast<std::size_t>(config.block_n) * accum;
  const int64_t rows = std::max<int64_t>(g.dims[0].most * g.dims[1].most * (g.split_width ? g.dims[2].most : 1), 1);
  const auto units = static_cast<int64_t>(kStageBytes / unit);
  const int64_t sum = std::max<int64_t>(g.sum, 1);
  g.stage_sum = std::clamp<int64_t>(units, 1, sum);
  g.stage_rows = g.stage_sum < sum ? 1 : std::clamp<int64_t>(units / sum, 1, rows);
  const auto weights = static_cast<std::size_t>(g.stage_rows * g.stage_sum) * unit;
  g.shared_bytes = (weights + 15) / 16 * 16;
  if (problem.layout == Layout::contiguous && g.width_phases > 1) {
    const auto positions = static_cast<std::size_t>(32 * config.block_m);
    g.shared_bytes += kWarps * positions * (static_cast<std::size_t>(g.width_phases) * accum + 8 + 4);
  }

  int64_t positions = problem.batch, phases = 1;
  for (int dim = 0; dim < 3; ++dim) {
    const auto at = static_cast<std::size_t>(dim);
    if (g.source_size[at] > INT32_MAX / 2 || g.result_size[at] > INT32_MAX / 2) {
      g.refusal =
          "a dimension of " + std::to_string(std::max(g.source_size[at], g.result_size[at])) + ", at most 2^30 - 1";
      return g;
    }
    g.lattice[dim] = ceil_div(g.result_size[at], g.result_step[dim]);
    positions *= g.lattice[dim];
    if (dim < 2 || g.split_width) phases *= g.result_step[dim];
  }
  g.blocks = ceil_div(positions, int64_t{kThreads} * config.block_m) * phases * problem.groups *
             ceil_div(g.result, config.block_n);
  if (g.blocks > INT32_MAX) g.refusal = std::to_string(g.blocks) + " blocks, at most 2^31 - 1";
  return g;
}

int leading_pointwise(const Epilogue& epilogue) {
  const int norm = norm_index(epilogue);
  return norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  const Geometry g = geometry(problem, config);
  fit.refusal = g.refusal;
  if (fit.refusal.empty() && g.shared_bytes > device.shared_memory_per_block) {
    fit.refusal = "needs " + std::to_string(g.shared_bytes) + " bytes of shared memory, a block has " +
                  std::to_string(device.shared_memory_per_block);
  }
  if (!fit) return fit;
  // Issue slots of one warp for one channel of one row of taps; a slot is worth 64 operations, four warps share the
  // unit that reads memory.
  const double m = config.block_m, n = config.block_n, taps = static_cast<double>(g.width_taps.size());
  const double shifts = static_cast<double>(g.shifts.size());
  const bool wide = problem.dtype == DType::f64;
  const double slow = wide ? device.fp32_tflops / std::max(device.fp64_tflops, 1e-3) : 1;
  const double weights = taps * std::max(1.0, n * (wide ? 8 : 4) / 16);
  // Neighbouring lanes read neighbouring elements only in a contiguous forward.
  const double apart =
      problem.layout == Layout::channels_last ? 6 : std::min<double>(static_cast<double>(g.source_step[2]), 6);
  const double source = shifts * m;
  const double slots = std::max(taps * m * n * slow + source + weights + 2 * m + 6, 4 * (source * apart + weights));
  double rows = 1;
  for (int dim = 0; dim < (g.split_width ? 3 : 2); ++dim) {
    rows *=
        static_cast<double>(problem.kernel[static_cast<std::size_t>(dim)]) / static_cast<double>(g.result_step[dim]);
  }
  const double stores = m * n * static_cast<double>(g.width_phases) * 8 + 300;
  const double per_warp = rows * static_cast<double>(g.sum) * slots + stores;
  const double slot_us = 64 / (device.fp32_tflops * 1e6);  // of the whole device, per warp
  const double machine = 4.0 * std::max(device.multiprocessors, 1);
  // A warp by itself waits most of the time; few blocks do not fill the device.
  const double busy =
      std::max(static_cast<double>(g.blocks) * kWarps * per_warp * slot_us, 4 * per_warp * slot_us * machine);
  const double memory = minimum_bytes(problem) / (0.8 * device.bandwidth_tbs * 1e6);
  // 2.4: measured over predicted at 1.3 was 1.87, geometric mean of 34 configs of 14 layers on an H100.
  fit.microseconds = 4 + std::max(busy * 2.4, memory) + 0.2 * std::min(busy, memory);
  if (g.forward) {
    fit.fused_ops = leading_pointwise(epilogue);
    fit.fused_pre = true;
  }
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Geometry g = geometry(problem, step.config);
  std::string text = layer_prelude(step);
  auto define = [&](const char* name, int64_t value) {
    text += std::string("#define ") + name + " " + std::to_string(value) + "\n";
  };
  auto number = [&](const std::string& name, int64_t value) {
    text += "constexpr int " + name + " = " + std::to_string(value) + ";\n";
  };
  auto table = [&](const std::string& name, const std::vector<int64_t>& values) {
    text += "constexpr int " + name + "[] = {";
    for (const int64_t value : values) text += std::to_string(value) + ",";
    text += "};\n";
  };
  define("TCONV_GATHER_FORWARD", g.forward);
  define("TCONV_SPLIT_WIDTH", g.split_width);
  define("TILE_Q", step.config.block_m);
  define("TILE_N", step.config.block_n);
  define("WIDTH_PHASES", g.width_phases);
  define("WIDTH_TAPS", static_cast<int64_t>(g.width_taps.size()));
  number("kThreads", kThreads);
  number("kSum", g.sum);
  number("kResult", g.result);
  number("kStageRows", g.stage_rows);
  number("kStageSum", g.stage_sum);
  std::vector<int64_t> tap_step, shift_step;
  for (int dim = 0; dim < 3; ++dim) {
    const std::string suffix = "_" + std::to_string(dim);
    table("kFirstTap" + suffix, g.dims[dim].first);
    table("kTapCount" + suffix, g.dims[dim].count);
    table("kFirstShift" + suffix, g.dims[dim].first_shift);
    tap_step.push_back(g.dims[dim].tap_step);
    shift_step.push_back(g.dims[dim].shift_step);
  }
  table("kTapStep", tap_step);
  table("kShiftStep", shift_step);
  table("kResultStep", {g.result_step[0], g.result_step[1], g.result_step[2]});
  table("kSourceStep", {g.source_step[0], g.source_step[1], g.source_step[2]});
  std::vector<int64_t> tap, phase, shift, first;
  for (const WidthTap& entry : g.width_taps) {
    const auto index = std::find(g.shifts.begin(), g.shifts.end(), entry.shift) - g.shifts.begin();
    first.push_back(shift.empty() || shift.back() != index);
    tap.push_back(entry.tap);
    phase.push_back(entry.phase);
    shift.push_back(index);
  }
  table("kTap", tap);
  table("kTapPhase", phase);
  table("kTapShift", shift);
  table("kFirstOfShift", first);
  table("kShift", g.shifts);
  number("kShifts", static_cast<int64_t>(g.shifts.size()));
  return {{"gather.cu", "gather", std::move(text), kThreads, g.shared_bytes}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.config)); }

void launch(const Step& step, const Tensors& tensors, Stream stream) {
  const Problem& problem = step.problem;
  const Geometry& g = prepared<Geometry>(step);
  Arguments a{};
  a.source = g.forward ? tensors.input : tensors.grad_output;
  a.weight = tensors.weight;
  a.weight_last = tensors.weight_channels_last;
  a.bias = tensors.bias;
  a.result = tensors.output;
  a.batch = problem.batch;
  for (int dim = 0; dim < 3; ++dim) {
    a.source_size[dim] = g.source_size[static_cast<std::size_t>(dim)];
    a.result_size[dim] = g.result_size[static_cast<std::size_t>(dim)];
    a.lattice[dim] = g.lattice[dim];
  }
  std::array<const void*, kMaxOperands> operands = tensors.operands;
  void* arguments[] = {&a, operands.data()};
  cuda::launch(function(step), {static_cast<unsigned>(g.blocks), 1, 1}, stream, arguments);
}

}  // namespace

extern const Kernel gather;
const Kernel gather{"gather", kConfigs, fit, units, prepare_launch, launch};

}  // namespace tconv::cuda
