// phase_gemm_sm80 — host side: tile geometry, price, specialisation and launch of phase_gemm_sm80.cu.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <sstream>

#include "driver.h"
#include "lattice.h"
#include "tile_geometry.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

// block_m lattice positions, block_n result channels, block_k words per chunk, stages of the chunk pipeline (1: the
// whole reduction fits one chunk), warps, split 1: every (depth, height) phase its own block; 2: all of them at once in registers.
#define SPLITS(m, n, k, s, w) {m, n, k, s, w, 0}, {m, n, k, s, w, 1}, {m, n, k, s, w, 2}
#define CHUNKS(m, n, w)                                                                          \
  SPLITS(m, n, 8, 1, w), SPLITS(m, n, 16, 1, w), SPLITS(m, n, 32, 1, w), SPLITS(m, n, 64, 1, w), \
      SPLITS(m, n, 8, 3, w), SPLITS(m, n, 16, 2, w), SPLITS(m, n, 16, 3, w), SPLITS(m, n, 32, 2, w)
constexpr Config kConfigs[] = {CHUNKS(512, 64, 8), CHUNKS(256, 64, 4), CHUNKS(256, 64, 8),  CHUNKS(128, 64, 4),
                               CHUNKS(64, 64, 4),  CHUNKS(256, 32, 4), CHUNKS(128, 32, 4),  CHUNKS(64, 32, 4),
                               CHUNKS(256, 16, 4), CHUNKS(128, 16, 4), CHUNKS(64, 16, 4),   CHUNKS(512, 8, 4),
                               CHUNKS(256, 8, 4),  CHUNKS(128, 8, 4),  CHUNKS(128, 128, 8), CHUNKS(256, 128, 8)};
#undef CHUNKS
#undef SPLITS

constexpr int kMaxAccumulators = 128;  // of 255 registers; the rest holds two sets of weight fragments and addresses
constexpr int kMaxWidthPhases = 8;     // width phases computed together; more are cut into groups of 8
constexpr int kMaxTaps = 4096;         // tables in constant memory
constexpr int kMaxOrder = 8192;
constexpr int kMaxUnrolled = 384;    // mma.sync of one entry, some 12 KB of code with what belongs to them
constexpr int kMostAtOnce = 128;     // of them in several steps of 8 words
constexpr int kMaxUnrolledTaps = 8;  // the compiler reads ahead for all of them; 16 spill

// One (depth, height) phase and up to kMaxWidthPhases width phases, with the packed taps of each.
struct Phase {
  int phase[3];  // depth, height, first width phase
  std::vector<std::vector<int>> taps;
};

struct Geometry {
  std::string refusal;
  bool forward = true;
  int k = 0, n = 0;  // channels per group: summed over, of the result
  int per_word = 1, chunks = 1, parts = 1;
  int wm = 0, wn = 0, warps_m = 1, warps_n = 1, n_blocks = 1;
  int tile[3] = {1, 1, 1};
  int source_step[3] = {1, 1, 1}, result_step[3] = {1, 1, 1};
  std::vector<int> offset[3];  // per dimension: where each tap reads
  Rows rows[2];
  Columns columns;
  int positions = 0, pitch = 0;
  int width_phases = 1, slots = 1, num_taps = 1;
  std::vector<int> slot;
  std::vector<Phase> phases;
  std::vector<std::pair<int, int>> width_taps;  // with the slot of each, when one group of width phases covers all
  int64_t phase_shifts = 0, all_shifts = 0;     // shifts of the tile, summed over phases and of all phases together
  int groups = 1;                               // phases whose sums a block holds at once
  // Shifts along a row that are unrolled, each with its word and the slots that it serves; see phase_gemm_sm80.cu.
  bool unrolled = false;
  std::vector<int> shift_word{0}, shift_slots{~0};
  int steps_at_once = 1;  // of 8 words, unrolled too
  // fp32 accuracy: sums of an entry beside those of the slots, where they are of few enough products not to lose digits.
  bool entry_sums = false;
  int out_pitch = 0, out_words = 0, half = 8;
  std::size_t shared_bytes = 0;
  int threads = 0, registers = 0, blocks_per_multiprocessor = 1;
  int64_t lattice[3] = {1, 1, 1};  // positions per dimension
  int64_t tiles[3] = {1, 1, 1};
};

