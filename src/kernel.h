// kernel.h — the interface that every kernel fills, and the lists of kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tconv/tconv.h"

namespace tconv {

// One device source to compile at run time (CUDA kernels only).
struct Unit {
  std::string source;            // name of the embedded .cu file: "phase_gemm_sm80.cu"
  std::string entry;             // extern "C" __global__ function
  std::string prelude;           // #define lines and generated functions put in front; the specialisation
  int threads = 0;               // block size, for the launch-bounds report
  std::size_t shared_bytes = 0;  // dynamic shared memory
  int shared_percent = 100;      // of what can be shared memory; the rest is L1, for kernels that read through it
  // Only some tensors need it, those that start off a 16-byte boundary for example: loaded by the first launch that does.
  bool on_demand = false;
};

struct Kernel {
  std::string_view name;  // = file stem [+ target] = line in kernels.def = test id
  std::span<const Config> configs;
  // Pure: a price or a reason, for one config. Called for every direction and any valid problem.
  Fit (*fit)(const Problem&, const Epilogue&, const Device&, const Config&);
  // What has to be compiled for this step, units on demand last; depends on the layer and on whether its rows are
  // multiples of 16 bytes, never else on batch or spatial sizes. Null on the CPU.
  std::vector<Unit> (*units)(const Step&);
  // Compiles or prepares what launch needs and leaves it in Step::state; once per plan. May be null.
  void (*prepare)(Step&);
  // Takes no decision. `tensors.workspace` is the step's own; operands start at the step's first.
  void (*launch)(const Step&, const Tensors&, Stream);
  // The config with each tile that it can have for this problem beside the one that it has by its price, the lowest price
  // first: for `tconv tune`, because the price cannot tell them well apart. Null where a config has one tile.
  std::vector<Config> (*tiles)(const Problem&, const Epilogue&, const Device&, const Config&) = nullptr;
};

std::span<const Kernel* const> kernels(Backend backend);

namespace cuda {
// Loads the units of all these steps (the CPU's have none) at the same time, so that prepare finds them. Programs that have
// to be compiled begin in order of their length: NVRTC parses one at a time, and behind a dozen short ones, as for the
// gradients of S4, the two that take longest would begin late.
void load_all(std::span<Step* const> steps);
}  // namespace cuda

}  // namespace tconv
