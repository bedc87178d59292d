// check.h — every kernel and config that fits a problem, against the reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel.h"

namespace tconv::bench {

struct CheckOptions {
  std::string only;         // a kernel's name, or name:config; empty: all
  bool chosen = false;      // only what the planner chooses
  std::uint64_t seed = 0;   // of the data
  bool non_finite = false;  // put a few infinities and NaNs into input, weight and grad_output
  double max_products = 0;  // reduce larger problems to about this many multiply-adds; 0: never
};

struct CheckResult {
  std::string kernel;   // name:config
  double worst = 0;     // largest error as a fraction of its tolerance; above 1 is a failure
  std::string failure;  // empty: passed. Coordinates, both values, and what to paste to see it again
};

// The same problem with a smaller batch and smaller input sizes; kernels are specialised on neither.
Problem reduced(const Problem& problem, double max_products);

// One result per candidate that fits. Fresh tensors for every one; results poisoned with NaN, with guard zones on both
// sides; every candidate runs twice (on the CPU with one thread and with all) and must give the same bits.
std::vector<CheckResult> check(const Problem& problem, const Epilogue& epilogue, const Device& device,
                               const CheckOptions& options = {});

}  // namespace tconv::bench
