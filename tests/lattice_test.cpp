// The table of phases against its definition.
// SPDX-License-Identifier: Apache-2.0
#include "lattice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

namespace tconv {
namespace {

Problem width(std::int64_t t, std::int64_t s, std::int64_t p, std::int64_t d) {
  Problem problem;
  problem.rank = 1;
  problem.input[2] = 6;
  problem.kernel[2] = t;
  problem.stride[2] = s;
  problem.padding[2] = p;
  problem.dilation[2] = d;
  return problem;
}

// Every (o, t, i) with o = s*i + d*t - p and no other, for all small parameters.
TEST(Lattice, HoldsExactlyTheTriplesOfTheDefinition) {
  for (std::int64_t t = 1; t <= 7; ++t) {
    for (std::int64_t s = 1; s <= 7; ++s) {
      for (std::int64_t p = 0; p <= 9; ++p) {
        for (std::int64_t d = 1; d <= 5; ++d) {
          const Problem problem = width(t, s, p, d);
          const LatticeDim table = lattice(problem, 2);
          ASSERT_EQ(table.phases.size(), static_cast<std::size_t>(s));
          std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> from_table, from_definition;
          const std::int64_t outputs = 4 * s;  // whole periods, negative inputs included
          for (std::int64_t o = 0; o < outputs; ++o) {
            for (const Tap& tap : table.phases[static_cast<std::size_t>(o % s)]) {
              from_table.insert({o, tap.tap, o / s + tap.shift});
            }
          }
          for (std::int64_t i = -60; i < 60; ++i) {
            for (std::int64_t tap = 0; tap < t; ++tap) {
              const std::int64_t o = s * i + d * tap - p;
              if (o >= 0 && o < outputs) from_definition.insert({o, tap, i});
            }
          }
          ASSERT_EQ(from_table, from_definition) << "t" << t << " s" << s << " p" << p << " d" << d;
        }
      }
    }
  }
}

TEST(Lattice, ReportsShiftsAndEmptyPhases) {
  for (const Problem& problem :
       {width(3, 5, 1, 2), width(2, 2, 0, 1), width(7, 3, 3, 1), width(1, 1, 0, 1), width(3, 4, 0, 2)}) {
    const LatticeDim table = lattice(problem, 2);
    int taps = 0, empty = 0, smallest = 1 << 20, largest = -(1 << 20);
    for (const auto& phase : table.phases) {
      empty += phase.empty();
      taps += static_cast<int>(phase.size());
      EXPECT_TRUE(std::is_sorted(phase.begin(), phase.end(), [](Tap x, Tap y) { return x.tap < y.tap; }));
      for (const Tap& tap : phase) {
        smallest = std::min(smallest, tap.shift);
        largest = std::max(largest, tap.shift);
      }
    }
    EXPECT_EQ(taps, problem.kernel[2]) << "every tap belongs to one phase";
    EXPECT_EQ(table.empty_phases, empty);
    EXPECT_EQ(table.min_shift, smallest);
    EXPECT_EQ(table.max_shift, largest);
  }
}

TEST(Lattice, KernelEqualToStrideGivesOneTapPerPhase) {
  const LatticeDim table = lattice(width(4, 4, 0, 1), 2);
  for (int r = 0; r < 4; ++r) EXPECT_EQ(table.phases[static_cast<std::size_t>(r)], (std::vector<Tap>{{r, 0}}));
}

TEST(Lattice, UnusedDimensionsHaveOnePhaseWithOneTap) {
  for (int dim = 0; dim < 2; ++dim) {
    const LatticeDim table = lattice(width(3, 2, 1, 1), dim);
    EXPECT_EQ(table.phases, (std::vector<std::vector<Tap>>{{{0, 0}}}));
  }
}

}  // namespace
}  // namespace tconv
