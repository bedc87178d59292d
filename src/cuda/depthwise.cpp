// depthwise — host side: the multiply-adds written out, price and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <set>

#include "driver.h"
#include "lattice.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// block_m: lattice rows of a thread.
constexpr Config kConfigs[] = {
    {8, 0, 0, 0, kWarps, 0}, {4, 0, 0, 0, kWarps, 0}, {2, 0, 0, 0, kWarps, 0}, {1, 0, 0, 0, kWarps, 0}};

constexpr int64_t kMaxChannels = 4;             // output channels per group
constexpr int64_t kMaxSums = 32;                // of 255 registers
constexpr int64_t kMaxWeights = 64;             // of a slice, in registers
constexpr int64_t kMaxSliceReads = 80;          // elements that a slice reads: the compiler moves them up and spills
constexpr int64_t kMaxReadsOfMany = 48;         // the same where several slices are written out
constexpr int64_t kMaxReadsAhead = 24;          // elements of a batch of rows
constexpr int64_t kMaxWeightBytes = 32 * 1024;  // in shared memory
constexpr int64_t kMaxProducts = 2048;          // written out: about a second of compilation

// As in depthwise.cu.
struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
  long long batch;
  long long source_size[3];
  long long result_size[3];
  long long lattice[3];
  long long packed;
  int weight_last;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  std::string refusal;
  bool forward = true;
  int64_t result_channels = 1, source_channels = 1, channel_tile = 1;
  std::vector<PhaseTap> taps[3];
  std::vector<int64_t> shifts[3];  // distinct, ascending
  int64_t phases[3], result_step[3], source_step[3];
  int64_t queue = 1, slice_weights = 1;
  std::vector<int64_t> rows;                 // distinct source rows of a thread, relative to its first lattice row
  double reads = 0, products = 0, sums = 0;  // per thread
  Dims source_size, result_size;
  int64_t lattice[3];
  int64_t blocks = 0;
};

