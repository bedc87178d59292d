// simplify.cpp — the rewrites, each with its proof.
//
// A dimension is *pointwise* when kernel 1, stride 1, padding 0 and output_padding 0 make o = i its only equation. In a
// pointwise dimension the convolution does nothing but repeat over the positions.
// SPDX-License-Identifier: Apache-2.0
#include "simplify.h"

namespace tconv {
namespace {

bool is_pointwise(const Problem& problem, int dim) {
  return problem.kernel[dim] == 1 && problem.stride[dim] == 1 && problem.padding[dim] == 0 &&
         problem.output_padding[dim] == 0;
}

void make_pointwise(Problem& problem, int dim, std::int64_t size) {
  problem.input[dim] = size;
  problem.kernel[dim] = problem.stride[dim] = problem.dilation[dim] = 1;
  problem.padding[dim] = problem.output_padding[dim] = 0;
}

void move_dim(Problem& problem, int from, int to) {
  for (Dims* dims : {&problem.input, &problem.kernel, &problem.stride, &problem.padding, &problem.output_padding,
                     &problem.dilation}) {
    (*dims)[to] = (*dims)[from];
  }
  make_pointwise(problem, from, 1);
}

// Parameters that cannot matter.
void drop_unused_parameters(Problem& problem) {
  for (int dim = 0; dim < 3; ++dim) {
    // o = s*i + d*t - p with only t = 0: d never multiplies anything, and the output size has d * (1 - 1).
    if (problem.kernel[dim] == 1) problem.dilation[dim] = 1;
    // ... with only i = 0: s never multiplies anything, and the output size has (1 - 1) * s.
    if (problem.input[dim] == 1) problem.stride[dim] = 1;
  }
  // Only fp32 operands are ever rounded to TF32, and only where they are multiplied.
  const bool multiplies = problem.direction != Direction::epilogue && problem.direction != Direction::grad_epilogue;
  if (problem.dtype != DType::f32 || !multiplies) problem.precision = Precision::fp32;
}

// An epilogue sees outputs only: b, channel, position. Any problem with that many of each will do.
void forget_convolution(Problem& problem) {
  const Dims output = output_size(problem);
  problem.in_channels = problem.out_channels;
  problem.groups = 1;
  for (int dim = 0; dim < 3; ++dim) make_pointwise(problem, dim, output[dim]);
}

// Two adjacent pointwise dimensions of sizes m and n are one of size m*n: positions x*n + y are consecutive in memory
// in both layouts, on the input and on the output, and each is mapped to itself. A pointwise dimension of size 1 adds
// nothing to the address and may be left out next to any dimension. The remaining ones move to the right.
void merge_pointwise_dims(Problem& problem) {
  for (int dim = 1; dim >= 0; --dim) {
    if (is_pointwise(problem, dim) && is_pointwise(problem, dim + 1)) {
      make_pointwise(problem, dim + 1, problem.input[dim] * problem.input[dim + 1]);
      make_pointwise(problem, dim, 1);
    }
  }
  int to = 2;
  for (int dim = 2; dim >= 0; --dim) {
    if (is_pointwise(problem, dim) && problem.input[dim] == 1) continue;
    if (dim != to) move_dim(problem, dim, to);
    --to;
  }
  // Removing a dimension of size 1 may have brought two pointwise ones together.
  for (int dim = 1; dim >= 0; --dim) {
    if (is_pointwise(problem, dim) && is_pointwise(problem, dim + 1) && problem.input[dim] != 1) {
      make_pointwise(problem, dim + 1, problem.input[dim] * problem.input[dim + 1]);
      make_pointwise(problem, dim, 1);
      if (dim == 1) move_dim(problem, 0, 1);
    }
  }
}

// In channels_last memory (b, d, h, w, c) a leading pointwise dimension continues the batch: b*size + position. Not
// with group_norm, whose statistics are of one sample.
void merge_into_batch(Problem& problem, const Epilogue& epilogue) {
  if (problem.layout != Layout::channels_last) return;
  const int norm = norm_index(epilogue);
  if (norm >= 0 && epilogue.ops[static_cast<std::size_t>(norm)].kind == OpKind::group_norm) return;
  for (int dim = 0; dim < 2; ++dim) {  // the width stays: a kernel wants positions to work along
    if (is_pointwise(problem, dim)) {
      problem.batch *= problem.input[dim];
      make_pointwise(problem, dim, 1);
    } else {
      return;
    }
  }
}

// With one channel on both sides, or one position on both sides, the two layouts are the same memory.
void prefer_contiguous(Problem& problem) {
  const bool one_channel = problem.in_channels == 1 && problem.out_channels == 1;
  const bool one_position = volume(problem.input) == 1 && volume(output_size(problem)) == 1;
  if (one_channel || one_position) problem.layout = Layout::contiguous;
}

}  // namespace

Problem simplify(const Problem& problem, const Epilogue& epilogue) {
  Problem simpler = problem;
  if (problem.direction == Direction::epilogue || problem.direction == Direction::grad_epilogue) {
    forget_convolution(simpler);
  }
  drop_unused_parameters(simpler);
  merge_pointwise_dims(simpler);
  merge_into_batch(simpler, epilogue);
  prefer_contiguous(simpler);
  simpler.rank = 1;
  for (int dim = 1; dim >= 0; --dim) {
    if (!is_pointwise(simpler, dim) || simpler.input[dim] != 1) simpler.rank = 3 - dim;
  }
  return simpler;
}

}  // namespace tconv