// Channels, phases and taps: what depends on the layer alone.
Geometry layer_geometry(const Problem& problem) {
  Geometry g;
  g.forward = problem.direction == Direction::forward;
  if (!g.forward && problem.direction != Direction::grad_input) {
    g.refusal = "direction " + std::string(to_string(problem.direction)) + " is not a phase product";
    return g;
  }
  if (problem.dtype == DType::f64) {
    g.refusal = "f64 has no mma.sync of this shape";
    return g;
  }
  const int64_t ci = problem.in_channels / problem.groups, co = problem.out_channels / problem.groups;
  if (ci == 0 || co == 0 || problem.groups == 0) {
    g.refusal = "no channels";
    return g;
  }
  if (volume(problem.kernel) > kMaxTaps) {
    g.refusal = "more than " + std::to_string(kMaxTaps) + " taps";
    return g;
  }
  for (int dim = 0; dim < 3; ++dim)
    if (problem.kernel[dim] * problem.dilation[dim] + problem.padding[dim] > (1 << 20) || problem.stride[dim] > 4096) {
      g.refusal = "stride or kernel extent too large for the tables";
      return g;
    }
  g.k = static_cast<int>(g.forward ? ci : co);
  g.n = static_cast<int>(g.forward ? co : ci);
  g.per_word = size_of(problem.dtype) == 2 ? 2 : 1;
  g.parts = problem.dtype == DType::f32 && problem.precision == Precision::fp32 ? 2 : 1;
  g.num_taps = static_cast<int>(volume(problem.kernel));
  const Dims output = output_size(problem);
  std::vector<std::vector<Tap>> phases[3];
  for (int dim = 0; dim < 3; ++dim) {
    const int stride = static_cast<int>(problem.stride[dim]);
    g.offset[dim].resize(problem.kernel[dim]);
    if (g.forward) {
      phases[dim] = lattice(problem, dim).phases;
      for (const auto& taps : phases[dim])
        for (const Tap& tap : taps) g.offset[dim][tap.tap] = tap.shift;
      g.result_step[dim] = stride;
      g.lattice[dim] = ceil_div(output[dim], stride);
    } else {
      std::vector<Tap> all;
      for (int t = 0; t < problem.kernel[dim]; ++t) {
        g.offset[dim][t] = static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]);
        all.push_back({t, g.offset[dim][t]});
      }
      phases[dim] = {all};
      g.source_step[dim] = stride;
      g.lattice[dim] = problem.input[dim];
    }
  }
  if (output[0] * output[1] >= (int64_t{1} << 31) || problem.input[0] * problem.input[1] >= (int64_t{1} << 31)) {
    g.refusal = "2^31 rows or more";  // counted in 32 bits
    return g;
  }
  const int width = static_cast<int>(phases[2].size());
  g.width_phases = std::min(width, kMaxWidthPhases);
  // With one group of width phases, those without taps need no accumulators.
  g.slots = 0;
  for (int rw = 0; rw < g.width_phases; ++rw)
    g.slot.push_back(width > kMaxWidthPhases || !phases[2][rw].empty() ? g.slots++ : -1);
  if (g.slots == 0) g.slots = 1;
  if (width <= kMaxWidthPhases)
    for (int rw = 0; rw < width; ++rw)
      for (const Tap& tap : phases[2][rw]) g.width_taps.push_back({tap.tap, g.slot[rw]});
  if (int64_t{1} * static_cast<int64_t>(phases[0].size()) * static_cast<int64_t>(phases[1].size()) *
          ceil_div(width, g.width_phases) * g.width_phases >
      kMaxTaps) {
    g.refusal = "more than " + std::to_string(kMaxTaps) + " phases";
    return g;
  }
  for (int rd = 0; rd < static_cast<int>(phases[0].size()); ++rd)
    for (int rh = 0; rh < static_cast<int>(phases[1].size()); ++rh)
      for (int rw0 = 0; rw0 < width; rw0 += g.width_phases) {
        Phase pass{{rd, rh, rw0}, {}};
        pass.taps.resize(g.width_phases);
        for (int rw = 0; rw < g.width_phases && rw0 + rw < width; ++rw)
          for (const Tap& td : phases[0][rd])
            for (const Tap& th : phases[1][rh])
              for (const Tap& tw : phases[2][rw0 + rw])
                pass.taps[rw].push_back(
                    static_cast<int>((td.tap * problem.kernel[1] + th.tap) * problem.kernel[2] + tw.tap));
        g.phases.push_back(std::move(pass));
      }
  std::set<std::array<int, 3>> all;
  const int kh = static_cast<int>(problem.kernel[1]), kw = static_cast<int>(problem.kernel[2]);
  for (const Phase& phase : g.phases) {
    std::set<std::array<int, 3>> shifts;
    for (const auto& taps : phase.taps)
      for (int t : taps) shifts.insert({g.offset[0][t / kw / kh], g.offset[1][t / kw % kh], g.offset[2][t % kw]});
    g.phase_shifts += static_cast<int64_t>(shifts.size());
    all.insert(shifts.begin(), shifts.end());
  }
  g.all_shifts = static_cast<int64_t>(all.size());
  return g;
}