Geometry geometry(const Problem& problem, const Config& config) {
  Geometry g;
  g.forward = problem.direction == Direction::forward;
  const auto refuse = [&](std::string text) {
    g.refusal = std::move(text);
    return g;
  };
  if (!g.forward && problem.direction != Direction::grad_input) {
    return refuse("direction " + std::string(to_string(problem.direction)));
  }
  if (problem.groups == 0 || problem.groups != problem.in_channels) {
    return refuse("groups " + std::to_string(problem.groups) + " is not in_channels " +
                  std::to_string(problem.in_channels));
  }
  const int64_t multiplier = problem.out_channels / problem.groups;
  if (multiplier > kMaxChannels) {
    return refuse(std::to_string(multiplier) + " output channels per group, at most " + std::to_string(kMaxChannels));
  }
  (g.forward ? g.result_channels : g.source_channels) = multiplier;
  if (problem.layout == Layout::channels_last) g.channel_tile = std::min<int64_t>(problem.groups, 32);
  const int64_t weight_bytes = multiplier * volume(problem.kernel) * (problem.dtype == DType::f64 ? 8 : 4);
  while (g.channel_tile > 8 && weight_bytes * g.channel_tile > kMaxWeightBytes) g.channel_tile /= 2;
  if (weight_bytes * g.channel_tile > kMaxWeightBytes) {
    return refuse(std::to_string(weight_bytes * g.channel_tile) + " bytes of weights, at most " +
                  std::to_string(kMaxWeightBytes));
  }
  g.source_size = g.forward ? problem.input : output_size(problem);
  g.result_size = g.forward ? output_size(problem) : problem.input;
  g.queue = config.block_m;
  int64_t phases = 1, taps = 1;
  for (int dim = 0; dim < 3; ++dim) {
    const auto at = static_cast<std::size_t>(dim);
    if (problem.kernel[at] > kMaxProducts || problem.stride[at] > kMaxSums) return refuse("too many taps or phases");
    g.result_step[dim] = g.phases[dim] = g.forward ? problem.stride[at] : 1;
    g.source_step[dim] = g.forward ? 1 : problem.stride[at];
    if (g.forward) {
      g.taps[dim] = phase_taps(lattice(problem, dim));
    } else {
      for (int64_t t = 0; t < problem.kernel[at]; ++t) {
        g.taps[dim].push_back({t, 0, problem.dilation[at] * t - problem.padding[at]});
      }
    }
    std::set<int64_t> shifts;
    for (const PhaseTap& tap : g.taps[dim]) shifts.insert(tap.shift);
    g.shifts[dim].assign(shifts.begin(), shifts.end());
    phases *= g.phases[dim];
    taps *= problem.kernel[at];
    if (g.source_size[at] > INT32_MAX / 2 || g.result_size[at] > INT32_MAX / 2) {
      return refuse("a dimension of " + std::to_string(std::max(g.source_size[at], g.result_size[at])) +
                    ", at most 2^30 - 1");
    }
    g.lattice[dim] = ceil_div(g.result_size[at], g.result_step[dim]);
  }
  g.sums = static_cast<double>(g.result_channels * g.queue * phases);
  const int64_t most_sums = problem.dtype == DType::f64 ? kMaxSums / 2 : kMaxSums;
  if (g.sums > static_cast<double>(most_sums)) {
    return refuse(std::to_string(g.result_channels * g.queue * phases) + " results a thread, at most " +
                  std::to_string(most_sums));
  }
  if (g.queue > 1 && g.queue / 2 >= g.lattice[1]) {
    return refuse("block_m " + std::to_string(g.queue) + " for a height of " + std::to_string(g.lattice[1]));
  }
  int64_t most = 0;
  for (const int64_t shift : g.shifts[0]) {
    most = std::max<int64_t>(most, std::count_if(g.taps[0].begin(), g.taps[0].end(),
                                                 [&](const PhaseTap& tap) { return tap.shift == shift; }));
  }
  const int64_t weights = most * problem.kernel[1] * problem.kernel[2] * g.result_channels;
  g.slice_weights = weights;
  const int64_t most_weights = problem.dtype == DType::f64 ? kMaxWeights / 2 : kMaxWeights;
  if (weights > most_weights) {
    return refuse(std::to_string(weights) + " weights at once, at most " + std::to_string(most_weights));
  }
  g.products = static_cast<double>(taps * g.queue * g.result_channels);
  if (g.products > static_cast<double>(kMaxProducts)) {
    return refuse(std::to_string(taps * g.queue * g.result_channels) + " products a thread, at most " +
                  std::to_string(kMaxProducts));
  }
  std::set<int64_t> rows;
  for (int64_t queue = 0; queue < g.queue; ++queue) {
    for (const int64_t shift : g.shifts[1]) rows.insert(queue * g.source_step[1] + shift);
  }
  g.rows.assign(rows.begin(), rows.end());
  g.reads = static_cast<double>(g.shifts[0].size() * g.rows.size() * g.shifts[2].size() *
                                static_cast<std::size_t>(g.source_channels));
  const auto slice_reads = static_cast<int64_t>(g.rows.size() * g.shifts[2].size());
  const int64_t most_reads = g.shifts[0].size() > 1 && g.phases[0] > 1 ? kMaxReadsOfMany : kMaxSliceReads;
  if (g.queue > 1 && slice_reads > most_reads) {
    return refuse(std::to_string(slice_reads) + " elements at once, at most " + std::to_string(most_reads));
  }
  g.products *= static_cast<double>(g.source_channels);
  g.lattice[1] = ceil_div(g.lattice[1], g.queue);
  const int64_t places = g.lattice[1] * g.lattice[2];
  if (places > INT32_MAX) return refuse("more than 2^31 - 1 places");
  const int64_t per_block = kThreads / g.channel_tile;
  g.blocks = problem.batch * g.lattice[0] *
             ceil_div(places, problem.layout == Layout::channels_last ? per_block : kThreads) *
             ceil_div(problem.groups, g.channel_tile);
  if (g.blocks > INT32_MAX) return refuse(std::to_string(g.blocks) + " blocks, at most 2^31 - 1");
  return g;
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  const Geometry g = geometry(problem, config);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  const bool wide = problem.dtype == DType::f64;
  const double slow = wide ? device.fp32_tflops / std::max(device.fp64_tflops, 1e-3) : 1;
  const double threads = static_cast<double>(g.blocks) * kThreads;
  const double apart =
      problem.layout == Layout::contiguous ? std::min<double>(static_cast<double>(g.source_step[2]), 4) : 1;
  // Issue slots, four to the cycle; reads go through one unit.
  const double issue = g.products * slow + 3 * g.reads + 8 * g.sums + 150;
  const double memory_unit = 4 * (g.reads * apart + 3 * g.sums);
  const double busy = threads / 32 * std::max(issue, memory_unit) * 64 / (device.fp32_tflops * 1e6);
  const double memory = minimum_bytes(problem) / (0.8 * device.bandwidth_tbs * 1e6);
  fit.microseconds = 3 + std::max(memory, 1.2 * busy) + 0.2 * std::min(memory, busy);
  if (g.forward) {
    const int norm = norm_index(epilogue);
    fit.fused_ops = norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
    fit.fused_pre = true;
  }
  return fit;
}

