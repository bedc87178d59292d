// tile_geometry.cpp — see tile_geometry.h.
// SPDX-License-Identifier: Apache-2.0
#include "tile_geometry.h"

#include <algorithm>
#include <limits>

namespace tconv::cuda {

using std::int64_t;

Rows rows_of(int tile, int multiplier, const std::vector<int>& offset) {
  const auto [low, high] = std::minmax_element(offset.begin(), offset.end());
  const int64_t contiguous = int64_t{multiplier} * (tile - 1) + (*high - *low) + 1;
  const int taps = static_cast<int>(offset.size());
  Rows rows;
  if (contiguous <= int64_t{tile} * taps) {
    for (int r = 0; r < contiguous; ++r) rows.relative.push_back(*low + r);
    for (int t = 0; t < taps; ++t) rows.tap_slot.push_back(offset[t] - *low);
    rows.step = multiplier;
  } else {  // widely spaced taps: only the rows they touch
    for (int q = 0; q < tile; ++q)
      for (int t = 0; t < taps; ++t) rows.relative.push_back(multiplier * q + offset[t]);
    for (int t = 0; t < taps; ++t) rows.tap_slot.push_back(t);
    rows.step = taps;
  }
  return rows;
}

Columns columns_of(int tile, int multiplier, const std::vector<int>& offset) {
  Columns by_residue, by_tap;
  const int taps = static_cast<int>(offset.size());
  auto floor_div = [](int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
  std::vector<int> residues;
  for (int o : offset) {
    const int residue = o - floor_div(o, multiplier) * multiplier;
    if (std::find(residues.begin(), residues.end(), residue) == residues.end()) residues.push_back(residue);
  }
  std::vector<int> low(residues.size(), std::numeric_limits<int>::max()), high(residues.size(), 0);
  auto plane_of = [&](int o) {
    const int residue = o - floor_div(o, multiplier) * multiplier;
    return static_cast<int>(std::find(residues.begin(), residues.end(), residue) - residues.begin());
  };
  for (int pass = 0; pass < 2; ++pass)
    for (int o : offset) {
      const int plane = plane_of(o), q = floor_div(o, multiplier);
      if (pass == 0)
        low[plane] = std::min(low[plane], q);
      else
        high[plane] = std::max(high[plane], q - low[plane]);
    }
  by_residue.length = tile + *std::max_element(high.begin(), high.end());
  for (std::size_t plane = 0; plane < residues.size(); ++plane)
    by_residue.base.push_back(residues[plane] + multiplier * low[plane]);
  for (int o : offset) {
    const int plane = plane_of(o);
    by_residue.tap_word.push_back(plane * by_residue.length + floor_div(o, multiplier) - low[plane]);
  }
  if (static_cast<int64_t>(by_residue.length) * static_cast<int64_t>(residues.size()) <= int64_t{tile} * taps)
    return by_residue;
  by_tap.length = tile;
  for (int t = 0; t < taps; ++t) {
    by_tap.base.push_back(offset[t]);
    by_tap.tap_word.push_back(t * tile);
  }
  return by_tap;
}

std::string list(const std::vector<int>& values) {
  std::string text;
  for (int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

}  // namespace tconv::cuda
