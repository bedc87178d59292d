// row_tile.h — host side of row_tile.cuh: the tile shape whose staging copies least.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernel.h"
#include "tile_geometry.h"

namespace tconv::cuda {

struct RowTile {
  int tile[3] = {0, 0, 0};  // lattice positions, a multiple of 16 of the width; 0: none fits
  Rows rows[2];
  int first = 0, columns = 0, pitch = 0,
      plane = 0;  // first: source column of the tile's first, relative to its position
  std::int64_t tiles[3] = {1, 1, 1}, num_tiles = 0;  // num_tiles: with the batch
  double copies = 0;                                 // that warps issue for a tile, with what else they work out
  std::size_t bytes = 0;

  // Where the index_d-th and index_h-th offsets and a column offset are found from a position's first word.
  int word(std::size_t index_d, std::size_t index_h, int column) const {
    return (rows[0].tap_slot[index_d] * static_cast<int>(rows[1].relative.size()) + rows[1].tap_slot[index_h]) * pitch +
           column - first;
  }
};

// `step` source positions per position of the lattice, which a tile covers block_m of; `offset`: where taps read, relative
// to a position. Planes of `words` words of channels lie `residue` words apart modulo 32 (0: as they come). `width` is that
// of the tile, 0: the best. Prefers two or more blocks a multiprocessor, with other_bytes of shared memory beside the tile.
RowTile row_tile(const Problem& problem, const Device& device, int block_m, const std::int64_t (&lattice)[3],
                 const int (&step)[3], const std::vector<int> (&offset)[3], int words, int residue,
                 std::size_t other_bytes, int width = 0);

// Blocks of `threads` threads that a multiprocessor holds, by registers and shared memory; 1 to 12.
int resident_blocks(const Device& device, int threads, int registers, std::size_t shared_bytes);

// The definitions that row_tile.cuh reads; `channels`: of a group in the source.
std::string row_tile_text(const RowTile& tile, int channels, int words, int warps);

}  // namespace tconv::cuda
