// ring_geometry.h — what ring_gemm_sm90 does with a layer: phases, tiles, shared memory, and the cycles that these take.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"
#include "tile_geometry.h"

namespace tconv::cuda::ring {

using std::int64_t;

// Bits of Config::split.
constexpr int kSplitPasses = 1, kSplitRows = 2, kWalk = 4, kSplitWidth = 8;

struct Entry {
  int tap_d, tap_h;
  int shift_w;             // index into Geometry::shifts
  std::vector<int> tap_w;  // per live width phase: the tap, or -1
};

struct Pass {
  int phase[3];
  std::vector<Entry> entries;
};

struct Geometry {
  std::string refusal;
  bool forward = true;
  bool rows_are_images = false;  // rank 1: images lie along the height, so that a tile spans several
  int fold = 1;
  int k = 0, n = 0, words = 0, chunks = 1;
  int source_step[3] = {1, 1, 1}, result_step[3] = {1, 1, 1};
  int64_t source_size[3] = {1, 1, 1}, result_size[3] = {1, 1, 1}, batch = 1;
  std::vector<int> offset[2];  // per depth and height tap
  std::vector<int> shifts;     // distinct ones of the width, ascending
  int64_t lattice[3] = {1, 1, 1}, tiles[3] = {1, 1, 1};
  std::shared_ptr<const std::vector<Pass>> passes;  // of the layer; pricing copies a geometry for every tile
  int num_entries = 0, most_entries = 0, live_passes = 0, num_taps = 1;
  int width_phases = 1, num_live = 1, channels = 64, row_blocks = 1;
  std::vector<int> live;
  int th = 1, tw = 1, group_rows = 0, group_columns = 0,
      columns = 8;  // of a warpgroup; columns: positions of a product
  Columns staged[3];
  int positions = 0, plane = 0, span_begin = 0, span = 0;
  bool vector = false, resident = false;
  int row_groups = 1;  // row blocks side by side in the warpgroups
  // Blocks walk along the depth: a stage is a depth row of the source, of which an item sees `window`, from `window_low`
  // on; the next item needs source_step[0] further ones. 0: a stage holds all that an item sees.
  int window = 0, window_low = 0;
  int64_t segment = 1;                  // items that a block walks before it begins elsewhere
  bool tensor = false, packed = false;  // the copy engine stages tiles; from a packed copy of the source
  int box = 0;                          // positions of a box, rounded up to 8
  bool rows = false;                    // the copy engine brings rows of channels, which the loading warps turn
  int raw_wide = 0, raw_rows = 0, raw_units = 0, raw_slots = 0;  // of a box: 16-byte columns, rows, channels; places
  int slots = 0, stages = 0, entries_per_stage = 1, stage_pitch = 0, sum_words = 0;
  bool early_epilogue = false;      // the multiplying warps apply it
  bool half_sums = false;           // and hand results over as they are stored, in 16 bits
  int weight_stages = 0, part = 8;  // part: columns of the sums that are handed over at once
  bool weights_stay = false;
  std::size_t shared_bytes = 0;
};

// Phases, taps and rows of a layer as a config sees it, whose neighbouring results are folded into the rows; or a refusal.
Geometry layer_geometry(const Problem& problem, const Config& config);
// What of a config a layer's geometry depends on.
int layer_key(const Config& config);
// The tile of a config with the lowest cost, and how it lies in shared memory; or a refusal.
Geometry geometry(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
                  const Geometry& layer);
// See Kernel::tiles.
std::vector<Config> tiles(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config& config,
                          const Geometry& layer);
bool splits_passes(const Config& config);
// The layer as a config sees it: one that walks takes the height of a 2d layer for a depth.
Problem seen_by(const Config& config, const Problem& problem);
int64_t num_items(const Problem& problem, const Config& config, const Geometry& g);
// The staged rows of a dimension, relative to the tile's first position: the lowest and the highest.
std::pair<int, int> reach_of(const Geometry& g, int dim);
// Cycles of a multiprocessor for an item.
double item_cycles(const Problem& problem, const Epilogue& epilogue, const Config& config, const Geometry& g);

}  // namespace tconv::cuda::ring