// Adds the tile of one config.
Geometry geometry(const Problem& problem, const Device& device, const Config& config, const Geometry& layer) {
  Geometry g = layer;
  if (!g.refusal.empty()) return g;
  auto refuse = [&](std::string why) {
    g.refusal = std::move(why);
    return g;
  };
  if (config.weight_stages > 0) return refuse("its weights have no stages");
  g.threads = config.warps * 32;
  g.wn = std::min(config.block_n, 64);
  g.warps_n = config.block_n / g.wn;
  g.warps_m = config.warps / g.warps_n;
  g.wm = config.block_m / g.warps_m;
  g.groups = config.split == 2 ? static_cast<int>(g.phases.size()) : 1;
  if (config.split == 2 && (g.groups == 1 || g.groups * g.slots > 16)) return refuse("not a few phases at once");
  const int accumulators = g.wm / 16 * (g.wn / 8) * 4 * g.slots * g.groups;
  if (g.wm < 16) return refuse("fewer than 16 positions a warp");
  if (accumulators > kMaxAccumulators) return refuse(std::to_string(accumulators) + " accumulators a thread");
  // A block wider than the channels wastes columns; the next narrower block does the same work with fewer registers.
  if (config.block_n > 8 && config.block_n / 2 >= g.n) return refuse("block_n is over twice the channels");
  const int words = static_cast<int>(ceil_div(g.k, g.per_word));
  g.chunks = static_cast<int>(ceil_div(words, config.block_k));
  if ((config.stages == 1) != (g.chunks == 1))
    return refuse(g.chunks == 1 ? "one chunk needs no pipeline" : "several chunks need a pipeline");
  if (config.block_k > 8 && config.block_k / 2 >= words) return refuse("block_k is over twice the channels");
  if (config.split && g.phases.size() == 1) return refuse("one pass cannot be split");
  g.n_blocks = static_cast<int>(ceil_div(g.n, config.block_n));

  // The tile shape that moves the fewest words: lines of 8 to 256 positions, then rows, then planes.
  // fp32 rows that do not begin on sectors share one at either end of a line (see cost_of in ring_geometry.cpp); a line that
  // holds the whole row is worth more input. Shorter ones were not, and in 16 bits none was.
  const bool shares_sectors = problem.layout == Layout::contiguous && problem.dtype == DType::f32 &&
                              (g.forward ? output_size(problem) : problem.input)[2] * 4 % 32 != 0;
  double best = std::numeric_limits<double>::max();
  for (int tw = 8; tw <= std::min(config.block_m, 256); tw *= 2)
    for (int th = 1; th * tw <= config.block_m; th *= 2) {
      const int td = config.block_m / (tw * th);
      if (tw == 8 && th == 1 && td == 1) continue;
      if (tw == 8 && th == 1) continue;  // a line of 16 spans two rows of the same plane
      if (config.tile_w > 0 && (tw != config.tile_w || th != config.tile_h)) continue;
      const int64_t tiles = ceil_div(g.lattice[0], td) * ceil_div(g.lattice[1], th) * ceil_div(g.lattice[2], tw);
      const int64_t extent_d = int64_t{g.source_step[0]} * (td - 1) + 1,
                    extent_h = int64_t{g.source_step[1]} * (th - 1) + 1;
      if (extent_d > 4096 || extent_h > 4096) continue;
      const Rows rows_d = rows_of(td, g.source_step[0], g.offset[0]),
                 rows_h = rows_of(th, g.source_step[1], g.offset[1]);
      const Columns columns = columns_of(tw, g.source_step[2], g.offset[2]);
      const int64_t positions =
          static_cast<int64_t>(rows_d.relative.size() * rows_h.relative.size() * columns.base.size()) * columns.length;
      const int64_t pitch = ceil_div(positions - 8, 32) * 32 + 8;
      const std::size_t shared = static_cast<std::size_t>(config.stages) * config.block_k * pitch * 4;
      if (shared + 1024 > device.shared_memory_per_block) continue;
      // Partial lines of fewer than 32 words waste store and load slots.
      const double cost = static_cast<double>(tiles) * (2.0 * config.block_m + static_cast<double>(positions)) *
                          (1.0 + 4.0 / tw) * (shares_sectors && tw < g.lattice[2] ? 1.2 : 1.0);
      if (cost < best) {
        best = cost;
        g.tile[0] = td, g.tile[1] = th, g.tile[2] = tw;
        g.rows[0] = rows_d, g.rows[1] = rows_h, g.columns = columns;
        g.positions = static_cast<int>(positions);
        g.pitch = static_cast<int>(std::max<int64_t>(pitch, 8));
      }
    }
  if (best == std::numeric_limits<double>::max())
    return refuse(config.tile_w > 0 ? "that tile does not fit" : "no tile fits shared memory");
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = std::max<int64_t>(1, ceil_div(g.lattice[dim], g.tile[dim]));
  const int row_words = static_cast<int>(g.columns.base.size()) * g.columns.length;
  g.half = g.tile[2] >= 16 ? 8 : g.rows[1].step * row_words;
  if (problem.layout == Layout::channels_last) {
    g.out_pitch = g.wn + 8;
    g.out_words = 16 * g.width_phases * g.out_pitch;
  } else {
    g.out_pitch = static_cast<int>(ceil_div(g.wm * g.width_phases, 16) * 16 + 4);
    g.out_words = 8 * g.out_pitch;
  }
  g.shared_bytes = 4 * (static_cast<std::size_t>(config.stages) * config.block_k * g.pitch +
                        static_cast<std::size_t>(config.warps) * g.out_words);
  if (g.shared_bytes > device.shared_memory_per_block)
    return refuse(std::to_string(g.shared_bytes) + " bytes of shared memory");
  if (int64_t{g.num_taps} * (config.block_k / 8) > kMaxOrder) return refuse("too many taps for the order table");
  const int per_slot = g.wm / 16 * (g.wn / 8) * (g.parts == 2 ? 3 : 1) * g.groups;
  const int products = static_cast<int>(g.width_taps.size()) * per_slot;
  g.unrolled =
      products > 0 && products <= kMaxUnrolled && static_cast<int>(g.width_taps.size()) * g.groups <= kMaxUnrolledTaps;
  if (g.unrolled) {
    std::map<int, int> shifts;  // word -> slots
    for (const auto& [tap, slot] : g.width_taps) shifts[g.columns.tap_word[tap]] |= 1 << slot;
    g.shift_word.clear(), g.shift_slots.clear();
    for (const auto& [word, slots] : shifts) g.shift_word.push_back(word), g.shift_slots.push_back(slots);
  }
  // Reading ahead for too many products spills; operands in two parts fill the registers with one step's.
  const int most = g.parts == 2 ? 1 : g.unrolled ? kMostAtOnce / products : kMostAtOnce / 2 / (per_slot * g.slots);
  g.steps_at_once = std::clamp(most, 1, config.block_k / 8);
  g.entry_sums = g.parts == 2 && g.unrolled && g.groups == 1 && config.block_k == 8;
  // Sums, two sets of weight fragments, the lines of a shift, addresses: counted high, a spill costs more than a block.
  g.registers = accumulators + (4 * (g.wn / 8) + g.wm / 4) * g.parts;
  if (g.entry_sums)
    g.registers +=
        accumulators + 8 * (1 + static_cast<int>(g.shift_word.size())) + 2 * (g.wn - 8) + (g.slots > 3 ? 24 : 0);
  else if (g.parts == 2)
    g.registers += 108 + config.block_k / 4 + (problem.layout == Layout::channels_last ? 16 : 0) +
                   (g.shift_word.size() > 4 ? 16 + 2 * (g.wn - 8) : 0);
  else if (g.unrolled && (g.wn > 16 || (g.wm >= 64 && config.block_k >= 32) || (g.groups > 1 && config.block_k > 32)))
    g.registers += 104;
  else
    g.registers += 80;
  if (g.parts == 1 && g.slots > 4) g.registers += 32;
  if (problem.layout == Layout::channels_last && g.per_word == 2) g.registers += 40;  // pairs of channels by hand
  if (g.registers > 255) return refuse(std::to_string(g.registers) + " registers a thread");
  const int by_registers = std::max(1, 65536 / (g.registers * g.threads));
  const int by_shared =
      std::max<int>(1, static_cast<int>(device.shared_memory_per_multiprocessor / (g.shared_bytes + 1024)));
  g.blocks_per_multiprocessor = std::min({by_registers, by_shared, 2048 / g.threads, 16});
  return g;
}