// The body of add_taps: for each slice of depth shifts its weights, then row by row and column by column each source
// element with all its products.
std::string add_taps(const Problem& problem, const Geometry& g, std::vector<int64_t>& slot_taps) {
  auto text = [](int64_t value) { return std::to_string(value); };
  std::string out =
      "template <bool finite, long long step>\n"
      "__device__ __forceinline__ void add_taps(const storage_t* source, const int (&sizes)[3], int z0, int y0, int "
      "x0,\n"
      "                                         const accum_t* weights, accum_t (&sum)[kSums]) {\n"
      "  const long long row_step = sizes[2] * step, slice_step = sizes[1] * row_step;\n";
  for (std::size_t k = 0; k < g.shifts[2].size(); ++k) {
    out += "  const bool column" + text(static_cast<int64_t>(k)) + " = static_cast<unsigned>(x0 + (" +
           text(g.shifts[2][k]) + ")) < static_cast<unsigned>(sizes[2]);\n";
  }
  const int64_t all_taps = volume(problem.kernel);
  // Where depth has one phase, all slices are alike and are made a loop: written out, the compiler moves reads of all
  // slices to the front and spills.
  const bool loop = g.phases[0] == 1 && g.shifts[0].size() > 1;
  for (const int64_t depth : g.shifts[0]) {
    const std::string at_depth =
        loop ? text(depth) + " + " + text(g.shifts[0][1] - g.shifts[0][0]) + " * index" : text(depth);
    if (loop && depth == g.shifts[0][0]) {
      out += "#pragma unroll 1\n  for (int index = 0; index < " + text(static_cast<int64_t>(g.shifts[0].size())) +
             "; ++index, weights += " + text(problem.kernel[1] * problem.kernel[2] * g.channel_tile) + ")\n";
    }
    const std::size_t before = out.size();
    // An opaque copy of y0 and the fence keep reads, row tests and row addresses of other slices, hundreds of registers in
    // three dimensions, from being moved up here or shared.
    out +=
        "  {\n    int y = y0;\n    asm volatile(\"\" : \"+r\"(y) : : \"memory\");\n    const bool slice = "
        "static_cast<unsigned>(z0 + (" +
        at_depth + ")) < static_cast<unsigned>(sizes[0]);\n";
    out +=
        "    const storage_t* at = source + (" + at_depth + ") * slice_step + (" + text(g.rows[0]) + ") * row_step;\n";
    int64_t last_row = g.rows[0];
    // Slots of this slice: [depth tap][height tap][width tap].
    const auto first = static_cast<int64_t>(slot_taps.size());
    std::vector<PhaseTap> depth_taps;
    for (const PhaseTap& tap : g.taps[0]) {
      if (tap.shift == depth) depth_taps.push_back(tap);
    }
    for (const PhaseTap& t_0 : depth_taps) {
      for (const PhaseTap& t_1 : g.taps[1]) {
        for (const PhaseTap& t_2 : g.taps[2]) {
          slot_taps.push_back((t_0.tap * problem.kernel[1] + t_1.tap) * problem.kernel[2] + t_2.tap);
        }
      }
    }
    for (int64_t n = 0; n < g.result_channels; ++n) {
      for (auto slot = first; slot < static_cast<int64_t>(slot_taps.size()); ++slot) {
        out += "    const accum_t w" + text(n) + "_" + text(slot) + " = weights[" +
               text((n * all_taps + slot) * g.channel_tile) + "];\n";
      }
    }
    // All products of the element at (row, column k), which the text before calls x.
    const auto products = [&](int64_t row, std::size_t k) {
      std::string sums;
      for (int64_t n = 0; n < g.result_channels; ++n) {
        for (int64_t queue = 0; queue < g.queue; ++queue) {
          int64_t slot = first;
          for (const PhaseTap& t_0 : depth_taps) {
            for (const PhaseTap& t_1 : g.taps[1]) {
              for (const PhaseTap& t_2 : g.taps[2]) {
                if (queue * g.source_step[1] + t_1.shift == row && t_2.shift == g.shifts[2][k]) {
                  const int64_t sum =
                      (((n * g.queue + queue) * g.phases[0] + t_0.phase) * g.phases[1] + t_1.phase) * g.phases[2] +
                      t_2.phase;
                  sums += "          sum[" + text(sum) + "] += x * w" + text(n) + "_" + text(slot) + ";\n";
                }
                ++slot;
              }
            }
          }
        }
      }
      return sums;
    };
    const auto inside = [&](int64_t row) {
      return "slice && static_cast<unsigned>(y + (" + text(row) + ")) < static_cast<unsigned>(sizes[1])";
    };
    // Several rows are read, as they are stored, before the first is used. Tested and widened where it is used, an element
    // of 16 bits kept the reads of each row behind the products of the row before: 537 us for depthwise_up_64's
    // grad_input, with four reads under way a thread and 18 % of the bandwidth used.
    const auto columns = static_cast<int64_t>(g.shifts[2].size());
    const auto rows = static_cast<int64_t>(g.rows.size()), batch = std::max<int64_t>(1, kMaxReadsAhead / columns);
    out += "    if constexpr (finite) {\n";
    for (int64_t begin = 0; begin < rows; begin += batch) {
      const int64_t end = std::min(rows, begin + batch);
      out += "      {\n";
      for (int64_t index = begin; index < end; ++index) {
        const int64_t row = g.rows[static_cast<std::size_t>(index)];
        out += "        const bool in" + text(index) + " = " + inside(row) +
               ";\n        at += " + text(row - last_row) + " * row_step;\n";
        last_row = row;
        for (std::size_t k = 0; k < g.shifts[2].size(); ++k) {
          const std::string name = text(index) + "_" + text(static_cast<int64_t>(k));
          out += "        storage_t e" + name + "{};\n        if (in" + text(index) + " && column" +
                 text(static_cast<int64_t>(k)) + ") e" + name + " = at[(" + text(g.shifts[2][k]) + ") * step];\n";
        }
      }
      for (int64_t index = begin; index < end; ++index) {
        for (std::size_t k = 0; k < g.shifts[2].size(); ++k) {
          const auto column = text(static_cast<int64_t>(k));
          const std::string name = text(index) + "_" + column;
          out += "        {\n          const accum_t x = !TCONV_PRE || (in" + text(index) + " && column" + column +
                 ") ? tconv_pre<accum_t>(widen(e" + name + ")) : accum_t(0);\n" +
                 products(g.rows[static_cast<std::size_t>(index)], k) + "        }\n";
        }
      }
      out += "      }\n";
    }
    out += "    } else {\n";
    last_row = g.rows[0];
    for (const int64_t row : g.rows) {
      out += "      {\n        const bool inside = " + inside(row) + ";\n        at += " + text(row - last_row) +
             " * row_step;\n";
      last_row = row;
      for (std::size_t k = 0; k < g.shifts[2].size(); ++k) {
        out += "        if (inside && column" + text(static_cast<int64_t>(k)) +
               ") {\n          const accum_t x = tconv_pre<accum_t>(widen(at[(" + text(g.shifts[2][k]) +
               ") * step]));\n" + products(row, k) + "        }\n";
      }
      out += "      }\n";
    }
    out += "    }\n";
    out += "  }\n";
    if (loop && depth != g.shifts[0][0]) out.resize(before);
  }
  return out + "}\n";
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Geometry g = geometry(problem, step.config);
  std::string text = layer_prelude(step);
  auto number = [&](const std::string& name, int64_t value) {
    text += "constexpr int " + name + " = " + std::to_string(value) + ";\n";
  };
  auto table = [&](const std::string& name, const std::vector<int64_t>& values) {
    text += "constexpr int " + name + "[] = {";
    for (const int64_t value : values) text += std::to_string(value) + ",";
    text += "};\n";
  };
  text += "#define QUEUE " + std::to_string(g.queue) + "\n";
  number("kThreads", kThreads);
  number("kChannelTile", g.channel_tile);
  number("kResultChannels", g.result_channels);
  number("kSourceChannels", g.source_channels);
  number("kTaps", volume(problem.kernel));
  number("kSliceWeights", g.slice_weights * (problem.dtype == DType::f64 ? 2 : 1));
  number("kSums", g.result_channels * g.queue * g.phases[0] * g.phases[1] * g.phases[2]);
  table("kPhases", {g.phases[0], g.phases[1], g.phases[2]});
  table("kResultStep", {g.result_step[0], g.result_step[1], g.result_step[2]});
  table("kSourceStep", {g.source_step[0], g.source_step[1], g.source_step[2]});
  std::vector<int64_t> slot_taps;
  const std::string body = add_taps(problem, g, slot_taps);
  table("kSlotTap", slot_taps);
  text += body;
  return {{"depthwise.cu", "depthwise", std::move(text), kThreads, 0}};
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
  const std::size_t access =
      static_cast<std::size_t>(g.phases[2]) * size_of(step.epilogue.output_dtype.value_or(problem.dtype));
  a.packed = g.result_size[2] % g.phases[2] == 0 &&
             reinterpret_cast<std::uintptr_t>(tensors.output) % std::min<std::size_t>(access, 16) == 0;
  std::array<const void*, kMaxOperands> operands = tensors.operands;
  void* arguments[] = {&a, operands.data()};
  cuda::launch(function(step), {static_cast<unsigned>(g.blocks), 1, 1}, stream, arguments);
}

}  // namespace

extern const Kernel depthwise;
const Kernel depthwise{"depthwise", kConfigs, fit, units, prepare_launch, launch};

}  // namespace tconv::cuda
