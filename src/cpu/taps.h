// taps.h — the taps of one dimension in the words of phase_gemm.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "lattice.h"

namespace tconv::cpu {

// A tap of one dimension: which phases and which shift (phase_gemm.h).
struct DimTap {
  int tap, result_phase, source_phase, shift;
};

inline std::vector<DimTap> dim_taps(const Problem& problem, int dim) {
  std::vector<DimTap> taps;
  const std::int64_t s = problem.stride[dim];
  if (problem.direction == Direction::forward) {
    const LatticeDim table = lattice(problem, dim);
    for (int r = 0; r < static_cast<int>(s); ++r)
      for (const Tap& tap : table.phases[static_cast<std::size_t>(r)]) taps.push_back({tap.tap, r, 0, tap.shift});
    return taps;
  }
  for (int t = 0; t < static_cast<int>(problem.kernel[dim]); ++t) {
    const std::int64_t offset = problem.dilation[dim] * t - problem.padding[dim];
    const std::int64_t r = (offset % s + s) % s;
    taps.push_back({t, 0, static_cast<int>(r), static_cast<int>((offset - r) / s)});
  }
  return taps;
}

}  // namespace tconv::cpu