// The order of the products: per pass the shifts of the tile that any of its phases reads, per shift what it serves.
struct Tables {
  std::vector<int> entry_begin{0}, entry_word, entry_mask, item_begin{0}, phase;
  std::vector<std::vector<int>> item_tap;  // per entry
};

Tables tables_of(const Problem& problem, const Geometry& g) {
  Tables tables;
  const int kh = static_cast<int>(problem.kernel[1]), kw = static_cast<int>(problem.kernel[2]);
  const int row_words = static_cast<int>(g.columns.base.size()) * g.columns.length;
  const int rows_h = static_cast<int>(g.rows[1].relative.size());
  for (std::size_t first = 0; first < g.phases.size(); first += g.groups) {
    // Word of the entry -> word along the row -> slot -> tap; a slot meets a shift at most once.
    std::map<int, std::map<int, std::map<int, int>>> entries;
    for (int group = 0; group < g.groups; ++group) {
      const Phase& phase = g.phases[first + group];
      tables.phase.insert(tables.phase.end(), phase.phase, phase.phase + 3);
      for (int rw = 0; rw < g.width_phases; ++rw)
        for (int t : phase.taps[rw]) {
          const int row = (g.rows[0].tap_slot[t / kw / kh] * rows_h + g.rows[1].tap_slot[t / kw % kh]) * row_words;
          const int along = g.columns.tap_word[t % kw], slot = group * g.slots + g.slot[rw];
          entries[g.unrolled ? row : row + along][g.unrolled ? along : 0][slot] = t;
        }
    }
    int items = tables.item_begin.back();
    for (const auto& [word, shifts] : entries) {
      tables.entry_word.push_back(word);
      int mask = 0;
      std::vector<int> taps;
      for (const auto& [along, slots] : shifts)
        for (const auto& [slot, tap] : slots) {
          mask |= 1 << (g.unrolled ? slot / g.slots : slot);
          taps.push_back(tap);
        }
      tables.entry_mask.push_back(mask);
      items += static_cast<int>(taps.size());
      tables.item_tap.push_back(std::move(taps));
    }
    tables.entry_begin.push_back(static_cast<int>(tables.entry_word.size()));
    tables.item_begin.push_back(items);
  }
  if (tables.entry_word.empty()) {
    tables.entry_word.push_back(0);
    tables.entry_mask.push_back(0);
  }
  return tables;
}

