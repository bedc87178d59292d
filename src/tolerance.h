// tolerance.h — how far a correct kernel may be from the reference; the only place where that is decided.
//
// Data  every tensor is uniform in [-1, 1], rounded to its dtype; the reference sums in double.
// Sums  a sum of n products is about sqrt(n) / 3 in size, and so are its partial sums. Rounding each of them to nearest
//       with unit roundoff u gives errors that add up to about u * n / 4 when they are independent. Tensor cores
//       truncate, which doubles it. 4 * u * n leaves room for the largest of many million results, and is still far
//       below 1/9, the mean square of one product that a wrong kernel would lose.
// TF32  operands are rounded to 11 bits: n products, each off by at most 2 * 2^-11 and by 0.27 * 2^-11 in the mean
//       square, add up to at most 2 * 2^-11 * sqrt(n) (seven standard deviations; exact bound for n = 1).
// Store the rounding of the result to its dtype may go the other way than the reference's: 2 u relative.
// Chain each operation multiplies what came before by its Lipschitz constant, a normalisation by rstd; an operation
// that
//       is not fused stores its input, which adds a rounding of values of size up to 2 * sqrt(n) + 2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "lattice.h"
#include "tconv/epilogue.h"

namespace tconv {

// |got - expected| <= absolute + relative * |expected|
struct Tolerance {
  double absolute = 0;
  double relative = 0;
};

// Half a unit in the last place of 1.
inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return std::ldexp(1, -53);
    case DType::f32:
      return std::ldexp(1, -24);
    case DType::f16:
      return std::ldexp(1, -11);
    case DType::bf16:
      return std::ldexp(1, -8);
  }
  return 0;
}

inline double accumulation_roundoff(DType dtype) {
  return dtype == DType::f64 ? std::ldexp(1, -53) : std::ldexp(1, -24);
}

// The most products that one result of the direction adds up.
inline double num_terms(const Problem& problem) {
  switch (problem.direction) {
    case Direction::forward: {
      double terms = double(problem.in_channels / problem.groups);
      for (int dim = 0; dim < 3; ++dim) {
        std::size_t most = 0;
        for (const auto& taps : lattice(problem, dim).phases) most = std::max(most, taps.size());
        terms *= double(most);
      }
      return terms;
    }
    case Direction::grad_input:
      return double(problem.out_channels / problem.groups) * double(volume(problem.kernel));
    case Direction::grad_weight:
      return double(problem.batch) * double(volume(problem.input));
    default:
      return 1;
  }
}

// A plain sum of n values of size up to `size`, stored in `stored`.
inline Tolerance sum_tolerance(DType computed, DType stored, double terms, double size) {
  const double u = accumulation_roundoff(computed);
  return {4 * u * (terms + 4) * size, 2 * unit_roundoff(stored) + 8 * u};
}

// How much a chain of operations can amplify an error of its input; rstd is the largest reciprocal deviation seen.
inline double chain_gain(const std::vector<Op>& ops, double rstd) {
  double gain = 1;
  for (const Op& op : ops) {
    if (is_norm(op.kind)) {
      gain *= 2 * std::max(rstd, 1e-3);  // (x - mean) * rstd: both x and the mean are off
    } else if (op.kind == OpKind::scale) {
      gain *= std::max(std::abs(op.a), 1e-3);
    } else if (num_scalars(op.kind) == 1 && op.kind != OpKind::add) {
      gain *= std::max(std::abs(op.a), 1.0);  // slopes: leaky_relu, elu
    } else {
      gain *= 1.5;  // hardswish; all others are below
    }
  }
  return gain;
}

// Of the main result. `rstd`: the largest reciprocal deviation that the reference found, 1 without a normalisation.
inline Tolerance tolerance(const Problem& problem, const Epilogue& epilogue = {}, double rstd = 1) {
  const double terms = num_terms(problem) * std::max(1.0, chain_gain(epilogue.pre, 1));
  const DType stored =
      problem.direction == Direction::grad_epilogue ? problem.dtype : epilogue.output_dtype.value_or(problem.dtype);
  Tolerance result = sum_tolerance(problem.dtype, stored, terms, 1);
  if (problem.precision == Precision::tf32 && problem.dtype == DType::f32 && problem.direction != Direction::epilogue &&
      problem.direction != Direction::grad_epilogue) {
    result.absolute += 2 * std::ldexp(1, -11) * std::sqrt(terms);
  }
  if (!epilogue.pre.empty()) result.absolute += 2 * unit_roundoff(problem.dtype) * std::sqrt(terms);
  if (!epilogue.ops.empty()) {
    const double size = 2 * std::sqrt(terms) + 2;
    const double roundings = double(epilogue.ops.size()) + 1;
    // Elementary functions are good to a few units in the last place of single precision; 32 covers their derivatives.
    const double u = 2 * unit_roundoff(problem.dtype) + 32 * accumulation_roundoff(problem.dtype);
    result.absolute = (result.absolute + roundings * u * size) * std::max(1.0, chain_gain(epilogue.ops, rstd));
  }
  return result;
}

}  // namespace tconv
