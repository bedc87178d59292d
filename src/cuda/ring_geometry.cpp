// ring_geometry.cpp — see ring_geometry.h.
// SPDX-License-Identifier: Apache-2.0
#include "ring_geometry.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <span>

#include "finish_prelude.h"

namespace tconv::cuda::ring {
namespace {

constexpr int kMaxStagedRows = 512;  // of a tile; their table takes 4 bytes each
constexpr int kStaticBytes = 1024;   // barriers, 16 bytes a stage and 320 others; what follows is aligned to as much
constexpr int kMaxWidthPhases = 16;
constexpr int kMaxTaps = 4096;           // tables in constant memory
constexpr int kMaxStages = 4;            // of positions
constexpr int kWeightStageBytes = 8192;  // of one row block
constexpr int kFewWeightStages = 4, kLeastWeightStages = 3, kMostWeightStages = 8, kMostStayingStages = 40;
constexpr int kMostElementStride = 8;                    // of the copy engine
constexpr int64_t kRawBytes = 28672, kMostRawSlots = 4;  // rows under way, see ring_gemm_rows_sm90.cuh
constexpr int64_t kMostBox = 256;                        // positions along a side
constexpr int64_t kLongRow = 4096;  // of 1d layers: fills tiles alone, and images can be copied piece by piece
constexpr int64_t kMostElements = int64_t{1} << 31;  // offsets within an image are 32-bit
// For a piece of a row that shares its sectors; where the copy engine stages tiles, fewer rows cost more than they save.
constexpr double kPieceCycles = 15.0, kPieceCyclesTensor = 5.0;

}  // namespace

int layer_key(const Config& config) { return config.block_m | (config.split & (kWalk | kSplitWidth)); }

namespace {

// The most width phases of a pass with which the fewest rows of its shifts are zeros: phases side by side reach the source
// at different shifts, and a shift has a row for every phase.
int phases_without_zeros(const std::vector<std::vector<std::pair<int, int>>>& phases) {
  const int width = static_cast<int>(phases.size());
  int best = 1, fewest = std::numeric_limits<int>::max();
  for (int together = 1; together <= std::min(width, kMaxWidthPhases); ++together) {
    if (width % together != 0) continue;
    int rows = 0;
    for (int first = 0; first < width; first += together) {
      std::set<int> shifts;
      for (int r = first; r < first + together; ++r)
        for (const auto& [tap, shift] : phases[static_cast<std::size_t>(r)]) shifts.insert(shift);
      rows += together * static_cast<int>(shifts.size());
    }
    if (rows <= fewest) fewest = rows, best = together;
  }
  return best;
}

}  // namespace

Geometry layer_geometry(const Problem& problem, const Config& config) {
  const int fold = config.block_m / 64;
  Geometry g;
  g.forward = problem.direction == Direction::forward;
  g.fold = fold;
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
  const Dims& source = g.forward ? problem.input : output;
  const Dims& result = g.forward ? output : problem.input;
  if (volume(source) >= kMostElements || volume(result) >= kMostElements)
    return refuse("a plane of 2^31 elements or more");
  g.batch = problem.batch;
  for (int dim = 0; dim < 3; ++dim) {
    g.source_size[dim] = source[dim];
    g.result_size[dim] = result[dim];
  }
  g.rows_are_images = problem.rank == 1 && g.result_size[2] < kLongRow &&
                      std::max(input_elements(problem), output_elements(problem)) < kMostElements;
  if (g.rows_are_images) {
    g.source_size[1] = g.result_size[1] = problem.batch;
    g.batch = 1;
  }

  // phases[dim][r] -> (tap, where it reads relative to the lattice position)
  std::vector<std::vector<std::pair<int, int>>> phases[3];
  for (int dim = 0; dim < 3; ++dim) {
    const int stride = static_cast<int>(problem.stride[dim]), folded = dim == 2 ? fold : 1;
    phases[dim].resize(static_cast<std::size_t>(g.forward ? stride * folded : folded));
    for (int t = 0; t < problem.kernel[dim]; ++t) {
      const int offset = static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]);
      for (int r = 0; r < static_cast<int>(phases[dim].size()); ++r) {
        if (g.forward && (r - offset) % stride != 0) continue;
        phases[dim][r].emplace_back(t, g.forward ? (r - offset) / stride : stride * r + offset);
      }
    }
    g.source_step[dim] = g.forward ? folded : stride * folded;
    g.result_step[dim] = g.forward ? stride * folded : folded;
    g.lattice[dim] = ceil_div(g.result_size[dim], g.result_step[dim]);
    if (dim == 2) continue;
    g.offset[dim].resize(problem.kernel[dim]);
    for (const auto& taps : phases[dim])
      for (const auto& [tap, shift] : taps) g.offset[dim][tap] = shift;
  }
  for (const auto& taps : phases[2])
    for (const auto& [tap, shift] : taps) g.shifts.push_back(shift);
  std::sort(g.shifts.begin(), g.shifts.end());
  g.shifts.erase(std::unique(g.shifts.begin(), g.shifts.end()), g.shifts.end());

  const int width = static_cast<int>(phases[2].size());
  g.width_phases = std::min(width, kMaxWidthPhases);
  if (config.split & kSplitWidth) {
    const int together = phases_without_zeros(phases[2]);
    if (together == g.width_phases) return refuse("width phases side by side have the same shifts");
    g.width_phases = together;
  }
  for (int rw = 0; rw < g.width_phases; ++rw)
    if (width > g.width_phases || !phases[2][rw].empty()) g.live.push_back(rw);
  g.num_live = static_cast<int>(g.live.size());
  g.channels = 64 / g.num_live;
  if (fold > 1 && (width > kMaxWidthPhases || int64_t{g.n} * g.num_live > 64))
    return refuse("the rows are full without folding the width");
  g.channels = std::min(g.channels, g.num_live == 2 ? static_cast<int>(ceil_div(g.n, 8) * 8) : g.n);
  // channels_last results leave 16 bytes at a time where a block's channels are so many.
  const int wide = 16 / static_cast<int>(size_of(problem.dtype));
  if (problem.layout == Layout::channels_last && g.channels > wide && g.channels < g.n && g.n % wide == 0)
    g.channels = g.channels / wide * wide;
  g.row_blocks = static_cast<int>(ceil_div(g.n, g.channels));
  const int64_t passes =
      static_cast<int64_t>(phases[0].size()) * static_cast<int64_t>(phases[1].size()) * ceil_div(width, g.width_phases);
  if (passes > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " phases");
  std::vector<Pass> all;
  for (int rd = 0; rd < static_cast<int>(phases[0].size()); ++rd)
    for (int rh = 0; rh < static_cast<int>(phases[1].size()); ++rh)
      for (int rw0 = 0; rw0 < width; rw0 += g.width_phases) {
        Pass pass{{rd, rh, rw0}, {}};
        std::map<int, std::vector<int>> by_shift;  // width shift -> tap per live phase
        for (int l = 0; l < g.num_live; ++l) {
          if (rw0 + g.live[l] >= width) continue;
          for (const auto& [tap, shift] : phases[2][rw0 + g.live[l]])
            by_shift.try_emplace(shift, g.num_live, -1).first->second[l] = tap;
        }
        for (const auto& td : phases[0][rd])
          for (const auto& th : phases[1][rh])
            for (const auto& [shift, taps] : by_shift) {
              const auto at = std::lower_bound(g.shifts.begin(), g.shifts.end(), shift) - g.shifts.begin();
              pass.entries.push_back({td.first, th.first, static_cast<int>(at), taps});
            }
        g.num_entries += static_cast<int>(pass.entries.size());
        g.most_entries = std::max(g.most_entries, static_cast<int>(pass.entries.size()));
        g.live_passes += !pass.entries.empty();
        all.push_back(std::move(pass));
      }
  g.passes = std::make_shared<const std::vector<Pass>>(std::move(all));
  if (g.num_entries > kMaxTaps) return refuse("more than " + std::to_string(kMaxTaps) + " tap shifts");
  return g;
}

