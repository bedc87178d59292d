// finish_driver.cpp — the portable half of the finish kernel: tiles, memory, threads and the merging of partial sums.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/element.h"
#include "cpu/finish.h"
#include "cpu/parallel.h"

namespace tconv::cpu {
namespace {

// Elements of a tile: 32 KB of fp32, so that a tile and its gradient stay in the first two cache levels.
constexpr std::int64_t kTileElements = 8192;

// Takes pieces of the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    size_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  std::size_t size() const { return size_; }

 private:
  char* base_;
  std::size_t size_ = 0;
};

struct Work {
  FinishTask task{};
  std::vector<FinishOp> ops;
  std::int64_t items = 0, parts = 0;
  void* mean_g = nullptr;
  void* mean_gx = nullptr;
  void* channel_values = nullptr;  // S per channel and channel operand, then the bias
};

bool backward(const Problem& problem) { return problem.direction == Direction::grad_epilogue; }

// Partition and workspace; pure in problem and epilogue apart from the pointers.
std::size_t prepare(const Problem& problem, const Epilogue& epilogue, const Tensors& tensors, void* workspace,
                    Work& work) {
  FinishTask& task = work.task;
  Carver carver(workspace);
  const std::int64_t element = problem.dtype == DType::f64 ? 8 : 4;
  auto take_elements = [&](std::int64_t count) -> void* { return carver.take<char>(count * element); };
  task.dtype = problem.dtype;
  task.output_dtype = epilogue.output_dtype.value_or(problem.dtype);
  task.layout = problem.layout;
  task.batch = problem.batch;
  task.channels = problem.out_channels;
  task.positions = volume(output_size(problem));
  task.input = tensors.input;
  task.output = tensors.output;
  task.grad_output = backward(problem) ? tensors.grad_output : nullptr;
  const int pre = backward(problem) ? 0 : static_cast<int>(epilogue.pre.size());
  task.norm = norm_index(epilogue);
  const Op* norm = task.norm >= 0 ? &epilogue.ops[task.norm] : nullptr;
  task.norm_kind = norm ? norm->kind : OpKind::relu;
  task.num_groups = norm && norm->kind == OpKind::group_norm ? norm->num_groups : 1;
  task.eps = norm ? norm->a : 0;
  const bool group = norm && norm->kind == OpKind::group_norm, layer = norm && norm->kind == OpKind::layer_norm;
  const bool batch_norm = norm && norm->kind == OpKind::batch_norm;

  // Tiles
  const std::int64_t channels = std::max<std::int64_t>(1, task.channels);
  if (problem.layout == Layout::channels_last || layer) {
    task.tile_channels = channels;
    task.tile_positions = std::clamp<std::int64_t>(kTileElements / channels / 16 * 16, 16, kTileElements);
    task.channel_blocks = 1;
    task.blocks_per_group = 0;
  } else {
    const std::int64_t limit = group ? channels / task.num_groups : channels;
    task.tile_positions = std::min(std::max<std::int64_t>(1, task.positions), kTileElements);
    task.tile_channels = std::clamp<std::int64_t>(kTileElements / task.tile_positions, 1, limit);
    task.blocks_per_group = group ? (limit + task.tile_channels - 1) / task.tile_channels : 0;
    task.channel_blocks =
        group ? task.num_groups * task.blocks_per_group : (channels + task.tile_channels - 1) / task.tile_channels;
  }
  task.position_blocks = (task.positions + task.tile_positions - 1) / task.tile_positions;
  work.items = task.channels == 0 ? 0 : task.batch * task.channel_blocks * task.position_blocks;
  work.parts = task.batch * task.position_blocks;

  // Operands as arithmetic values
  const DType operand_dtype = epilogue.operand_dtype.value_or(problem.dtype);
  auto channel_values = [&](const void* source, DType dtype) -> const void* {
    void* values = take_elements(channels);
    if (!workspace || !source) return nullptr;
    const DType arithmetic = problem.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (std::int64_t c = 0; c < task.channels; ++c)
      store_element(values, arithmetic, c, load_element(source, dtype, c));
    return values;
  };
  if (epilogue.bias) task.bias = channel_values(tensors.bias, problem.dtype);
  int slots = 0;
  work.ops.clear();
  for (int index = 0; index < pre; ++index)
    work.ops.push_back({epilogue.pre[index].kind, OperandKind::none, epilogue.pre[index].a, epilogue.pre[index].b,
                        nullptr, nullptr, -1});
  for (int index = 0; index < static_cast<int>(epilogue.ops.size()); ++index) {
    const Op& op = epilogue.ops[index];
    FinishOp entry{op.kind, OperandKind::none, op.a, op.b, nullptr, nullptr, -1};
    const int slot = operand_offset(epilogue, index);
    if (!is_norm(op.kind)) {
      entry.operand = operand_kind(op.kind);
      if (entry.operand == OperandKind::channel) {
        entry.values = channel_values(tensors.operands[slot], operand_dtype);
        if (backward(problem)) entry.sum_slot = slots++;
      } else if (entry.operand == OperandKind::tensor) {
        entry.values = tensors.operands[slot];
        entry.gradients = tensors.grad_operands[slot];
      }
    } else {
      const int affine = slot + (batch_norm ? 2 : 0);
      if (batch_norm) {
        task.mean = const_cast<void*>(channel_values(tensors.operands[slot], operand_dtype));
        task.rstd = const_cast<void*>(channel_values(tensors.operands[slot + 1], operand_dtype));
        if (task.rstd)
          for (std::int64_t c = 0; c < task.channels; ++c) {
            if (problem.dtype == DType::f64) {
              double* rstd = static_cast<double*>(task.rstd);
              rstd[c] = 1 / std::sqrt(rstd[c] + op.a);
            } else {
              float* rstd = static_cast<float*>(task.rstd);
              rstd[c] = static_cast<float>(1 / std::sqrt(static_cast<double>(rstd[c]) + op.a));
            }
          }
      }
      if (op.affine) {
        task.norm_weight = channel_values(tensors.operands[affine], operand_dtype);
        task.norm_bias = channel_values(tensors.operands[affine + 1], operand_dtype);
      }
      if (backward(problem)) {
        task.weight_slot = slots++;
        task.bias_slot = slots++;
      }
    }
    work.ops.push_back(entry);
  }
  if (task.norm >= 0) task.norm += pre;
  task.ops = work.ops.data();
  task.num_ops = static_cast<int>(work.ops.size());
  task.num_slots = slots;
  if (!backward(problem) || !norm) task.weight_slot = task.bias_slot = -1;

  // Statistics and sums
  if (group || layer) {
    task.mean = tensors.mean;
    task.rstd = tensors.rstd;
    task.have_statistics = backward(problem) && tensors.mean && tensors.rstd;
  }
  if (group) {
    void* own_mean = take_elements(task.batch * task.num_groups);
    void* own_rstd = take_elements(task.batch * task.num_groups);
    if (!task.mean || !task.rstd) task.mean = own_mean, task.rstd = own_rstd;
    task.moments = carver.take<TileMoments>(work.items * (task.blocks_per_group > 0 ? 1 : task.num_groups));
    if (backward(problem)) {
      work.mean_g = take_elements(task.batch * task.num_groups);
      work.mean_gx = take_elements(task.batch * task.num_groups);
      task.sum_g = work.mean_g;
      task.sum_gx = work.mean_gx;
    }
  }
  if (backward(problem)) task.sums = carver.take<double>(slots * work.parts * task.channels);
  return carver.size();
}

// What is read twice within a slice of the batch.
constexpr double kSliceBytes = 8 << 20;

// group_norm: merges the tiles of each statistic of samples [first, last), in their order.
void merge_moments(const Work& work, std::int64_t first, std::int64_t last, int threads) {
  const FinishTask& task = work.task;
  parallel_for((last - first) * task.num_groups, threads, [&](std::int64_t index) {
    const std::int64_t statistic = first * task.num_groups + index;
    const std::int64_t b = statistic / task.num_groups, g = statistic % task.num_groups;
    TileMoments sum{0, 0, 0};
    auto add = [&](const TileMoments& tile) {
      const double total = sum.count + tile.count, delta = tile.mean - sum.mean;
      sum.m2 += tile.m2 + delta * delta * (sum.count * tile.count / total);
      sum.mean += delta * (tile.count / total);
      sum.count = total;
    };
    if (task.blocks_per_group > 0) {
      const std::int64_t tiles = task.blocks_per_group * task.position_blocks;
      for (std::int64_t tile = 0; tile < tiles; ++tile) add(task.moments[statistic * tiles + tile]);
    } else {
      for (std::int64_t run = 0; run < task.position_blocks; ++run)
        add(task.moments[(b * task.position_blocks + run) * task.num_groups + g]);
    }
    const double rstd = 1 / std::sqrt(sum.m2 / sum.count + task.eps);
    if (task.dtype == DType::f64) {
      static_cast<double*>(task.mean)[statistic] = sum.mean;
      static_cast<double*>(task.rstd)[statistic] = rstd;
    } else {
      static_cast<float*>(task.mean)[statistic] = static_cast<float>(sum.mean);
      static_cast<float*>(task.rstd)[statistic] = static_cast<float>(rstd);
    }
  });
}

double channel_value(const void* values, DType dtype, std::int64_t c, double otherwise) {
  if (!values) return otherwise;
  return dtype == DType::f64 ? static_cast<const double*>(values)[c] : static_cast<const float*>(values)[c];
}

// group_norm backward: the means of g and of g * normalised over each statistic, from the per-channel sums.
void mean_gradients(const Work& work) {
  const FinishTask& task = work.task;
  const std::int64_t group_channels = task.channels / task.num_groups;
  for (std::int64_t b = 0; b < task.batch; ++b)
    for (std::int64_t g = 0; g < task.num_groups; ++g) {
      double sum_g = 0, sum_gx = 0;
      for (std::int64_t c = g * group_channels; c < (g + 1) * group_channels; ++c) {
        double channel_g = 0, channel_gx = 0;
        for (std::int64_t run = 0; run < task.position_blocks; ++run) {
          const std::int64_t part = b * task.position_blocks + run;
          channel_g += task.sums[(task.bias_slot * work.parts + part) * task.channels + c];
          channel_gx += task.sums[(task.weight_slot * work.parts + part) * task.channels + c];
        }
        const double weight = channel_value(task.norm_weight, task.dtype, c, 1);
        sum_g += weight * channel_g;
        sum_gx += weight * channel_gx;
      }
      const double count = static_cast<double>(group_channels * task.positions);
      const std::int64_t statistic = b * task.num_groups + g;
      if (task.dtype == DType::f64) {
        static_cast<double*>(work.mean_g)[statistic] = sum_g / count;
        static_cast<double*>(work.mean_gx)[statistic] = sum_gx / count;
      } else {
        static_cast<float*>(work.mean_g)[statistic] = static_cast<float>(sum_g / count);
        static_cast<float*>(work.mean_gx)[statistic] = static_cast<float>(sum_gx / count);
      }
    }
}

void store_operand_gradients(const Work& work, const Epilogue& epilogue, const Tensors& tensors) {
  const FinishTask& task = work.task;
  const DType dtype = epilogue.operand_dtype.value_or(task.dtype);
  auto total = [&](int slot, std::int64_t c) {
    double sum = 0;
    for (std::int64_t part = 0; part < work.parts; ++part)
      sum += task.sums[(slot * work.parts + part) * task.channels + c];
    return sum;
  };
  for (int index = 0; index < task.num_ops; ++index) {
    const Op& op = epilogue.ops[index];
    const int slot = operand_offset(epilogue, index);
    if (!is_norm(op.kind)) {
      if (task.ops[index].sum_slot >= 0 && tensors.grad_operands[slot])
        for (std::int64_t c = 0; c < task.channels; ++c)
          store_element(tensors.grad_operands[slot], dtype, c, total(task.ops[index].sum_slot, c));
      continue;
    }
    const bool batch_norm = op.kind == OpKind::batch_norm;
    for (std::int64_t c = 0; c < task.channels; ++c) {
      const double weight = total(task.weight_slot, c), bias = total(task.bias_slot, c);
      if (batch_norm) {
        const double rstd = channel_value(task.rstd, task.dtype, c, 1);
        const double scale = channel_value(task.norm_weight, task.dtype, c, 1) * rstd;
        if (tensors.grad_operands[slot]) store_element(tensors.grad_operands[slot], dtype, c, -scale * bias);
        if (tensors.grad_operands[slot + 1])
          store_element(tensors.grad_operands[slot + 1], dtype, c, -scale * rstd * weight / 2);
      }
      const int affine = slot + (batch_norm ? 2 : 0);
      if (op.affine && tensors.grad_operands[affine]) store_element(tensors.grad_operands[affine], dtype, c, weight);
      if (op.affine && tensors.grad_operands[affine + 1])
        store_element(tensors.grad_operands[affine + 1], dtype, c, bias);
    }
  }
}

}  // namespace

