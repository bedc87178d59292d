// row_tile.cpp — see row_tile.h.
// SPDX-License-Identifier: Apache-2.0
#include "row_tile.h"

#include <algorithm>
#include <limits>

namespace tconv::cuda {
namespace {

using std::int64_t;

// Copies that a warp issues for a staged row, as in load_tile, with what else it works out for the row, as so many more.
double copies_of(const Problem& problem, int64_t words, int64_t rows, int64_t columns) {
  int64_t lanes = 1;
  if (problem.layout == Layout::channels_last) {
    while (lanes < std::min<int64_t>(words, 32)) lanes *= 2;
  }
  const int64_t lane_columns = 32 / lanes, over = columns % lane_columns, turns = ceil_div(words, lanes);
  const int64_t tail = over * 4 <= lane_columns && rows * words * over <= 4 * 128 ? over : 0;
  return static_cast<double>(ceil_div(columns - tail, lane_columns) * turns) +
         static_cast<double>(tail * words) / 10.0 + 4.0 + 1.5 * static_cast<double>(turns);
}

}  // namespace

RowTile row_tile(const Problem& problem, const Device& device, int block_m, const int64_t (&lattice)[3],
                 const int (&step)[3], const std::vector<int> (&offset)[3], int words, int residue,
                 std::size_t other_bytes, int width) {
  RowTile g;
  const auto [least, most] = std::minmax_element(offset[2].begin(), offset[2].end());
  const int extent = *most - *least;
  double best = std::numeric_limits<double>::max();
  for (int tw = 16; tw <= block_m; tw *= 2) {
    if (width > 0 && tw != width) continue;
    for (int th = 1; th * tw <= block_m; th *= 2) {
      const int td = block_m / (tw * th);
      if (int64_t{step[0]} * td > 4096 || int64_t{step[1]} * th > 4096) continue;
      const Rows rows_d = rows_of(td, step[0], offset[0]), rows_h = rows_of(th, step[1], offset[1]);
      const int64_t columns = int64_t{step[2]} * (tw - 1) + extent + 1;
      const auto rows = static_cast<int64_t>(rows_d.relative.size() * rows_h.relative.size());
      int64_t plane = rows * columns;
      while (residue > 0 && plane % 32 != residue) ++plane;
      const std::size_t bytes = static_cast<std::size_t>(plane * words) * 4, shared = other_bytes + bytes;
      if (shared > device.shared_memory_per_block) continue;
      const int64_t tiles = ceil_div(lattice[0], td) * ceil_div(lattice[1], th) * ceil_div(lattice[2], tw);
      const auto resident = static_cast<int64_t>(device.shared_memory_per_multiprocessor / (shared + 1024));
      const double copies = static_cast<double>(rows) * copies_of(problem, words, rows, columns);
      const double cost = static_cast<double>(tiles) * (32.0 * copies + 2.0 * block_m) *
                          (resident >= 3   ? 1.0
                           : resident == 2 ? 1.15
                                           : 1.6);
      if (cost >= best) continue;
      best = cost;
      g.tile[0] = td, g.tile[1] = th, g.tile[2] = tw;
      g.rows[0] = rows_d, g.rows[1] = rows_h;
      g.columns = g.pitch = static_cast<int>(columns);
      g.plane = static_cast<int>(plane);
      g.bytes = bytes;
      g.copies = copies;
    }
  }
  if (g.tile[2] == 0) return g;
  g.first = *least;
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = std::max<int64_t>(1, ceil_div(lattice[dim], g.tile[dim]));
  g.num_tiles = g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch;
  return g;
}

int resident_blocks(const Device& device, int threads, int registers, std::size_t shared_bytes) {
  const auto by_shared = static_cast<int64_t>(device.shared_memory_per_multiprocessor / (shared_bytes + 1024));
  return static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(65536 / (registers * threads), by_shared), 1, 12));
}

std::string row_tile_text(const RowTile& tile, int channels, int words, int warps) {
  std::string text;
  const auto define = [&text](const char* name, const std::string& value) {
    text += std::string("#define ") + name + " " + value + "\n";
  };
  define("RT_CHANNELS", std::to_string(channels));
  define("RT_WORDS", std::to_string(words));
  define("RT_WARPS", std::to_string(warps));
  define("RT_TD", std::to_string(tile.tile[0]));
  define("RT_TH", std::to_string(tile.tile[1]));
  define("RT_TW", std::to_string(tile.tile[2]));
  define("RT_STEP_D", std::to_string(tile.rows[0].step));
  define("RT_STEP_H", std::to_string(tile.rows[1].step));
  define("RT_FIRST", "(" + std::to_string(tile.first) + ")");
  define("RT_ND", std::to_string(tile.rows[0].relative.size()));
  define("RT_NH", std::to_string(tile.rows[1].relative.size()));
  define("RT_ROWS_D", list(tile.rows[0].relative));
  define("RT_ROWS_H", list(tile.rows[1].relative));
  define("RT_COLUMNS", std::to_string(tile.columns));
  define("RT_PITCH", std::to_string(tile.pitch));
  define("RT_PLANE", std::to_string(tile.plane));
  return text;
}

}  // namespace tconv::cuda