namespace {

// A fixed set, so that images of changing size share a few specialisations; the last ones fill a run to the end.
std::vector<int> tile_widths(const Config& config, const Geometry& g) {
  const int block_n = config.block_n, halo = columns_of(8, g.source_step[2], g.shifts).length - 8;
  std::vector<int> widths;
  for (int tw = 8; tw <= block_n; tw += tw < 64 ? 4 : 8) widths.push_back(tw);
  for (int run : {32, 64, 128, block_n}) widths.push_back(run - halo);
  return widths;
}

}  // namespace

std::pair<int, int> reach_of(const Geometry& g, int dim) {
  const auto [low, high] = std::minmax_element(g.staged[dim].base.begin(), g.staged[dim].base.end());
  return {*low, *high + (g.staged[dim].length - 1) * g.source_step[dim]};
}

bool splits_passes(const Config& config) { return (config.split & kSplitPasses) != 0; }

Problem seen_by(const Config& config, const Problem& problem) {
  if ((config.split & kWalk) == 0 || problem.rank != 2) return problem;
  Problem seen = problem;
  seen.rank = 3;
  for (Dims* dims : {&seen.input, &seen.kernel, &seen.stride, &seen.padding, &seen.output_padding, &seen.dilation})
    std::swap((*dims)[0], (*dims)[1]);
  return seen;
}

