// epilogue.h — what happens to each result before it is stored: bias, pointwise operations, one normalisation.
//
// Grammar   pre* -> convolution -> bias? -> pointwise* -> norm? -> pointwise*
// String    `pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05,affine) scale(2)`; part of the problem string after
// `|`
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tconv/problem.h"

#pragma GCC visibility push(default)
namespace tconv {

enum class OpKind : std::uint8_t {
#define POINTWISE(name, ...) name,
#define NORM(name, ...) name,
#include "tconv/epilogue.def"
};

enum class OperandKind : std::uint8_t { none, channel, tensor };

// What an operation must see whole before it can produce a value.
enum class Reach : std::uint8_t { element, channels, group_positions };

struct Op {
  OpKind kind = OpKind::relu;
  double a = 0;  // first scalar of a pointwise operation; eps of a normalisation
  double b = 0;
  std::int64_t num_groups = 0;  // group_norm only
  bool affine = false;          // normalisations: weight and bias operands are given

  friend bool operator==(const Op&, const Op&) = default;
};

bool is_norm(OpKind kind);
std::string_view to_string(OpKind kind);
std::optional<OpKind> find_op(std::string_view name);
OperandKind operand_kind(OpKind kind);
int num_scalars(OpKind kind);  // pointwise: 0 to 2
// Operand slots that the operation takes, in the order of Tensors::operands. Pointwise with an operand: 1.
// group_norm, layer_norm: weight, bias if affine. batch_norm: running_mean, running_var, then weight, bias if affine.
int num_operands(const Op& op);
Reach reach(OpKind kind);

struct Epilogue {
  std::vector<Op> pre;  // applied to the input before the convolution; pointwise without operands
  bool bias = false;    // Tensors::bias (out_channels), of the problem's dtype
  std::vector<Op> ops;
  // dtype of channel operands and their gradients; empty: the problem's. Tensor operands have the problem's dtype.
  std::optional<DType> operand_dtype;
  // dtype of the result; empty: the problem's. Differs under autocast, where PyTorch's norms return fp32.
  std::optional<DType> output_dtype;
  // Training: keep the convolution's result (Tensors::raw) and the norm's mean and rstd for grad_epilogue.
  bool save = false;

  bool empty() const { return pre.empty() && !bias && ops.empty(); }
  friend bool operator==(const Epilogue&, const Epilogue&) = default;
};

// Position of the normalisation in ops, or -1.
int norm_index(const Epilogue& epilogue);
// Operand slots of ops[0 .. index).
int operand_offset(const Epilogue& epilogue, int index);
int num_operands(const Epilogue& epilogue);
// Statistics (mean, rstd) that the norm keeps: batch * num_groups, or batch * positions for layer_norm; 0 without.
std::int64_t num_statistics(const Problem& problem, const Epilogue& epilogue);

// Throws std::invalid_argument: two norms, norm or operand in pre, channels not divisible by num_groups, too many
// operands.
void validate(const Epilogue& epilogue, const Problem& problem);

std::string to_string(const Epilogue& epilogue);
Epilogue parse_epilogue(std::string_view text);
std::size_t hash_value(const Epilogue& epilogue);

// The whole line: `2d c64>32 i16x16 t3x3 | bias gelu`. The parser validates both parts.
std::string to_string(const Problem& problem, const Epilogue& epilogue);
std::pair<Problem, Epilogue> parse_problem_and_epilogue(std::string_view text);

}  // namespace tconv
#pragma GCC visibility pop
