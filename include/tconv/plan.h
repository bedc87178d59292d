// plan.h — which kernels run for a problem, why, and at what predicted cost.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tconv/device.h"
#include "tconv/epilogue.h"
#include "tconv/problem.h"

#pragma GCC visibility push(default)
namespace tconv {

struct Kernel;  // src/kernel.h

// A tile choice. Fields that a kernel does not use stay zero. Prints as 64x128x32,s3,w8,k4.
struct Config {
  int block_m = 0;
  int block_n = 0;
  int block_k = 0;
  int stages = 0;
  int warps = 0;
  int split = 0;
  // 0: what the price prefers. Rows and columns of a block's positions; stages of weights on their way.
  int tile_h = 0;
  int tile_w = 0;
  int weight_stages = 0;

  friend bool operator==(const Config&, const Config&) = default;
};
std::string to_string(const Config& config);

// A kernel's answer: a price, or a refusal in words.
struct Fit {
  std::string refusal;
  double microseconds = 0;
  std::size_t workspace_bytes = 0;
  int fused_ops = 0;       // how many of Epilogue::ops, from the first, are applied before the store
  bool fused_pre = false;  // Epilogue::pre is applied while the input is read
  explicit operator bool() const { return refusal.empty(); }
};

// One launch of a plan.
struct Step {
  const Kernel* kernel = nullptr;
  Problem problem;
  Epilogue epilogue;  // the part that this step applies
  Config config;
  Device device;
  double microseconds = 0;
  std::size_t workspace_offset = 0;  // where the step's own workspace starts
  std::size_t workspace_bytes = 0;
  int first_operand = 0;        // this step's first slot in Tensors::operands
  std::shared_ptr<void> state;  // what the kernel prepared: compiled functions
};

struct Candidate {
  std::string kernel;
  Config config;
  Fit fit;
  bool chosen = false;
  bool measured = false;  // a table of measurements names it as the best for this layer on this device
};

struct Plan {
  Problem problem;
  Epilogue epilogue;
  Device device;
  std::vector<Step> steps;  // empty when the result has no elements
  std::vector<Candidate> candidates;
  double microseconds = 0;
  std::size_t workspace_bytes = 0;
  // Intermediate buffers inside the workspace; npos: not needed.
  static constexpr std::size_t npos = static_cast<std::size_t>(-1);
  std::size_t pre_offset = npos;  // the input after Epilogue::pre
  std::size_t raw_offset = npos;  // the convolution's result, when it cannot live in Tensors::output or Tensors::raw
  int pre_step = -1, conv_step = -1, finish_step = -1;
};

// The plan for a valid problem; made once and cached (thread-safe). `only` restricts the convolution to the kernel of
// that name, or `name:config`; throws std::invalid_argument when it refuses. The returned plan is immutable.
std::shared_ptr<const Plan> plan(const Problem& problem, const Epilogue& epilogue, const Device& device,
                                 std::string_view only = {});

struct PlanRequest {
  Problem problem;
  Epilogue epilogue;
  Device device;
  std::string only;
};
// The same for several that are needed soon, those of a backward pass for example: on CUDA all that they have to compile
// is compiled at the same time.
std::vector<std::shared_ptr<const Plan>> plans(std::span<const PlanRequest> requests);
void clear_plan_cache();

// One line per candidate: chosen first, then by price, then the refusals.
std::string explain(const Plan& plan);

// Names of all kernels of a backend, in the order of its list.
std::vector<std::string> kernel_names(Backend backend);

}  // namespace tconv
#pragma GCC visibility pop