namespace {

// Products between two hand-overs of weights, both warpgroups together, in cycles: a product of n positions takes n / 2, at
// least 32 for its operands.
double group_cycles(const Config& config, const Geometry& g) {
  return 2.0 * g.entries_per_stage * (config.block_k / 8) * std::max(g.columns / 2.0, 32.0);
}
// Weights come from L2 about 1300 cycles after a stage is given back, and that is one group late.
constexpr double kWeightLatency = 1340.0;

// What one multiprocessor needs for an item, in cycles of its clock. The form follows a profile of the roles on an H100, the
// constants are fitted to 198 measurements there (root mean square of log(predicted / measured) 0.19). Contiguous
// fp32 layers with odd widths of the result take up to twice the price; why is not known.
struct Cost {
  double multiply = 0, load = 0, store = 0;
  double total() const {
    const double longest = std::max({multiply, load, store});
    return longest + 0.23 * (multiply + load + store - longest);
  }
};

Cost cost_of(const Problem& problem, const Epilogue& epilogue, const Config& config, const Geometry& g) {
  const double passes = static_cast<double>(g.passes->size());
  const double share = splits_passes(config) ? 1.0 / passes : 1.0;
  const double groups = std::max(1.0, static_cast<double>(g.num_entries) * share / g.entries_per_stage) * g.chunks;
  const double steps = static_cast<double>(g.num_entries) * share * g.chunks * (config.block_k / 8);
  const double stall =
      g.weights_stay ? 0.0 : std::max(0.0, kWeightLatency - (g.weight_stages - 2) * group_cycles(config, g));
  Cost cost;
  // Results handed over as 16 bits: set by hand beside 36 measurements on an H200.
  const double hand_over =
      g.half_sums ? 200.0 + 60.0 * ceil_div(g.columns, g.part) : 280.0 + 238.0 * ceil_div(g.columns, g.part);
  cost.multiply = (g.half_sums ? 2.04 : 2.16) * steps * std::max(g.columns / 2.0, 32.0) + groups * (stall + 73.0) +
                  passes * share * hand_over;
  const double loads = (g.resident ? 1.0 : std::max(1.0, g.live_passes * share)) * g.chunks;
  // A block that walks stages what is new, and the whole window where it begins.
  const auto length = static_cast<double>(g.segment);
  const double staged = g.window == 0 ? loads : (g.source_step[0] + (g.window - g.source_step[0]) / length) * g.chunks;
  const double units = staged * (config.block_k / 4) * g.positions;  // 16 bytes each
  const bool half = size_of(problem.dtype) == 2, last = problem.layout == Layout::channels_last;
  if (g.tensor) {
    cost.load = units * 0.36 + 272.0 * staged;
  } else {
    const bool gathers = !last && !g.vector;  // word by word
    const double unit = last && half ? 2.4 : gathers ? (half ? 5.0 : 3.0) : half ? (g.rows ? 2.0 : 3.4) : 2.45;
    // A group's few channels are pieces of a sector.
    const double pieces = problem.groups > 1 ? 3.4 : 1.0;
    cost.load = units * unit * pieces * (config.stages == 7 ? 0.96 : 1.0) + 223.0 * staged;
  }
  double math = 0;  // of what the convolution applies, as in set_epilogue
  for (const Op& op : epilogue.ops) {
    if (is_norm(op.kind)) break;
    math += math_of(op.kind);
  }
  const double results = 2.0 * g.th * g.tw * g.channels * g.width_phases * passes * share;
  const bool wide = config.warps - config.stages >= 17;  // eight warps store
  const bool narrow = size_of(epilogue.output_dtype.value_or(problem.dtype)) == 2;
  const double result = narrow && last ? (g.half_sums ? 0.11 : 0.16) : g.half_sums ? 0.26 : 0.45;
  if (g.early_epilogue) {  // beside the other warpgroup's products
    cost.multiply += results * math / 180.0;
    math = 0;
  }
  cost.store = results * (result + math / (narrow && last ? 130.0 : 90.0)) * (wide ? 1.0 : 1.12) +
               576.0 * passes * share * ceil_div(g.columns, g.part);
  // Where rows of contiguous results do not begin on sectors of 32 bytes, every piece of a row shares one at either end,
  // and L2 takes longer for a part of a sector than for whole ones.
  if (!last && g.result_size[2] * (narrow ? 2 : 4) % 32 != 0)
    cost.store += (g.tensor ? kPieceCyclesTensor : kPieceCycles) * 2.0 * g.th * g.channels * passes * share;
  return cost;
}

}  // namespace

