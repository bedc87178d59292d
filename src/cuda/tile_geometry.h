// tile_geometry.h — which source rows and columns a tile of lattice positions touches, for kernels that stage them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tconv::cuda {

// Source rows of a tile in one dimension: slot(position, tap) = position * step + tap_slot[tap].
struct Rows {
  std::vector<int> relative;  // source coordinate of each slot, relative to the first position's
  std::vector<int> tap_slot;
  int step = 1;
};

// A staged row: planes of `length` words, one per residue of the source coordinate (or per tap, if that is shorter).
// Position q of the tile finds tap t in word tap_word[t] + q.
struct Columns {
  std::vector<int> base;  // source coordinate of a plane's first word
  std::vector<int> tap_word;
  int length = 0;
};

// multiplier: source positions per lattice position; offset[t]: where tap t reads, relative to the position.
Rows rows_of(int tile, int multiplier, const std::vector<int>& offset);
Columns columns_of(int tile, int multiplier, const std::vector<int>& offset);

// "1,2,3": the initialiser of a table in a prelude.
std::string list(const std::vector<int>& values);

constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace tconv::cuda
