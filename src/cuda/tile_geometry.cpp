// tile_geometry.cpp — see tile_geometry.h.
// SPDX-License-Identifier: Apache-2.0
#include "tile_geometry.h"

#include <algorithm>

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
  struct Plane {
    int residue, low, high;
  };
  std::vector<Plane> planes;  // few allocations: pricing comes here for every tile of every config
  planes.reserve(offset.size());
  auto plane_of = [&](int residue) {
    return std::find_if(planes.begin(), planes.end(), [&](const Plane& plane) { return plane.residue == residue; });
  };
  for (int o : offset) {
    const int q = floor_div(o, multiplier), residue = o - q * multiplier;
    if (const auto plane = plane_of(residue); plane == planes.end())
      planes.push_back({residue, q, q});
    else
      plane->low = std::min(plane->low, q), plane->high = std::max(plane->high, q);
  }
  int halo = 0;
  for (const Plane& plane : planes) halo = std::max(halo, plane.high - plane.low);
  Columns columns;
  columns.tap_word.reserve(offset.size());
  if (int64_t{tile + halo} * static_cast<int64_t>(planes.size()) >
      int64_t{tile} * static_cast<int64_t>(offset.size())) {
    columns.length = tile;
    columns.base = offset;
    for (int t = 0; t < static_cast<int>(offset.size()); ++t) columns.tap_word.push_back(t * tile);
    return columns;
  }
  columns.length = tile + halo;
  columns.base.reserve(planes.size());
  for (const Plane& plane : planes) columns.base.push_back(plane.residue + multiplier * plane.low);
  for (int o : offset) {
    const int q = floor_div(o, multiplier);
    const auto plane = plane_of(o - q * multiplier);
    columns.tap_word.push_back(static_cast<int>(plane - planes.begin()) * columns.length + q - plane->low);
  }
  return columns;
}

std::string list(const std::vector<int>& values) {
  std::string text;
  for (int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
  return text;
}

}  // namespace tconv::cuda