// tap * steps + step for every fragment of a chunk, in the order of use.
std::vector<int> order_of(const Tables& tables, int steps) {
  std::vector<int> order;
  for (const auto& taps : tables.item_tap)
    for (int step = 0; step < steps; ++step)
      for (int tap : taps) order.push_back(tap * steps + step);
  if (order.empty()) order.push_back(0);
  return order;
}

int64_t num_blocks(const Problem& problem, const Config& config, const Geometry& g) {
  return g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch * problem.groups * g.n_blocks *
         (config.split == 1 ? static_cast<int64_t>(g.phases.size()) : 1);
}

std::size_t packed_words(const Problem& problem, const Config& config, const Geometry& g) {
  return static_cast<std::size_t>(problem.groups) * g.n_blocks * g.warps_n * g.num_taps * g.chunks *
         (config.block_k / 8) * g.parts * g.wn * 8;  // + one spare fragment, see spare_words
}

// The kernel reads one fragment past the last before it knows that it was the last.
std::size_t spare_words(const Geometry& g) { return static_cast<std::size_t>(g.parts) * g.wn * 8; }

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config) {
  Fit fit;
  if (device.backend != Backend::cuda || device.compute_capability < 80) {
    fit.refusal = "needs a CUDA device of compute capability 8.0 or later";
    return fit;
  }
  const Geometry& layer = of_last_problem(problem, layer_geometry);
  if (problem.direction == Direction::forward && problem.batch * volume(problem.input) == 0 && layer.refusal.empty()) {
    fit.refusal = "empty input";
    return fit;
  }
  const Geometry g = geometry(problem, device, config, layer);
  if (!g.refusal.empty()) {
    fit.refusal = g.refusal;
    return fit;
  }
  const int64_t blocks = num_blocks(problem, config, g);
  if (blocks >= (int64_t{1} << 31)) {
    fit.refusal = "more than 2^31 blocks";
    return fit;
  }
  // Cycles of one multiprocessor. A mma.sync of 1024 word products takes 1 cycle at the wgmma peak and about 1.7 as
  // mma.sync; fragments come at one shared-memory or L1 access of 128 bytes a cycle.
  const double clock =
      device.tf32_tflops > 0 ? device.tf32_tflops * 1e12 / (2048.0 * 0.82) / device.multiprocessors : 1.5e9;
  const double split = config.split == 1 ? static_cast<double>(g.phases.size()) : 1.0;
  const double passes_in_block = config.split == 0 ? static_cast<double>(g.phases.size()) : 1.0;
  const double phases_in_block = config.split == 1 ? 1.0 : static_cast<double>(g.phases.size());
  const double items = g.num_taps / split;
  const double entries = static_cast<double>(config.split == 2 ? g.all_shifts : g.phase_shifts) / split;
  const int lines = g.wm / 16, columns = g.wn / 8;
  const double products = items * lines * columns * (g.parts == 2 ? 3.0 : 1.0) * 1.7;
  const double accesses = entries * 4.0 * lines + items * 2.0 * columns * g.parts;
  const double issue =
      (entries * lines * 9.0 * g.parts + items * (lines * columns * (g.parts == 2 ? 7.0 : 1.0) + 8.0)) / 4.0;
  const double step = std::max({products, accesses, issue}) + 0.25 * std::min(products, accesses);
  const double multiply = config.warps * g.chunks * (config.block_k / 8) * step;
  const double loads = (g.chunks == 1 ? 1.0 : passes_in_block * g.chunks) * config.block_k * g.positions;
  const double load = loads / 32.0 * (g.per_word == 2 ? 3.0 : problem.layout == Layout::channels_last ? 2.5 : 1.2);
  double math = 0;
  for (const Op& op : epilogue.ops)
    math += is_norm(op.kind) ? 0 : op.kind == OpKind::gelu || op.kind == OpKind::mish ? 30 : 8;
  const double results = static_cast<double>(config.block_m) * g.width_phases * phases_in_block * config.block_n;
  const double store = results / 32.0 * (4.0 + math / 4.0) / (g.n_blocks * config.block_n > g.n ? 1.3 : 1.0);
  const double rounds = std::ceil(static_cast<double>(blocks) / device.multiprocessors);
  const double resident =
      std::min<double>(g.blocks_per_multiprocessor, static_cast<double>(blocks) / device.multiprocessors);
  const double warps = std::max(1.0, resident) * config.warps;
  const double latency = warps >= 12 ? 1.0 : 1.0 + (12.0 - warps) / 12.0;
  // What measurements on an H200 took beyond this model, geometric means over some 60 layers.
  const double beyond = problem.layout == Layout::channels_last && size_of(problem.dtype) == 2 ? 2.2 : 1.3;
  const double compute = beyond * rounds * (multiply + load + store) * latency / clock * 1e6;
  const double traffic = minimum_bytes(problem) / (device.bandwidth_tbs * 1e12 * 0.8) * 1e6;
  const double cache = static_cast<double>(blocks) *
                       (loads * 4.0 + items * g.chunks * config.block_k * config.block_n * 4.0 * g.parts) /
                       (device.bandwidth_tbs * 1e12 * 1.3) * 1e6;
  fit.microseconds = std::max({compute, traffic, cache}) + 0.3 * std::min(compute, traffic) + 20.0;  // two launches
  fit.workspace_bytes = (packed_words(problem, config, g) + spare_words(g)) * 4;
  fit.fused_ops = 0;
  for (const Op& op : epilogue.ops) {
    if (is_norm(op.kind)) break;
    ++fit.fused_ops;
  }
  fit.fused_pre = false;
  return fit;
}

