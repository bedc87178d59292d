// finish_group_sm90.cpp — host side: which chains finish_group_sm90.cu finishes, its price and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "driver.h"
#include "finish_prelude.h"
#include "tile_geometry.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kThreads = 512, kBlocks = 8;  // of a cluster
constexpr int kMostKept = 26;               // packs of 16 bytes a thread in shared memory: 208 KB
constexpr Config kConfigs[] = {{0, 0, 0, 0, kThreads / 32, 0}};

struct Geometry {
  int64_t positions = 0, group_packs = 0, block_packs = 0, statistics = 0;
  int kept = 0, clusters = 1;
};

Geometry geometry(const Problem& problem, const Epilogue& epilogue) {
  Geometry g;
  const int64_t pack = 16 / static_cast<int64_t>(size_of(problem.dtype));
  const int64_t groups = epilogue.ops[static_cast<std::size_t>(norm_index(epilogue))].num_groups;
  g.positions = volume(output_size(problem));
  g.group_packs = g.positions * (problem.out_channels / groups) / pack;
  g.block_packs = ceil_div(g.group_packs, kBlocks);
  g.statistics = problem.batch * groups;
  g.kept = static_cast<int>(std::min<int64_t>(kMostKept, ceil_div(g.block_packs, kThreads)));
  return g;
}

// One program serves all sizes, so it asks for what the largest needs.
constexpr std::size_t kSharedBytes = std::size_t{kMostKept} * kThreads * 16;

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  Fit fit;
  auto refuse = [&fit](std::string why) {
    fit.refusal = std::move(why);
    return fit;
  };
  if (device.backend != Backend::cuda || device.compute_capability != 90)
    return refuse("needs compute capability 9.0 (clusters)");
  if (problem.direction != Direction::epilogue)
    return refuse("direction " + std::string(to_string(problem.direction)) + " is not an epilogue");
  if (norm_number(epilogue) != 1) return refuse("the chain has no group_norm");
  if (problem.dtype == DType::f64) return refuse("f64");
  if (problem.layout == Layout::channels_last)
    return refuse("layout channels_last: a group is not one piece of memory");
  const Geometry g = geometry(problem, epilogue);
  const int64_t pack = 16 / static_cast<int64_t>(size_of(problem.dtype));
  if (g.statistics * g.positions * problem.out_channels == 0) return refuse("empty");
  const int64_t group = g.statistics == 0 ? 0 : problem.batch * problem.out_channels * g.positions / g.statistics;
  if (g.positions < pack || group % pack != 0)
    return refuse("a group of " + std::to_string(group) + " elements is no multiple of " + std::to_string(pack) +
                  ", or a channel is less");
  if (group >= (int64_t{1} << 31) || g.statistics > (int64_t{1} << 27))
    return refuse("a group of more than 2^31 elements, or more than 2^27 groups");
  if (problem.out_channels > INT32_MAX) return refuse("out_channels is more than 2^31 - 1");

  // Sixteen clusters at a time. What shared memory does not hold is read again, from L2 while that holds it.
  const double input = static_cast<double>(size_of(problem.dtype));
  double bytes = input + static_cast<double>(size_of(epilogue.output_dtype.value_or(problem.dtype)));
  const int64_t excess = std::max<int64_t>(0, g.group_packs - int64_t{kBlocks} * kThreads * kMostKept) * 16;
  const double again = static_cast<double>(excess) / (16.0 * static_cast<double>(g.group_packs));
  bytes += input * again * (16 * excess < (int64_t{24} << 20) ? 0.3 : 1.0);
  // Picoseconds per element on 132 multiprocessors, fitted to chains on an H200: 16-bit norms are bound by instructions, and
  // what stands before the norm is computed twice (fp32: once, its result is kept).
  double math = input == 2 ? 1.45 : 0;
  for (std::size_t i = 0; i < epilogue.ops.size(); ++i) {
    const Op& op = epilogue.ops[i];
    if (operand_kind(op.kind) == OperandKind::tensor) bytes += input;
    const bool before = static_cast<int>(i) < norm_index(epilogue);
    math += math_of(op.kind) * (!before ? 0.015 : input == 2 ? 0.030 : 0.055);
  }
  math *= 132.0 / device.multiprocessors;
  const double elements = static_cast<double>(g.statistics) * static_cast<double>(g.group_packs * pack);
  const double clusters = device.multiprocessors / kBlocks;
  const double waves =
      std::ceil(static_cast<double>(g.statistics) / clusters) * clusters / static_cast<double>(g.statistics);
  // 0.7 of the copy bandwidth, fitted likewise: the blocks of a cluster wait together.
  const double memory = bytes / (0.7 * device.bandwidth_tbs);
  fit.microseconds = 4 + elements * 1e-6 * waves * (std::max(memory, math) + 0.2 * std::min(memory, math));
  fit.workspace_bytes = 2 * static_cast<std::size_t>(g.statistics) * 4;
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  fit.fused_pre = true;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  return {{"finish_group_sm90.cu", "finish_group", finish_prelude(step), kThreads, kSharedBytes}};
}

// As many clusters as run at a time: one more would begin when all others have ended.
void prepare_launch(Step& step) {
  Geometry& g = prepare_with(step, geometry(step.problem, step.epilogue));
  const int active = active_clusters(function(step), kBlocks);
  const int64_t most = active > 0 ? active : step.device.multiprocessors / kBlocks;
  g.clusters = static_cast<int>(std::max<int64_t>(1, std::min(g.statistics, most)));
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Problem& problem = step.problem;
  const Geometry& g = prepared<Geometry>(step);
  struct {
    const void* input;
    void* output;
    const void* bias;
    void* mean;
    void* rstd;
    int channels, groups;
    unsigned positions, statistics;
    int group_packs, block_packs, kept, packed;
  } args{};
  auto* workspace = static_cast<float*>(tensors.workspace);
  args.input = tensors.input;
  args.output = tensors.output;
  args.bias = tensors.bias;
  args.mean = tensors.mean ? tensors.mean : workspace;
  args.rstd = tensors.rstd ? tensors.rstd : workspace + g.statistics;
  args.positions = static_cast<unsigned>(g.positions);
  args.statistics = static_cast<unsigned>(g.statistics);
  args.channels = static_cast<int>(problem.out_channels);
  args.groups = static_cast<int>(step.epilogue.ops[static_cast<std::size_t>(norm_index(step.epilogue))].num_groups);
  args.group_packs = static_cast<int>(g.group_packs);
  args.block_packs = static_cast<int>(g.block_packs);
  args.kept = g.kept;
  args.packed =
      reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0 && reinterpret_cast<std::uintptr_t>(args.output) % 16 == 0;
  std::array<const void*, kMaxOperands> operands = tensors.operands;
  void* pointers[] = {&args, operands.data()};
  launch(function(step), {static_cast<unsigned>(g.clusters * kBlocks)}, stream, pointers);
}

}  // namespace

extern const Kernel finish_group_sm90;
const Kernel finish_group_sm90{"finish_group_sm90", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