double item_cycles(const Problem& problem, const Epilogue& epilogue, const Config& config, const Geometry& g) {
  return static_cast<double>(g.segment) * cost_of(problem, epilogue, config, g).total();
}

namespace {

// Whether the copy engine can take the source as it is: no rounding, channels side by side, distances of 16 bytes.
bool takes_source(const Problem& problem, const Config& config, const Geometry& g) {
  const int64_t size = static_cast<int64_t>(size_of(problem.dtype));
  return problem.layout == Layout::channels_last && size == 2 && g.k * problem.groups * size % 16 == 0 &&
         (problem.groups == 1 || g.k * size % (int64_t{4} * config.block_k) == 0);
}

// The sums of g.part columns in shared memory. Their row pitch spreads a warp's stores over the banks.
void lay_out_sums(const Problem& problem, Geometry& g) {
  const int points = g.part * g.width_phases;
  if (g.half_sums) {  // words of two results; lines of 16 bytes start on as many, an odd number of them apart
    const int rows = 64 / g.num_live;
    if (problem.layout == Layout::channels_last) {
      g.stage_pitch = rows / 2 + 4;
      g.sum_words = points * g.stage_pitch;
      return;
    }
    g.stage_pitch = static_cast<int>(g.num_live == 2 ? ceil_div(points / 2 - 8, 32) * 32 + 8 : (points / 8 | 1) * 4);
    g.sum_words = rows * g.stage_pitch;
    return;
  }
  if (problem.layout == Layout::channels_last) {
    g.stage_pitch = static_cast<int>(ceil_div(g.channels, 4) * 4 + 4);
    g.sum_words = points * g.stage_pitch;
    return;
  }
  const bool pairs = g.num_live == 2 && g.width_phases == 2;
  g.stage_pitch = static_cast<int>(pairs ? ceil_div(points - 16, 32) * 32 + 16 : ceil_div(points - 8, 32) * 32 + 8);
  // Rows beyond the channels are stored as well where every row is a channel.
  g.sum_words = (g.num_live == 1 && g.width_phases == 1 ? 64 : pairs ? 32 : g.channels) * g.stage_pitch;
}

// Shared memory of a tile: at least two stages of positions, weights that stay or come far enough ahead, the sums at once or
// in parts. False where it does not fit.
bool lay_out(const Problem& problem, const Device& device, const Config& config, Geometry& g) {
  const int64_t rows = static_cast<int64_t>(g.staged[0].base.size()) * g.staged[0].length *
                       static_cast<int64_t>(g.staged[1].base.size()) * g.staged[1].length;
  const int64_t positions = static_cast<int64_t>(g.staged[2].base.size()) * g.staged[2].length * rows;
  int64_t stage_bytes = 0, fixed = 0;
  if (g.tensor) {
    g.positions = static_cast<int>(rows * static_cast<int64_t>(g.staged[2].base.size()) / g.staged[1].length * g.box);
    stage_bytes = ceil_div(int64_t{g.positions + 8} * config.block_k * 4, 1024) * 1024;
    if (stage_bytes / 16 > 0x3fff) return false;
    fixed = 2048;  // storing lanes read past the sums of the last channel, up to 512 words
  } else {
    const int64_t plane = ceil_div(positions + 7, 8) * 8 + 1;  // = 1 mod 8, and room for a run's overhang
    if (plane * 16 > 262128) return false;
    g.positions = static_cast<int>(positions);
    g.plane = static_cast<int>(plane);
    stage_bytes = int64_t{config.block_k / 4} * plane * 16;
    // Copies under way: about 20 KiB hide the latency of memory; 16-bit channels_last goes straight to the stages.
    g.slots = config.stages == 7 || (problem.layout == Layout::channels_last && size_of(problem.dtype) == 2) ? 1 : 2;
    const int64_t place_bytes = 8 * std::max<int64_t>(positions, rows * ceil_div(ceil_div(g.span + 3, 4), 2));
    fixed = g.slots * int64_t{132} * 32 * config.stages + place_bytes + 16;
    if (g.rows) {
      const int64_t unit = 16 / static_cast<int64_t>(size_of(problem.dtype));
      g.raw_wide = static_cast<int>(ceil_div(g.staged[2].length + unit - 1, unit) | 1);
      const int64_t most = kRawBytes / config.stages / 2,
                    row = unit * g.raw_wide * 16;  // of a box; of a unit of channels
      g.raw_units = config.block_k / 4;
      const int least = static_cast<int>(8 / unit);  // a box is a multiple of 128 bytes
      while (g.raw_units > least && g.raw_units * row > most) g.raw_units /= 2;
      g.raw_rows =
          static_cast<int>(std::clamp<int64_t>((most / (g.raw_units * row) - 1) | 1, 1, (g.staged[1].length - 1) | 1));
      const int64_t box_bytes = g.raw_units * row * g.raw_rows;
      g.raw_slots = static_cast<int>(
          std::clamp<int64_t>(2 * most / box_bytes, g.window > 0 && box_bytes > most * 3 / 2 ? 1 : 2, kMostRawSlots));
      if (g.raw_wide * unit > kMostBox || (g.raw_rows - 1) * g.source_step[1] + 1 > kMostBox) return false;
      fixed = std::max(fixed, config.stages * g.raw_slots * box_bytes + 16);
    }
    fixed += 4 * rows + 128;  // the place of the boxes is aligned
  }
  const int64_t weight_stage = int64_t{g.entries_per_stage} * config.block_k * 256 * g.row_groups;
  int64_t all_weights = 0;  // stages
  for (const Pass& pass : *g.passes)
    all_weights += ceil_div(static_cast<int64_t>(pass.entries.size()), g.entries_per_stage) * g.chunks;
  const bool may_stay = problem.groups == 1 && g.row_blocks <= g.row_groups &&
                        (!splits_passes(config) || g.passes->size() == 1) && all_weights <= kMostStayingStages;
  const int wanted = std::clamp(2 + static_cast<int>(std::ceil(kWeightLatency / group_cycles(config, g))),
                                kLeastWeightStages, kMostWeightStages);
  const int64_t limit = static_cast<int64_t>(device.shared_memory_per_block) - kStaticBytes - fixed;
  // Parts of the sums, stages of weights (0: all stay), in the order of preference, unless the config states the stages.
  std::pair<int, int> choices[3 * (kMostWeightStages + 1)] = {{1, 0},
                                                              {1, wanted},
                                                              {2, 0},
                                                              {2, wanted},
                                                              {1, kLeastWeightStages},
                                                              {2, kLeastWeightStages},
                                                              {4, kLeastWeightStages}};
  std::size_t count = 7;
  if (g.window > 0) {  // whole rows rather than all the weights that hide their latency
    count = 0;
    for (int parts : {1, 2, 4}) {
      choices[count++] = {parts, 0};
      for (int stages = wanted; stages >= kLeastWeightStages; --stages) choices[count++] = {parts, stages};
    }
  }
  for (const auto& [parts, stages] : std::span(choices, count)) {
    if (stages == 0 && (!may_stay || config.weight_stages > 0)) continue;
    g.part = static_cast<int>(ceil_div(ceil_div(g.columns, 8), parts) * 8);
    lay_out_sums(problem, g);
    g.weights_stay = stages == 0;
    g.weight_stages = g.weights_stay             ? static_cast<int>(all_weights)
                      : config.weight_stages > 0 ? config.weight_stages
                                                 : stages;
    const int64_t used = g.weight_stages * weight_stage + int64_t{8} * g.sum_words;
    const int64_t fitting = (limit - used) / stage_bytes, window = int64_t{g.window} * g.chunks;
    if (used > limit || fitting < std::max<int64_t>(2, window)) continue;
    // 1024 bytes hold the barriers of so many stages.
    const int64_t most = (kStaticBytes - 320) / 16 - g.weight_stages;
    if (g.window > 0) {
      if (most < window) continue;
      g.stages = static_cast<int>(std::min<int64_t>({fitting, window + 2 * g.source_step[0] * g.chunks, most}));
      g.shared_bytes = static_cast<std::size_t>(g.stages * stage_bytes + used + fixed - (g.tensor ? 0 : 4 * rows));
      return true;
    }
    g.stages = static_cast<int>(std::min<int64_t>(fitting, kMaxStages));
    // Chunks that stay for all passes are given back together.
    g.resident = (splits_passes(config) ? 1 : g.live_passes) > 1 && fitting > g.chunks;
    g.resident = g.resident && most > g.chunks;
    if (g.resident) g.stages = static_cast<int>(std::min<int64_t>({fitting, std::max(2 * g.chunks, 2), most}));
    g.shared_bytes = static_cast<std::size_t>(g.stages * stage_bytes + used + fixed - (g.tensor ? 0 : 4 * rows));
    return true;
  }
  return false;
}

// A tile of a warpgroup: th rows of tw positions; false where something does not fit.
bool set_tile(const Problem& problem, int th, int tw, int groups_high, Geometry& g) {
  g.th = th, g.tw = tw;
  g.group_rows = groups_high == 2 ? th : 0;
  g.group_columns = groups_high == 1 && g.row_groups == 1 ? tw : 0;
  g.staged[1] = columns_of(th * groups_high, g.source_step[1], g.offset[1]);
  const Columns& columns = g.staged[2];
  g.columns = static_cast<int>(ceil_div((th - 1) * columns.length + tw, 8) * 8);
  const auto [low_w, high_w] = std::minmax_element(columns.base.begin(), columns.base.end());
  g.span_begin = *low_w;
  g.span = *high_w - *low_w + (columns.length - 1) * g.source_step[2] + 1;
  g.vector = problem.layout == Layout::channels_last
                 ? g.k % (16 / static_cast<int>(size_of(problem.dtype))) == 0
                 : g.span <= 2 * static_cast<int>(columns.base.size()) * columns.length &&
                       volume(g.forward ? problem.input : output_size(problem)) % 4 == 0;  // alike in all channels
  if (g.tensor) {
    const int64_t wide = int64_t{columns.length - 1} * g.source_step[2] + 1;
    const int64_t high = int64_t{g.staged[1].length - 1} * g.source_step[1] + 1;
    g.box = static_cast<int>(ceil_div(int64_t{g.staged[1].length} * columns.length, 8) * 8);
    return wide <= kMostBox && high <= kMostBox;
  }
  const int64_t rows = static_cast<int64_t>(g.staged[0].base.size()) * g.staged[0].length *
                       static_cast<int64_t>(g.staged[1].base.size()) * g.staged[1].length;
  if (rows > kMaxStagedRows || columns.length * g.source_step[2] > 32768) return false;
  const auto [low_d, high_d] = reach_of(g, 0);
  const auto [low_h, high_h] = reach_of(g, 1);
  // Relative rows are kept in 16 bits, their elements in 32.
  if (high_d - low_d >= 32768 || high_h - low_h >= 32768) return false;
  const int64_t row_elements =
      g.source_size[2] *
      (problem.layout == Layout::channels_last || g.rows_are_images ? int64_t{g.k} * problem.groups : 1);
  const int64_t farthest =
      std::max(std::abs(low_d), std::abs(high_d)) * g.source_size[1] + std::max(std::abs(low_h), std::abs(high_h));
  return farthest * row_elements < kMostElements;
}

}  // namespace