std::vector<Config> tiles(const Problem& problem, const Epilogue& epilogue, const Device& device,
                          const Config& config) {
  const Geometry own = geometry(problem, device, config, layer_geometry(problem));
  std::multimap<double, Config> by_price;
  for (int tw = 8; tw <= config.block_m; tw *= 2)
    for (int th = 1; th * tw <= config.block_m; th *= 2) {
      Config with_tile = config;
      with_tile.tile_h = th, with_tile.tile_w = tw;
      if (own.refusal.empty() && own.tile[1] == th && own.tile[2] == tw) continue;
      if (const Fit priced = fit(problem, epilogue, device, with_tile))
        by_price.emplace(priced.microseconds, with_tile);
    }
  std::vector<Config> found;
  for (const auto& [price, with_tile] : by_price) found.push_back(with_tile);
  return found;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Config& config = step.config;
  const Geometry g = geometry(problem, step.device, config, layer_geometry(problem));
  std::ostringstream shape;
  shape << layer_prelude(step);
  auto define = [&shape](const char* name, auto value) { shape << "#define " << name << ' ' << value << '\n'; };
  define("PG_FORWARD", g.forward ? 1 : 0);
  define("PG_K", g.k);
  define("PG_N", g.n);
  define("PG_NUM_TAPS", g.num_taps);
  define("PG_WN", g.wn);
  define("PG_PARTS", g.parts);
  define("PG_CHUNKS", g.chunks);
  define("PG_STEPS", config.block_k / 8);
  define("PG_COLUMN_WARPS", g.n_blocks * g.warps_n);
  const Tables tables = tables_of(problem, g);
  define("PG_NUM_ITEMS", g.num_taps);
  define("PG_ITEM_BEGIN", list(tables.item_begin));
  const std::string layer = shape.str();
  define("PG_ORDER", list(order_of(tables, config.block_k / 8)));
  const std::string pack = shape.str();
  shape.str("");
  shape << layer;
  define("PG_SPLIT3", g.parts == 2 ? 1 : 0);
  define("PG_TD", g.tile[0]);
  define("PG_TH", g.tile[1]);
  define("PG_TW", g.tile[2]);
  define("PG_WM", g.wm);
  define("PG_WARPS_M", g.warps_m);
  define("PG_WARPS_N", g.warps_n);
  define("PG_NBLOCKS", g.n_blocks);
  define("PG_KC", config.block_k);
  define("PG_STAGES", config.stages);
  define("PG_MIN_BLOCKS", g.blocks_per_multiprocessor);
  define("PG_ASYNC", problem.dtype == DType::f32 ? 1 : 0);
  define("PG_ND", g.rows[0].relative.size());
  define("PG_NH", g.rows[1].relative.size());
  define("PG_NPW", g.columns.base.size());
  define("PG_JW", g.columns.length);
  define("PG_PITCH", g.pitch);
  define("PG_STEP_D", g.rows[0].step);
  define("PG_STEP_H", g.rows[1].step);
  define("PG_SRC_D", g.source_step[0]);
  define("PG_SRC_H", g.source_step[1]);
  define("PG_SRC_W", g.source_step[2]);
  define("PG_OUT_D", g.result_step[0]);
  define("PG_OUT_H", g.result_step[1]);
  define("PG_OUT_W", g.result_step[2]);
  define("PG_HALF", g.half);
  define("PG_PW", g.width_phases);
  define("PG_LIVE", g.slots);
  define("PG_GROUPS", g.groups);
  define("PG_SLOT", list(g.slot));
  define("PG_NUM_PASSES", g.phases.size() / g.groups);
  define("PG_PASS_PER_BLOCK", config.split == 1 ? 1 : 0);
  define("PG_OUT_PITCH", g.out_pitch);
  define("PG_OUT_WORDS", g.out_words);
  define("PG_ROWS_D", list(g.rows[0].relative));
  define("PG_ROWS_H", list(g.rows[1].relative));
  define("PG_PLANES_W", list(g.columns.base));
  define("PG_ENTRY_BEGIN", list(tables.entry_begin));
  const bool empty =
      std::adjacent_find(tables.entry_begin.begin(), tables.entry_begin.end()) != tables.entry_begin.end();
  define("PG_EMPTY_PASSES", empty ? 1 : 0);
  define("PG_ENTRY_WORD", list(tables.entry_word));
  define("PG_ENTRY_MASK", list(tables.entry_mask));
  define("PG_STATIC", g.unrolled ? 1 : 0);
  define("PG_SHIFTS", g.shift_word.size());
  define("PG_SHIFT_WORD", list(g.shift_word));
  define("PG_SHIFT_SLOTS", list(g.shift_slots));
  define("PG_STEPS_AT_ONCE", g.steps_at_once);
  define("PG_ENTRY_SUMS", g.entry_sums ? 1 : 0);
  define("PG_PASS", list(tables.phase));
  return {{"phase_gemm_sm80.cu", "phase_gemm", shape.str(), g.threads, g.shared_bytes},
          {"phase_gemm_pack.cu", "phase_gemm_pack", pack, 256, 0}};
}

