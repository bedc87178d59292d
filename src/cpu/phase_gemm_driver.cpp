// phase_gemm_driver.cpp — the portable half of phase_gemm: taps, tiles, packed weights, threads.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/phase_gemm.h"
#include "cpu/taps.h"

namespace tconv::cpu {
namespace {

struct Geometry {
  PhaseGemmTask task{};
  std::vector<std::int64_t> plane_phase, plane_rows, tap_offset, mask_offset, tap_source;
  std::vector<int> phase_taps;
  std::vector<int> tap_order;  // [sorted] -> index of the tap in the weight tensor
  double cycles = 0;           // of one core, predicted, all items
  double critical_cycles = 0;  // of the busiest core
};

int lanes_of(Isa target, bool f64) {
  const int bytes = target >= Isa::avx512 ? 64 : target >= Isa::avx2 ? 32 : 16;
  return bytes / (f64 ? 8 : 4);
}

// What the tile search needs to know about the layer.
struct Layer {
  std::int64_t grid[3], range[3], result_step[3];
  double phases, planes, taps, k, m;
  std::int64_t batch, groups;
  int lanes, cores, register_m;
  double element_bytes, l2_bytes;
  bool channels_last;
  std::int64_t slab;  // channels of a slab where slabs are an option, else all
};

// Cycles of one core for one tile; the constants are fitted on a Zen 5 core with AVX-512, those of slabs on a Zen 3 core.
double tile_cycles(const Layer& layer, const std::int64_t* tile, std::int64_t samples, double m, std::int64_t slab) {
  const double count = static_cast<double>(samples);
  double plane = 1;
  for (int dim = 0; dim < 3; ++dim) plane *= static_cast<double>(tile[dim] + layer.range[dim]);
  const double pitch_h = static_cast<double>(tile[2] + layer.range[2]);
  const double slice = pitch_h * static_cast<double>(tile[1] + layer.range[1]);
  const double one = static_cast<double>(tile[1] - 1) * pitch_h + static_cast<double>(tile[2]);
  const double whole = static_cast<double>(tile[0] - 1) * slice + one;
  // A run's vectors, three to a register tile. With 16 registers a tile of two takes most of the time of one of three:
  // hifigan_infer's forward pass ran 55 ms in pieces of 80 positions (3 + 3 + 2 + 2 vectors) and 50 in pieces of 72.
  auto vectors_of = [&](double length) {
    const double n = std::ceil(length / layer.lanes), last = std::fmod(n, 3);
    return layer.register_m == 4 && n > 1 ? n + (last == 1 ? 1.0 : last == 2 ? 0.5 : 0.0) : n;
  };
  const bool slabs = static_cast<double>(slab) < layer.k;  // multiplied in one run
  double vectors = vectors_of((count - 1) * plane + whole);
  if (!slabs)
    vectors = std::min({count * static_cast<double>(tile[0]) * vectors_of(one), count * vectors_of(whole), vectors});
  const double positions = count * static_cast<double>(tile[0] * tile[1] * tile[2]);
  const double rows =
      count * layer.k * layer.planes * static_cast<double>((tile[0] + layer.range[0]) * (tile[1] + layer.range[1]));
  const double staged = count * layer.k * layer.planes * plane;
  double stage = rows * 14 + staged / layer.lanes * (layer.planes > 1 ? 4 : 2.5);
  if (layer.channels_last) stage = rows * 14 + staged * 1.2;
  const double passes = std::max(1.0, std::ceil(layer.k / static_cast<double>(slab)));
  double bytes = staged / passes * layer.element_bytes;
  if (slabs) bytes += vectors * layer.lanes * m * layer.element_bytes;  // the sums
  const double spill = bytes < 0.4 * layer.l2_bytes   ? 1.0
                       : bytes < 0.8 * layer.l2_bytes ? 1.08
                       : bytes < 1.5 * layer.l2_bytes ? 1.25
                                                      : 1.6;
  // A tile of one vector has a chain of dependent sums per channel only.
  const double thin = vectors < 2 ? 1.8 : vectors < 3 ? 1.2 : 1.0;
  const double per_fma = m >= 4 ? 0.55 : m >= 2 ? 0.7 : 1.0;
  const double multiply = vectors * layer.taps * layer.k * m * per_fma * spill * thin;
  const double calls = layer.phases * std::ceil(m / layer.register_m) * std::ceil(vectors / 3) * passes;
  const double result_rows =
      layer.phases * m * count * static_cast<double>(tile[0] * tile[1]) / static_cast<double>(layer.result_step[2]);
  // Weights that the second cache level cannot keep from tile to tile.
  const double weights = layer.taps * layer.k * m * layer.element_bytes;
  const double stream = weights + bytes > layer.l2_bytes ? weights / 16 : 0;
  double store = result_rows * 16 + layer.phases * m * positions / layer.lanes * 4;
  // Measured 1 to 2.5 cycles more than one an element for strides of 2 and 3 and 3 to 64 channels: at a price of one the
  // planner chose this kernel for 3 to 16 channels with stride 2, 11.7 ms instead of 6.1.
  if (layer.channels_last) store = layer.phases * m * positions * 2.0;
  return 300 + stage + multiply + stream + calls * (slabs ? 60 : 20) + store;
}

// Grids of more positions fill a tile alone.
constexpr std::int64_t kFewPositions = 4096;

std::vector<std::int64_t> tile_candidates(std::int64_t extent, std::int64_t multiple) {
  std::vector<std::int64_t> sizes;
  for (std::int64_t parts = 1; parts <= extent; parts += std::max<std::int64_t>(1, parts / 3)) {
    std::int64_t size = (extent + parts - 1) / parts;
    if (multiple > 1 && parts > 1) size = (size + multiple - 1) / multiple * multiple;
    if (sizes.empty() || size < sizes.back()) sizes.push_back(size);
    if (size <= multiple) break;
  }
  return sizes;
}

void choose_tile(const Layer& layer, Geometry& geometry) {
  PhaseGemmTask& task = geometry.task;
  double best = HUGE_VAL;
  auto consider_slab = [&](const std::int64_t* tile, std::int64_t samples, std::int64_t slab) {
    double items = static_cast<double>((layer.batch + samples - 1) / samples * layer.groups);
    double plane = static_cast<double>(slab) * layer.planes * layer.element_bytes * static_cast<double>(samples);
    for (int dim = 0; dim < 3; ++dim) {
      items *= static_cast<double>((layer.grid[dim] + tile[dim] - 1) / tile[dim]);
      plane *= static_cast<double>(tile[dim] + layer.range[dim]);
    }
    const bool least = samples == 1 && tile[2] <= layer.lanes && tile[1] == 1 && tile[0] == 1;
    if (plane > 3.0 * layer.l2_bytes && !least) return;
    for (std::int64_t chunks = 1; chunks <= 16; chunks *= 2) {
      const std::int64_t blocks = (static_cast<std::int64_t>(layer.m) + layer.register_m - 1) / layer.register_m;
      if (chunks > blocks) break;
      const double chunk = static_cast<double>((blocks + chunks - 1) / chunks * layer.register_m);
      const double cycles = tile_cycles(layer, tile, samples, std::min(chunk, layer.m), slab);
      const double rounds = std::ceil(items * static_cast<double>(chunks) / layer.cores);
      const double critical = rounds * cycles;
      if (critical >= best) continue;
      best = critical;
      geometry.critical_cycles = critical;
      geometry.cycles = items * static_cast<double>(chunks) * cycles;
      std::copy_n(tile, 3, task.tile);
      task.samples = samples;
      task.m_chunk = static_cast<std::int64_t>(chunk);
      task.slab = std::max<std::int64_t>(1, slab);
    }
  };
  auto consider = [&](const std::int64_t* tile, std::int64_t samples) {
    consider_slab(tile, samples, static_cast<std::int64_t>(layer.k));
    if (static_cast<double>(layer.slab) < layer.k) consider_slab(tile, samples, layer.slab);
  };
  for (std::int64_t w : tile_candidates(layer.grid[2], layer.lanes))
    for (std::int64_t h : tile_candidates(layer.grid[1], 1))
      for (std::int64_t d : tile_candidates(layer.grid[0], 1)) {
        const std::int64_t tile[3] = {d, h, w};
        consider(tile, 1);
        if (w < layer.grid[2] || h < layer.grid[1] || d < layer.grid[0] || w * h * d > kFewPositions) continue;
        for (std::int64_t samples : tile_candidates(layer.batch, 1))
          if (samples > 1) consider(tile, samples);
      }
}

// grad_weight: register tiles of 4 x 4 channels over the positions of a tile, 16 sums reduced for every tap.
void choose_grad_weight_tile(const Layer& layer, Geometry& geometry) {
  double best = HUGE_VAL;
  for (std::int64_t w : tile_candidates(layer.grid[2], layer.lanes))
    for (std::int64_t h : tile_candidates(layer.grid[1], 1))
      for (std::int64_t d : tile_candidates(layer.grid[0], 1)) {
        const std::int64_t tile[3] = {d, h, w};
        double items = static_cast<double>(layer.batch * layer.groups), plane = 1;
        for (int dim = 0; dim < 3; ++dim) {
          items *= static_cast<double>((layer.grid[dim] + tile[dim] - 1) / tile[dim]);
          plane *= static_cast<double>(tile[dim] + layer.range[dim]);
        }
        const double staged = (layer.k * layer.planes + layer.m) * plane, bytes = staged * layer.element_bytes;
        if (bytes > 3.0 * layer.l2_bytes && (w > layer.lanes || h > 1 || d > 1)) continue;
        const double spill = bytes < 0.5 * layer.l2_bytes ? 1.0 : bytes < layer.l2_bytes ? 1.1 : 1.4;
        const double rows = (layer.k * layer.planes + layer.m) * plane / static_cast<double>(w + layer.range[2]);
        const double vectors = std::ceil(plane / layer.lanes);
        double products = std::ceil(layer.k / 4) * std::ceil(layer.m / 4) * layer.taps * (vectors * 10 * spill + 60);
        // Three input channels are tiles of 2 and 1. With 16 registers kernelbench_2_60's layer (8 samples) took 41 ms here
        // and 27 in channel_gemm_grad_weight.
        if (layer.k < 4 || (layer.m < 4 && layer.register_m == 8)) products *= 0.6;
        if (layer.k == 1 && layer.m == 1) {  // as many taps as lanes at a time, those left over one by one
          const double lanes = static_cast<double>(layer.lanes), left = std::fmod(layer.taps, lanes);
          const double together = std::floor(layer.taps / lanes) + (left > lanes / 2 ? 1 : 0);
          products = together * (vectors * (0.55 * lanes + 1) * spill + 60);
          if (left <= lanes / 2) products += left * (vectors * 1.5 * spill + 30);
        }
        const double cycles = 500 + rows * 16 + staged / layer.lanes * (layer.channels_last ? 20 : 5) + products;
        const double total = items * cycles;
        if (total >= best) continue;
        best = total;
        geometry.cycles = total;
        geometry.critical_cycles = total / layer.cores;
        std::copy_n(tile, 3, geometry.task.tile);
        geometry.task.samples = 1;
        geometry.task.m_chunk = static_cast<std::int64_t>(layer.m);
      }
}

// Everything that does not depend on pointers.
std::shared_ptr<Geometry> make_geometry(const Problem& problem, const Device& device, Isa target) {
  auto geometry = std::make_shared<Geometry>();
  PhaseGemmTask& task = geometry->task;
  const bool forward = problem.direction == Direction::forward;
  const Dims out = output_size(problem);
  task.dtype = problem.dtype;
  task.layout = problem.layout;
  task.batch = problem.batch;
  task.groups = problem.groups;
  task.k = (forward ? problem.in_channels : problem.out_channels) / problem.groups;
  task.m = (forward ? problem.out_channels : problem.in_channels) / problem.groups;
  task.source_channels = task.groups * task.k;
  task.rows = target == Isa::avx512_bf16 ? (task.k + 1) / 2 : task.k;
  std::vector<DimTap> taps[3];
  std::vector<int> phases[3];  // used source phases
  std::int64_t range[3];
  int num_result_phases = 1;
  for (int dim = 0; dim < 3; ++dim) {
    task.source_size[dim] = forward ? problem.input[dim] : out[dim];
    task.result_size[dim] = forward ? out[dim] : problem.input[dim];
    task.source_step[dim] = forward ? 1 : problem.stride[dim];
    task.result_step[dim] = forward ? problem.stride[dim] : 1;
    task.grid[dim] = (task.result_size[dim] + task.result_step[dim] - 1) / task.result_step[dim];
    num_result_phases *= static_cast<int>(task.result_step[dim]);
    taps[dim] = dim_taps(problem, dim);
    int low = taps[dim].front().shift, high = low;
    for (const DimTap& tap : taps[dim]) {
      low = std::min(low, tap.shift);
      high = std::max(high, tap.shift);
      if (std::find(phases[dim].begin(), phases[dim].end(), tap.source_phase) == phases[dim].end())
        phases[dim].push_back(tap.source_phase);
    }
    std::sort(phases[dim].begin(), phases[dim].end());
    task.first_shift[dim] = low;
    range[dim] = high - low;
  }
  auto add_rows = [&](int dim, int phase) {
    std::int64_t low = range[dim], high = 0;
    for (const DimTap& tap : taps[dim]) {
      if (tap.source_phase != phase) continue;
      low = std::min(low, tap.shift - task.first_shift[dim]);
      high = std::max(high, tap.shift - task.first_shift[dim]);
    }
    geometry->plane_rows.insert(geometry->plane_rows.end(), {low, high - low});
  };
  for (int d : phases[0])
    for (int h : phases[1])
      for (int w : phases[2]) {
        geometry->plane_phase.insert(geometry->plane_phase.end(), {d, h, w});
        add_rows(0, d);
        add_rows(1, h);
      }
  task.num_planes = static_cast<int>(geometry->plane_phase.size() / 3);
  task.plane_phase = geometry->plane_phase.data();
  task.plane_rows = geometry->plane_rows.data();
  task.num_taps = volume(problem.kernel);

  Layer layer{};
  for (int dim = 0; dim < 3; ++dim) {
    layer.grid[dim] = std::max<std::int64_t>(1, task.grid[dim]);
    layer.range[dim] = range[dim];
    layer.result_step[dim] = task.result_step[dim];
  }
  const bool f64 = problem.dtype == DType::f64;
  layer.phases = num_result_phases;
  layer.planes = task.num_planes;
  layer.taps = static_cast<double>(task.num_taps);
  layer.k = static_cast<double>(task.rows);
  layer.m = static_cast<double>(std::max<std::int64_t>(1, task.m));
  layer.batch = std::max<std::int64_t>(1, problem.batch);
  layer.groups = problem.groups;
  layer.lanes = lanes_of(target, f64);
  layer.cores = std::max(1, device.cores);
  layer.register_m = target >= Isa::avx512 ? 8 : 4;
  layer.element_bytes = f64 ? 8 : 4;
  layer.l2_bytes = static_cast<double>(device.l2_bytes);
  layer.channels_last = problem.layout == Layout::channels_last;
  task.slab = layer.slab = task.rows;
  if (target == Isa::avx2 && problem.direction == Direction::grad_input && task.m >= 64) {
    // The lines of a slab that 24 positions read take a third of the first cache level, which a core's threads share. Fewer
    // than 64 results read them too seldom: kernelbench_1_73 (32) took 709 ms instead of 469.
    const double rows = std::min(layer.taps, layer.planes * static_cast<double>((range[0] + 1) * (range[1] + 1)));
    const double bytes = rows * static_cast<double>(24 + 16 + range[2]) * layer.element_bytes;
    layer.slab =
        std::clamp<std::int64_t>(static_cast<std::int64_t>(11264 / bytes), 1, std::max<std::int64_t>(1, task.rows));
  }
  if (problem.direction == Direction::grad_weight)
    choose_grad_weight_tile(layer, *geometry);
  else
    choose_tile(layer, *geometry);

  for (int dim = 0; dim < 3; ++dim) {
    task.tiles[dim] = (task.grid[dim] + task.tile[dim] - 1) / task.tile[dim];
    task.plane[dim] = task.tile[dim] + range[dim];
  }
  task.m_chunks = task.m == 0 ? 0 : (task.m + task.m_chunk - 1) / task.m_chunk;
  // The groups of a channels_last position share cache lines: they stay with one core while there are tiles for all.
  const std::int64_t tiles =
      (task.batch + task.samples - 1) / task.samples * task.tiles[0] * task.tiles[1] * task.tiles[2];
  task.item_groups = layer.channels_last && tiles >= 4 * layer.cores ? task.groups : 1;
  task.sample_pitch = task.plane[0] * task.plane[1] * task.plane[2];
  task.sample_tiles = (task.batch + task.samples - 1) / task.samples;
  task.plane_pitch = task.samples * task.sample_pitch;
  // Off multiples of 16 elements: planes one page apart would share cache sets.
  task.plane_pitch = (task.plane_pitch + 15) / 16 * 16 + 16;
  // A channel's planes of all phases are read together: off multiples of 4 KB, where they would share the sets of the
  // first cache level.
  task.phase_pitch = task.slab * task.plane_pitch;
  if (problem.direction == Direction::grad_input) task.phase_pitch = (task.phase_pitch + 1023) / 1024 * 1024 + 80;

  const std::int64_t mask_pitch = task.plane_pitch;
  for (std::int64_t rd = 0; rd < task.result_step[0]; ++rd)
    for (std::int64_t rh = 0; rh < task.result_step[1]; ++rh)
      for (std::int64_t rw = 0; rw < task.result_step[2]; ++rw) {
        geometry->phase_taps.push_back(static_cast<int>(geometry->tap_order.size()));
        for (const DimTap& td : taps[0])
          for (const DimTap& th : taps[1])
            for (const DimTap& tw : taps[2]) {
              if (td.result_phase != rd || th.result_phase != rh || tw.result_phase != rw) continue;
              auto index = [&](int dim, int phase) {
                return std::find(phases[dim].begin(), phases[dim].end(), phase) - phases[dim].begin();
              };
              const std::int64_t plane = (index(0, td.source_phase) * static_cast<std::int64_t>(phases[1].size()) +
                                          index(1, th.source_phase)) *
                                             static_cast<std::int64_t>(phases[2].size()) +
                                         index(2, tw.source_phase);
              const std::int64_t offset =
                  ((td.shift - task.first_shift[0]) * task.plane[1] + th.shift - task.first_shift[1]) * task.plane[2] +
                  tw.shift - task.first_shift[2];
              geometry->tap_order.push_back(
                  static_cast<int>((td.tap * problem.kernel[1] + th.tap) * problem.kernel[2] + tw.tap));
              geometry->tap_offset.push_back(plane * task.phase_pitch + offset);
              geometry->mask_offset.push_back(plane * mask_pitch + offset);
              geometry->tap_source.push_back(task.source_step[0] * td.shift + td.source_phase);
              geometry->tap_source.push_back(task.source_step[1] * th.shift + th.source_phase);
            }
      }
  geometry->phase_taps.push_back(static_cast<int>(geometry->tap_order.size()));
  task.phase_taps = geometry->phase_taps.data();
  task.tap_offset = geometry->tap_offset.data();
  task.mask_offset = geometry->mask_offset.data();
  task.tap_source = geometry->tap_source.data();
  return geometry;
}

std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Packed weights, the bias and channel operands, in this order.
std::size_t workspace_bytes(const Problem& problem, const Epilogue& epilogue) {
  const std::size_t element = problem.dtype == DType::f64 ? 8 : 4;
  return round_up(static_cast<std::size_t>(weight_elements(problem)) * element + 64) +
         operand_bytes(problem, epilogue, 0);
}

// Returns whether every weight is finite.
bool pack_weights(const Problem& problem, const Geometry& geometry, const void* weight, void* packed, int threads,
                  const PhaseGemmLoops& loops) {
  const PhaseGemmTask& task = geometry.task;
  const bool forward = problem.direction == Direction::forward;
  PackTask pack{};
  pack.dtype = problem.dtype;
  pack.weight = weight;
  pack.packed = packed;
  pack.elements = weight_elements(problem);
  pack.taps = task.num_taps;
  pack.k = task.k;
  pack.rows = task.rows;
  pack.slab = task.slab;
  pack.m = task.m;
  pack.k_stride = (forward ? task.m : 1) * task.num_taps;
  pack.m_stride = (forward ? 1 : task.k) * task.num_taps;
  std::vector<std::int64_t> tap_first(static_cast<std::size_t>(task.num_taps)), tap_step(tap_first.size(), 1);
  for (std::size_t phase = 0; phase + 1 < geometry.phase_taps.size(); ++phase)
    for (int slot = task.phase_taps[phase]; slot < task.phase_taps[phase + 1]; ++slot) {
      const std::size_t tap = static_cast<std::size_t>(geometry.tap_order[static_cast<std::size_t>(slot)]);
      tap_first[tap] = slot * task.rows;
      if (!loops.taps_innermost) continue;
      const int first = task.phase_taps[phase];
      tap_first[tap] = first * task.rows + slot - first;
      tap_step[tap] = task.phase_taps[phase + 1] - first;
    }
  pack.tap_first = tap_first.data();
  pack.tap_step = tap_step.data();
  const std::int64_t blocks = (task.m + loops.register_m - 1) / loops.register_m;
  std::atomic<bool> finite{true};
  parallel_for(task.groups * blocks, threads, [&](std::int64_t item) {
    if (!loops.pack(pack, item)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace

Fit refuse_gemm(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target, bool odd_channels) {
  Fit fit;
  if (problem.direction != Direction::forward && problem.direction != Direction::grad_input) {
    fit.refusal = "computes forward and grad_input only";
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
  if (target >= Isa::avx512_bf16) {
    // Products of pairs of bf16: two source channels at a time, whose values must still be those of the tensor.
    const bool forward = problem.direction == Direction::forward;
    const std::int64_t k = (forward ? problem.in_channels : problem.out_channels) / problem.groups;
    if (problem.dtype != DType::bf16)
      fit.refusal = "multiplies bf16 only, not " + std::string(to_string(problem.dtype));
    if (!epilogue.pre.empty())
      fit.refusal = "cannot apply an operation to the input without rounding its result to bf16";
    if (k % 2 != 0 && !odd_channels) fit.refusal = "an odd number of source channels per group, " + std::to_string(k);
  }
  return fit;
}

Fit fit_phase_gemm(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target) {
  Fit fit = refuse_gemm(problem, epilogue, device, target, false);
  if (!fit.refusal.empty()) return fit;
  const int norm = norm_index(epilogue);
  fit.fused_ops = norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
  fit.fused_pre = true;
  fit.workspace_bytes = workspace_bytes(problem, epilogue);
  const std::shared_ptr<Geometry> geometry = make_geometry(problem, device, target);
  // fp32_tflops counts both FMA pipes of every core at the machine's own vector width.
  const double flops_per_cycle = device.isa >= Isa::avx512 ? 64 : device.isa >= Isa::avx2 ? 32 : 16;
  const double cycles_per_us = std::max(500.0, device.fp32_tflops * 1e6 / device.cores / flops_per_cycle);
  const double pack = static_cast<double>(weight_elements(problem)) * 3 / device.cores;
  const double chain = static_cast<double>(output_elements(problem)) * fit.fused_ops * 12 /
                       lanes_of(target, problem.dtype == DType::f64) / device.cores;
  const double compute = (geometry->critical_cycles + pack + chain) / cycles_per_us;
  const double memory = minimum_bytes(problem) / (device.bandwidth_tbs * 1e6);
  fit.microseconds = 4 + std::max(compute, memory);
  return fit;
}

void prepare_phase_gemm(Step& step, Isa target) { step.state = make_geometry(step.problem, step.device, target); }

void launch_phase_gemm(const Step& step, const Tensors& tensors, Stream stream, const PhaseGemmLoops& loops) {
  const Problem& problem = step.problem;
  const Epilogue& epilogue = step.epilogue;
  const int threads = resolve_threads(stream.num_threads);
  std::shared_ptr<Geometry> own;
  const Geometry* geometry = static_cast<const Geometry*>(step.state.get());
  if (!geometry) {
    own = make_geometry(problem, step.device, loops.target);
    geometry = own.get();
  }
  PhaseGemmTask task = geometry->task;
  std::vector<char> own_workspace;
  char* workspace = static_cast<char*>(tensors.workspace);
  if (!workspace) {
    own_workspace.resize(workspace_bytes(problem, epilogue) + 64);
    workspace = own_workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(own_workspace.data()) % 64);
  }
  const std::size_t element = problem.dtype == DType::f64 ? 8 : 4;
  task.weight = workspace;
  workspace += round_up(static_cast<std::size_t>(weight_elements(problem)) * element + 64);
  const bool finite = pack_weights(problem, *geometry, tensors.weight, const_cast<void*>(task.weight), threads, loops);
  task.masked = !finite;
  const bool forward = problem.direction == Direction::forward;
  task.source = forward ? tensors.input : tensors.grad_output;
  task.result = tensors.output;
  task.result_dtype = epilogue.output_dtype.value_or(problem.dtype);
  const Operands operands = take_operands(problem, epilogue, tensors, workspace, 0);
  task.bias = operands.bias;
  task.pre = operands.pre.data();
  task.num_pre = static_cast<int>(operands.pre.size());
  task.ops = operands.ops.data();
  task.num_ops = static_cast<int>(operands.ops.size());
  const std::int64_t items = task.sample_tiles * (task.groups / task.item_groups) * task.tiles[0] * task.tiles[1] *
                             task.tiles[2] * task.m_chunks;
  const std::int64_t scratch_bytes = loops.scratch_bytes(task);
  parallel_for(items, threads, [&](std::int64_t item) { loops.run(task, item, thread_scratch(scratch_bytes)); });
}

// ---- grad_weight -------------------------------------------------------------------------------------------------------

namespace {

// The partition of the sum depends on the problem only, never on the threads.
struct Parts {
  std::int64_t parts, chunk, chunks, tiles;
};

Parts parts_of(const Problem& problem, const PhaseGemmTask& task) {
  Parts parts;
  parts.tiles = task.batch * task.tiles[0] * task.tiles[1] * task.tiles[2];
  const std::int64_t bytes =
      std::max<std::int64_t>(1, weight_elements(problem) * (problem.dtype == DType::f64 ? 8 : 4));
  parts.parts = std::clamp<std::int64_t>((8 << 20) / bytes, 1, std::clamp<std::int64_t>(parts.tiles, 1, 32));
  const std::int64_t items = std::max<std::int64_t>(1, parts.parts * task.groups), blocks = (task.m + 3) / 4;
  parts.chunks = std::clamp<std::int64_t>((16 + items - 1) / items, 1, std::max<std::int64_t>(1, blocks));
  parts.chunk = std::max<std::int64_t>(4, (blocks + parts.chunks - 1) / parts.chunks * 4);
  parts.chunks = (task.m + parts.chunk - 1) / parts.chunk;
  return parts;
}

std::size_t grad_weight_workspace(const Problem& problem, const PhaseGemmTask& task) {
  const std::size_t element = problem.dtype == DType::f64 ? 8 : 4;
  return round_up(static_cast<std::size_t>(parts_of(problem, task).parts * weight_elements(problem)) * element) +
         grad_bias_bytes(problem) + 64;
}

}  // namespace

Fit fit_grad_weight(const Problem& problem, const Epilogue& epilogue, const Device& device, Isa target) {
  Fit fit;
  if (problem.direction != Direction::grad_weight) {
    fit.refusal = "computes grad_weight only";
    return fit;
  }
  if (device.isa < target) {
    fit.refusal = "needs an instruction set that this machine lacks";
    return fit;
  }
  fit.fused_pre = true;
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  const std::shared_ptr<Geometry> geometry = make_geometry(problem, device, target);
  fit.workspace_bytes = grad_weight_workspace(problem, geometry->task);
  const double flops_per_cycle = device.isa >= Isa::avx512 ? 64 : device.isa >= Isa::avx2 ? 32 : 16;
  const double cycles_per_us = std::max(500.0, device.fp32_tflops * 1e6 / device.cores / flops_per_cycle);
  const double memory = minimum_bytes(problem) / (device.bandwidth_tbs * 1e6);
  fit.microseconds = 5 + std::max(geometry->critical_cycles / cycles_per_us, memory);
  return fit;
}

void prepare_grad_weight(Step& step, Isa target) { step.state = make_geometry(step.problem, step.device, target); }

void launch_grad_weight(const Step& step, const Tensors& tensors, Stream stream, const GradWeightLoops& loops) {
  const Problem& problem = step.problem;
  const int threads = resolve_threads(stream.num_threads);
  std::shared_ptr<Geometry> own;
  const Geometry* geometry = static_cast<const Geometry*>(step.state.get());
  if (!geometry) {
    own = make_geometry(problem, step.device, loops.target);
    geometry = own.get();
  }
  GradWeightTask task{};
  task.gradient = geometry->task;
  task.gradient.source = tensors.grad_output;
  const Parts parts = parts_of(problem, task.gradient);
  task.gradient.m_chunk = parts.chunk;
  task.gradient.m_chunks = parts.chunks;
  const std::vector<std::int64_t> origin(4, 0);
  std::vector<PhaseOp> pre;
  for (const Op& op : step.epilogue.pre) pre.push_back({op.kind, OperandKind::none, op.a, op.b, nullptr});
  task.input = geometry->task;
  task.input.source = tensors.input;
  task.input.source_channels = problem.in_channels;
  task.input.num_planes = 1;
  task.input.plane_phase = origin.data();
  task.input.plane_rows = origin.data();
  task.input.pre = pre.data();
  task.input.num_pre = static_cast<int>(pre.size());
  for (int dim = 0; dim < 3; ++dim) {
    task.input.source_size[dim] = problem.input[dim];
    task.input.source_step[dim] = 1;
    task.input.first_shift[dim] = 0;
    task.input.tile[dim] = task.input.plane[dim];  // staged as wide as the gradient's tile, in rows of the same pitch
  }
  task.tap_order = geometry->tap_order.data();
  task.parts = parts.parts;
  task.num_tiles = parts.tiles;
  task.weight_elements = weight_elements(problem);
  const std::size_t element = problem.dtype == DType::f64 ? 8 : 4;
  std::vector<char> own_workspace;
  char* workspace = static_cast<char*>(tensors.workspace);
  if (!workspace) {
    own_workspace.resize(grad_weight_workspace(problem, task.gradient) + 64);
    workspace = own_workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(own_workspace.data()) % 64);
  }
  task.partial = workspace;
  workspace += round_up(static_cast<std::size_t>(parts.parts * task.weight_elements) * element);
  const std::int64_t scratch_bytes = loops.scratch_bytes(task);
  parallel_for(parts.parts * problem.groups * parts.chunks, threads,
               [&](std::int64_t item) { loops.run(task, item, thread_scratch(scratch_bytes)); });
  constexpr std::int64_t kMerge = 16384;
  parallel_for((task.weight_elements + kMerge - 1) / kMerge, threads, [&](std::int64_t item) {
    loops.merge(task, item * kMerge, std::min(task.weight_elements, (item + 1) * kMerge), tensors.output);
  });
  if (tensors.grad_bias) launch_grad_bias(problem, tensors, workspace, threads, loops.sum_bias);
}

}  // namespace tconv::cpu
