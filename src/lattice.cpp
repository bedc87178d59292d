// lattice.cpp — the table of phases and taps.
// SPDX-License-Identifier: Apache-2.0
#include "lattice.h"

#include <algorithm>

namespace tconv {

LatticeDim lattice(const Problem& problem, int dim) {
  LatticeDim table;
  table.stride = problem.stride[dim];
  table.phases.resize(static_cast<std::size_t>(table.stride));
  bool first = true;
  for (std::int64_t t = 0; t < problem.kernel[dim]; ++t) {
    // Tap t lands on o = s * i + offset, so it feeds the phase r = offset mod s from i = q + (r - offset) / s.
    const std::int64_t offset = problem.dilation[dim] * t - problem.padding[dim];
    const std::int64_t r = (offset % table.stride + table.stride) % table.stride;
    const int shift = static_cast<int>((r - offset) / table.stride);
    table.phases[static_cast<std::size_t>(r)].push_back({static_cast<int>(t), shift});
    table.min_shift = first ? shift : std::min(table.min_shift, shift);
    table.max_shift = first ? shift : std::max(table.max_shift, shift);
    first = false;
  }
  for (const auto& taps : table.phases) table.empty_phases += taps.empty();
  return table;
}

std::vector<PhaseTap> phase_taps(const LatticeDim& table) {
  std::vector<PhaseTap> all;
  for (std::size_t r = 0; r < table.phases.size(); ++r)
    for (const Tap& tap : table.phases[r]) all.push_back({tap.tap, static_cast<std::int64_t>(r), tap.shift});
  return all;
}

}  // namespace tconv
