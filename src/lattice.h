// lattice.h — which taps feed which outputs: the table that every kernel is built on.
//
// Per dimension o = s*i + d*t - p. Write o = s*q + r with phase r in [0, s). Tap t feeds phase r when s divides
// r + p - d*t, from input i = q + (r + p - d*t) / s. So each phase is a stride-1 convolution over the input grid.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "tconv/problem.h"

namespace tconv {

struct Tap {
  int tap;    // t
  int shift;  // i = q + shift
  friend bool operator==(const Tap&, const Tap&) = default;
};

struct LatticeDim {
  std::int64_t stride = 1;
  std::vector<std::vector<Tap>> phases;  // [r] -> taps in ascending order; empty: outputs of this phase are bias only
  int min_shift = 0, max_shift = 0;      // over all taps
  int empty_phases = 0;
};

// A tap with the phase that it feeds.
struct PhaseTap {
  std::int64_t tap, phase, shift;
};
// All taps of a table, phase by phase.
std::vector<PhaseTap> phase_taps(const LatticeDim& table);

// `dim` 0 depth, 1 height, 2 width. Independent of sizes: only stride, padding, dilation and kernel enter.
LatticeDim lattice(const Problem& problem, int dim);

}  // namespace tconv
