// operands.h — what a fused chain reads: the bias, the operations and their operands as arithmetic values.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <vector>

#include "cpu/element.h"
#include "cpu/phase_gemm.h"

namespace tconv::cpu {

struct Operands {
  std::vector<PhaseOp> pre, ops;
  const void* bias = nullptr;
};

// slack: elements that may be read behind the last channel; values are used where they are when there is none.
inline std::size_t operand_bytes(const Problem& problem, const Epilogue& epilogue, std::int64_t slack) {
  const std::size_t element = problem.dtype == DType::f64 ? 8 : 4;
  const std::size_t one = (static_cast<std::size_t>(problem.out_channels + slack) * element + 63) / 64 * 64;
  return (1 + epilogue.ops.size()) * one;
}

// Takes operand_bytes() from the workspace.
inline Operands take_operands(const Problem& problem, const Epilogue& epilogue, const Tensors& tensors, char* workspace,
                              std::int64_t slack) {
  const std::size_t one = operand_bytes(problem, epilogue, slack) / (1 + epilogue.ops.size());
  const DType arithmetic = problem.dtype == DType::f64 ? DType::f64 : DType::f32;
  auto channel_values = [&](const void* source, DType dtype) -> const void* {
    void* values = workspace;
    workspace += one;
    if (dtype == arithmetic && slack == 0) return source;
    std::memset(values, 0, one);
    for (std::int64_t c = 0; c < problem.out_channels; ++c)
      store_element(values, arithmetic, c, load_element(source, dtype, c));
    return values;
  };
  Operands operands;
  if (epilogue.bias) operands.bias = channel_values(tensors.bias, problem.dtype);
  for (const Op& op : epilogue.pre) operands.pre.push_back({op.kind, OperandKind::none, op.a, op.b, nullptr});
  for (int index = 0; index < static_cast<int>(epilogue.ops.size()); ++index) {
    const Op& op = epilogue.ops[index];
    PhaseOp entry{op.kind, operand_kind(op.kind), op.a, op.b, nullptr};
    if (entry.operand != OperandKind::none) entry.values = tensors.operands[operand_offset(epilogue, index)];
    if (entry.operand == OperandKind::channel)
      entry.values = channel_values(entry.values, epilogue.operand_dtype.value_or(problem.dtype));
    operands.ops.push_back(entry);
  }
  return operands;
}

}  // namespace tconv::cpu