// As carve() in finish.cpp takes it.
std::int64_t finish_scratch_bytes(const FinishTask& task) {
  const std::int64_t pitch = (task.tile_positions + 15) / 16 * 16 + 16;
  const std::int64_t rows = task.tile_channels * pitch * (task.grad_output ? 2 : 1);
  const std::int64_t elements =
      rows + task.tile_channels + 4 * pitch + 3 * kFinishChunk + (task.num_ops + 1) * (kFinishChunk + 16) + 12 * 32;
  return elements * (task.dtype == DType::f64 ? 8 : 4);
}

Fit fit_finish(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target) {
  Fit fit;
  if (problem.direction != Direction::epilogue && problem.direction != Direction::grad_epilogue) {
    fit.refusal = "computes epilogue and grad_epilogue only";
    return fit;
  }
  if (device.isa < target) {
    fit.refusal = "needs an instruction set that this machine lacks";
    return fit;
  }
  const DType operands = epilogue.operand_dtype.value_or(problem.dtype);
  const DType output = epilogue.output_dtype.value_or(problem.dtype);
  if ((problem.dtype == DType::f64) != (operands == DType::f64) ||
      (problem.dtype == DType::f64) != (output == DType::f64)) {
    fit.refusal = "f64 cannot be mixed with another dtype";
    return fit;
  }
  Work work;
  fit.workspace_bytes = prepare(problem, epilogue, {}, nullptr, work);
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  fit.fused_pre = true;
  const double elements = static_cast<double>(output_elements(problem));
  const int norm = norm_index(epilogue);
  const bool twice = norm >= 0 && epilogue.ops[norm].kind == OpKind::group_norm;
  const double bytes =
      elements * static_cast<double>(size_of(problem.dtype)) * ((twice ? 2 : 1) * (backward(problem) ? 2 : 1) + 1);
  // Vector operations of 16 lanes a core and ns; 12 of them for an operation and element.
  const double lanes = target >= Isa::avx512 ? 16 : target >= Isa::avx2 ? 8 : 3;
  const double work_us = elements * static_cast<double>(2 + epilogue.ops.size()) * (twice ? 2 : 1) *
                         (backward(problem) ? 2 : 1) * 12 / (lanes * 2000) / std::max(1, device.cores) *
                         (problem.dtype == DType::f64 ? 8 : 1);
  fit.microseconds = 3 + std::max(bytes / (device.bandwidth_tbs * 1e6), work_us);
  return fit;
}