int64_t num_items(const Problem& problem, const Config& config, const Geometry& g) {
  return ceil_div(g.tiles[0], g.segment) * g.tiles[1] * g.tiles[2] * g.batch * problem.groups *
         ceil_div(g.row_blocks, g.row_groups) * (splits_passes(config) ? static_cast<int64_t>(g.passes->size()) : 1);
}

namespace {

// Who applies the chain up to a norm, and in what form results are handed over.
void set_epilogue(const Problem& problem, const Epilogue& epilogue, const Config& config, Geometry& g) {
  DType stored = epilogue.output_dtype.value_or(problem.dtype);
  double math = 0;
  bool tensors = false;  // operands with a value per element: where those lie is known to the storing warps
  bool channels = false;
  for (const Op& op : epilogue.ops) {
    if (is_norm(op.kind)) {
      stored = problem.dtype;
      break;
    }
    tensors = tensors || operand_kind(op.kind) == OperandKind::tensor;
    channels = channels || operand_kind(op.kind) == OperandKind::channel;
    math += math_of(op.kind);
  }
  const bool half = size_of(stored) == 2 && g.num_live <= 2;
  // The compiler begins the chain for all sums at once; where that is not short it runs out of registers (8 to 24 bytes
  // spill) for groups and, with loading warps, for most runs of two phases, of channels innermost or with operands.
  const bool simple = g.num_live == 1 && problem.layout == Layout::contiguous && !channels && config.block_n <= 120;
  const bool few = config.block_n <= 64 && config.warps <= 20 && (config.split & kSplitRows) != 0;
  const bool spills = half && math > 16 && (problem.groups > 1 || (config.stages > 1 && !simple && !few));
  // Width phases without taps have no sums, but an epilogue.
  g.early_epilogue = g.num_live == g.width_phases && !tensors && !spills && (half || math > 0);
  g.half_sums = g.early_epilogue && half;
}

// What a config makes of a layer, without its tile; or a refusal.
Geometry config_geometry(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
                         const Geometry& layer) {
  Geometry g = layer;
  if (!g.refusal.empty()) return g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  set_epilogue(problem, epilogue, config, g);
  g.chunks = static_cast<int>(ceil_div(g.words, config.block_k));
  if (config.block_k > 8 && config.block_k / 2 >= g.words) return refuse("block_k is over twice the channels");
  if (splits_passes(config) && g.passes->size() == 1) return refuse("one pass cannot be split");
  if ((config.split & kSplitWidth) && problem.layout == Layout::contiguous) {
    // Such passes store parts of sectors, which is cheap only where the other parts find them in L2.
    const auto size = static_cast<int64_t>(size_of(epilogue.output_dtype.value_or(problem.dtype)));
    const int64_t results =
        problem.batch * problem.groups * g.n * volume(g.forward ? output_size(problem) : problem.input);
    if (g.width_phases * size < 32 && results * size > static_cast<int64_t>(device.l2_bytes / 2))
      return refuse("results of over half of the L2 would be stored in parts of sectors");
  }
  if (config.weight_stages > 0 &&
      (config.weight_stages < kLeastWeightStages || config.weight_stages > kMostWeightStages))
    return refuse("weights have " + std::to_string(kLeastWeightStages) + " to " + std::to_string(kMostWeightStages) +
                  " stages");
  if (config.split & kSplitRows) {
    if (g.row_blocks == 1) return refuse("one row block cannot be split");
    g.row_groups = 2;
  }
  if (config.stages == 1) {
    g.tensor = true;
    g.packed = !takes_source(problem, config, g);
    if (g.source_step[1] > kMostElementStride || g.source_step[2] > kMostElementStride)
      return refuse("steps of the source are over " + std::to_string(kMostElementStride));
  }
  g.rows = !g.tensor && problem.layout == Layout::contiguous && g.source_step[1] <= kMostElementStride &&
           g.source_step[2] == 1;  // the engine has no step in the innermost dimension
  // Three warps do not turn many small fp32 boxes as fast as they gather (S1 at 184x16: 2.6 against 1.6 ms).
  if (size_of(problem.dtype) == 4 && config.stages == 3 && config.block_k < 32 && (config.split & kWalk) == 0)
    g.rows = false;
  g.staged[0] = columns_of(1, g.source_step[0], g.offset[0]);
  if (config.split & kWalk) {
    const auto [low, high] = std::minmax_element(g.offset[0].begin(), g.offset[0].end());
    g.window = *high - *low + 1, g.window_low = *low;
    if (splits_passes(config)) return refuse("passes that are items of their own do not walk");
    if (g.lattice[0] < 2 || g.window <= g.source_step[0]) return refuse("neighbours along the depth share no source");
    g.staged[0].base = {*low};
    g.staged[0].length = 1;
  }
  // A block that walks has little room for weights; small stages come back sooner.
  g.entries_per_stage =
      std::clamp(kWeightStageBytes / (g.window > 0 ? 2 : 1) / (config.block_k * 256), 1, g.most_entries);
  return g;
}

// How far blocks walk: long segments stage less, but all blocks should have the same number of them.
void set_segment(const Problem& problem, const Device& device, const Config& config, Geometry& g) {
  const int64_t side_by_side = num_items(problem, config, g) / g.tiles[0];      // of single items: a segment is 1 here
  const double begin = 0.5 * (g.window - g.source_step[0]) / g.source_step[0];  // of an item's time
  double best = std::numeric_limits<double>::max();
  for (int64_t pieces = 1; pieces <= std::min<int64_t>(g.tiles[0], 64); ++pieces) {
    const int64_t segment = ceil_div(g.tiles[0], pieces);
    const int64_t rounds = ceil_div(ceil_div(g.tiles[0], segment) * side_by_side, device.multiprocessors);
    const double time = static_cast<double>(rounds) * (static_cast<double>(segment) + begin);
    if (time >= best) continue;
    best = time;
    g.segment = segment;
  }
}

// visit(geometry, cost) for every tile of these widths that fits shared memory and is not another than the config states.
template <typename Visit>
void each_tile(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
               const Geometry& base, const std::vector<int>& widths, Visit visit) {
  Geometry t;  // one for all: a new one for each tile allocates all of its vectors
  for (int beside = 0; beside < (base.row_groups == 2 ? 1 : 2); ++beside)  // runs above each other, or side by side
    for (int tw : widths) {
      if (tw < 4 || tw > config.block_n) continue;
      if (tw > 8 && tw / 2 >= base.lattice[2]) continue;
      const int all_columns = beside ? 2 * tw : tw;
      if (config.tile_w > 0 && all_columns != config.tile_w) continue;
      const Columns columns = columns_of(all_columns, base.source_step[2], base.shifts);
      const int most = (config.block_n - tw) / columns.length + 1;
      const int groups_high = beside || base.row_groups == 2 ? 1 : 2;
      const int wanted = static_cast<int>(std::min<int64_t>(most, ceil_div(base.lattice[1], groups_high)));
      const int stated = config.tile_h / groups_high;
      for (int th : {stated > 0 ? stated : most, stated > 0 ? stated : wanted}) {
        if (th < 1 || th > std::min(most, 256)) continue;
        if (config.tile_h > 0 && th * groups_high != config.tile_h) continue;
        t = base;
        t.staged[2] = columns;
        if (!set_tile(problem, th, tw, groups_high, t) || !lay_out(problem, device, config, t)) continue;
        t.tiles[0] = std::max<int64_t>(1, t.lattice[0]);
        t.tiles[1] = std::max<int64_t>(1, ceil_div(t.lattice[1], th * groups_high));
        t.tiles[2] = std::max<int64_t>(1, ceil_div(t.lattice[2], all_columns));
        if (t.window > 0) set_segment(problem, device, config, t);
        visit(t, static_cast<double>(ceil_div(num_items(problem, config, t), device.multiprocessors)) *
                     item_cycles(problem, epilogue, config, t));
      }
    }
}

int tile_height(const Geometry& g) { return g.group_rows ? 2 * g.th : g.th; }
int tile_width(const Geometry& g) { return g.group_columns ? 2 * g.tw : g.tw; }

}  // namespace