// The launch needs only these numbers of the geometry; they are kept beside the functions.
struct Ready : Loaded {
  Geometry geometry;
  Divisor tiles[3] = {};
  int64_t blocks = 0;
  unsigned packed = 0;
};

void prepare_launch(Step& step) {
  auto ready = std::make_shared<Ready>(load_units(step));
  ready->geometry = geometry(step.problem, step.device, step.config, layer_geometry(step.problem));
  for (int dim = 0; dim < 3; ++dim) ready->tiles[dim] = divisor_of(ready->geometry.tiles[dim]);
  ready->blocks = num_blocks(step.problem, step.config, ready->geometry);
  ready->packed = static_cast<unsigned>(packed_words(step.problem, step.config, ready->geometry));
  step.state = std::shared_ptr<Loaded>(ready);
}

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Ready& ready = static_cast<const Ready&>(loaded_of(step));
  const Geometry& g = ready.geometry;
  const Problem& problem = step.problem;
  if (ready.blocks == 0) return;
  {
    const void* weight = tensors.weight;
    void* packed = tensors.workspace;
    unsigned total = ready.packed;
    int weight_last = tensors.weight_channels_last;
    void* args[] = {&weight, &packed, &total, &weight_last};
    launch(*ready.functions[1], {std::min(4096u, (total + 255) / 256)}, stream, args);
  }
  struct {
    const void* source;
    const void* weights;
    const void* bias;
    void* result;
    long long source_plane, result_plane;
    int source_size[3], result_size[3];
    Divisor tiles[3];
    int pair_stores;
    const void* operands[kMaxOperands];
  } args{};
  const Dims output = output_size(problem);
  const Dims& source = g.forward ? problem.input : output;
  const Dims& result = g.forward ? output : problem.input;
  args.source = g.forward ? tensors.input : tensors.grad_output;
  args.weights = tensors.workspace;
  args.bias = tensors.bias;
  args.result = tensors.output;
  args.source_plane = volume(source);
  args.result_plane = volume(result);
  for (int dim = 0; dim < 3; ++dim) {
    args.source_size[dim] = static_cast<int>(source[dim]);
    args.result_size[dim] = static_cast<int>(result[dim]);
    args.tiles[dim] = ready.tiles[dim];
  }
  const bool aligned = reinterpret_cast<std::uintptr_t>(tensors.output) % 4 == 0;
  args.pair_stores =
      aligned && (problem.layout == Layout::channels_last ? g.n % 2 == 0
                                                          : result[2] % 2 == 0 && g.width_phases == g.result_step[2]);
  for (int i = 0; i < kMaxOperands; ++i) args.operands[i] = tensors.operands[i];
  void* pointers[] = {&args};
  launch_behind(*ready.functions[0], {static_cast<unsigned>(ready.blocks)}, stream, pointers);
}

}  // namespace

extern const Kernel phase_gemm_sm80;
const Kernel phase_gemm_sm80{"phase_gemm_sm80", kConfigs, fit, units, prepare_launch, launch_step, tiles};

}  // namespace tconv::cuda