void launch_finish(const Step& step, const Tensors& tensors, Stream stream, const FinishLoops& loops) {
  const int threads = resolve_threads(stream.num_threads);
  Work work;
  std::vector<char> own;
  void* workspace = tensors.workspace;
  if (!workspace) {
    own.resize(prepare(step.problem, step.epilogue, tensors, nullptr, work) + 64);
    workspace = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(own.data()) + 63) / 64 * 64);
  }
  work = {};
  prepare(step.problem, step.epilogue, tensors, workspace, work);
  FinishTask& task = work.task;
  const std::int64_t scratch_bytes = finish_scratch_bytes(task);
  auto run = [&](FinishStage stage) {
    parallel_for(work.items, threads,
                 [&](std::int64_t item) { loops.run(task, stage, item, thread_scratch(scratch_bytes)); });
  };
  const bool group = task.norm >= 0 && task.norm_kind == OpKind::group_norm;
  if (!backward(step.problem)) {
    if (!group || work.items == 0) return run(FinishStage::apply);
    // A few samples at a time, so that they are still in the last cache level when they are normalised; the last ones
    // first, which the convolution has just left there. A bf16 layer of 64 channels on 16 x 128 x 128 positions with
    // gelu and group_norm took 30.2 ms so and 31.0 over the whole batch at once, in channels_last 32.9 and 34.6.
    const std::int64_t items = work.items / task.batch;  // of a sample
    const double sample =
        static_cast<double>(task.channels * task.positions) * static_cast<double>(size_of(task.dtype));
    const std::int64_t samples = std::clamp<std::int64_t>(
        std::max(static_cast<std::int64_t>(kSliceBytes / sample), (8 * threads + items - 1) / items), 1, task.batch);
    for (std::int64_t last = task.batch; last > 0; last -= samples) {
      const std::int64_t first = std::max<std::int64_t>(0, last - samples);
      auto run_slice = [&](FinishStage stage) {
        parallel_for((last - first) * items, threads, [&](std::int64_t item) {
          loops.run(task, stage, first * items + item, thread_scratch(scratch_bytes));
        });
      };
      run_slice(FinishStage::moments);
      merge_moments(work, first, last, threads);
      run_slice(FinishStage::apply);
    }
    return;
  }
  std::fill_n(task.sums, task.num_slots * work.parts * task.channels, 0.0);
  if (group && work.items > 0) {
    if (!task.have_statistics) {
      const void* grad_output = task.grad_output;
      task.grad_output = nullptr;
      run(FinishStage::moments);
      merge_moments(work, 0, task.batch, threads);
      task.grad_output = grad_output;
    }
    run(FinishStage::grad_sums);
    mean_gradients(work);
  }
  run(FinishStage::grad_apply);
  store_operand_gradients(work, step.epilogue, tensors);
}

}  // namespace tconv::cpu