Geometry geometry(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
                  const Geometry& layer) {
  Geometry g = config_geometry(problem, epilogue, device, config, layer);
  if (!g.refusal.empty()) return g;
  double best = std::numeric_limits<double>::max();
  const Geometry base = g;
  const std::vector<int> widths =
      config.tile_w > 0 ? std::vector<int>{config.tile_w, config.tile_w / 2} : tile_widths(config, base);
  each_tile(problem, epilogue, device, config, base, widths, [&](const Geometry& tile, double cost) {
    if (cost >= best) return;
    best = cost;
    g = tile;
  });
  if (best == std::numeric_limits<double>::max())
    g.refusal = config.tile_w > 0 ? "that tile does not fit" : "no tile fits shared memory";
  return g;
}

std::vector<Config> tiles(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
                          const Geometry& layer) {
  std::vector<Config> found;
  const Geometry base = config_geometry(problem, epilogue, device, config, layer);
  if (!base.refusal.empty()) return found;
  std::vector<int> widths = tile_widths(config, base);
  for (int pieces = 1; pieces <= 16; ++pieces) widths.push_back(static_cast<int>(ceil_div(base.lattice[2], pieces)));
  std::multimap<double, Geometry> by_cost;
  each_tile(problem, epilogue, device, config, base, widths,
            [&](const Geometry& tile, double cost) { by_cost.emplace(cost, tile); });
  const Geometry own = geometry(problem, epilogue, device, config, layer);
  std::set<std::pair<int, int>> seen;
  for (const auto& [cost, g] : by_cost) {
    Config with_tile = config;
    with_tile.tile_h = tile_height(g), with_tile.tile_w = tile_width(g);
    if (!seen.emplace(with_tile.tile_h, with_tile.tile_w).second) continue;
    if (tile_height(g) != tile_height(own) || tile_width(g) != tile_width(own)) found.push_back(with_tile);
    if (g.weights_stay || g.weight_stages <= kFewWeightStages) continue;
    // Fewer weights on their way where that leaves room for more positions.
    with_tile.weight_stages = kFewWeightStages;
    const Geometry few = geometry(problem, epilogue, device, with_tile, layer);
    if (few.refusal.empty() && (few.stages > g.stages || few.resident != g.resident)) found.push_back(with_tile);
  }
  return found;
}

}  // namespace tconv::cuda::ring
