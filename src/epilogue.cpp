// epilogue.cpp — names, operands and the string of a fused chain.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/epilogue.h"

#include <charconv>
#include <iterator>
#include <stdexcept>

#include "hash.h"
#include "tconv/tconv.h"

namespace tconv {
namespace {

struct OpInfo {
  std::string_view name;
  bool norm;
  OperandKind operand;                  // pointwise
  int scalars;                          // pointwise
  int affine_operands, given_operands;  // norms
};

constexpr OpInfo kOps[] = {
#define POINTWISE(name, operand, scalars, ...) {#name, false, OperandKind::operand, scalars, 0, 0},
#define NORM(name, affine_operands, given_operands) \
  {#name, true, OperandKind::none, 0, affine_operands, given_operands},
#include "tconv/epilogue.def"
};

constexpr double kDefaultEps = 1e-5;

const OpInfo& info(OpKind kind) { return kOps[static_cast<int>(kind)]; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The shortest decimal that reads back as the same double.
std::string number(double value) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, std::end(buffer), value).ptr};
}

std::string to_string(const Op& op) {
  const OpInfo& entry = info(op.kind);
  std::string text(entry.name);
  if (entry.norm) {
    text += '(';
    if (op.kind == OpKind::group_norm) text += std::to_string(op.num_groups) + ",";
    text += "eps=" + number(op.a);
    if (op.affine) text += ",affine";
    text += ')';
  } else if (entry.scalars > 0) {
    text += "(" + number(op.a);
    if (entry.scalars > 1) text += "," + number(op.b);
    text += ')';
  }
  return text;
}

[[noreturn]] void bad_token(std::string_view token, const std::string& expected) {
  refuse("epilogue string: cannot read `" + std::string(token) + "`; " + expected);
}

template <class Number>
Number parse_number(std::string_view text, std::string_view token) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) {
    bad_token(token, "`" + std::string(text) + "` is not a number");
  }
  return value;
}

Op parse_op(std::string_view token) {
  const std::size_t open = token.find('(');
  const std::string_view name = token.substr(0, open);
  const std::optional<OpKind> kind = find_op(name);
  if (!kind) {
    std::string known;
    for (const OpInfo& entry : kOps) known.append(known.empty() ? "" : " ").append(entry.name);
    bad_token(token, "no operation is named `" + std::string(name) + "`; known: " + known);
  }
  std::vector<std::string_view> arguments;
  if (open != std::string_view::npos) {
    if (token.back() != ')') bad_token(token, "the closing parenthesis is missing");
    std::string_view rest = token.substr(open + 1, token.size() - open - 2);
    while (true) {
      const std::size_t comma = rest.find(',');
      arguments.push_back(rest.substr(0, comma));
      if (comma == std::string_view::npos) break;
      rest.remove_prefix(comma + 1);
    }
  }
  Op op;
  op.kind = *kind;
  if (!info(*kind).norm) {
    const int scalars = info(*kind).scalars;
    if (static_cast<int>(arguments.size()) != scalars) {
      bad_token(token, std::string(name) + " takes " + std::to_string(scalars) + " number(s)");
    }
    if (scalars > 0) op.a = parse_number<double>(arguments[0], token);
    if (scalars > 1) op.b = parse_number<double>(arguments[1], token);
    return op;
  }
  op.a = kDefaultEps;
  std::size_t next = 0;
  if (*kind == OpKind::group_norm) {
    if (arguments.empty()) bad_token(token, "group_norm needs its number of groups, such as group_norm(8,affine)");
    op.num_groups = parse_number<std::int64_t>(arguments[next++], token);
  }
  for (; next < arguments.size(); ++next) {
    if (arguments[next].starts_with("eps=")) {
      op.a = parse_number<double>(arguments[next].substr(4), token);
    } else if (arguments[next] == "affine") {
      op.affine = true;
    } else {
      bad_token(token, "expected eps=<number> or affine, got `" + std::string(arguments[next]) + "`");
    }
  }
  return op;
}

DType parse_dtype(std::string_view text, std::string_view token) {
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
    if (text == to_string(dtype)) return dtype;
  }
  bad_token(token, "known dtypes: f32 f64 f16 bf16");
}

void hash_ops(Hash& hash, const std::vector<Op>& ops) {
  hash.add(static_cast<std::int64_t>(ops.size()));
  for (const Op& op : ops) {
    hash.add(static_cast<int>(op.kind) | static_cast<int>(op.affine) << 8);
    hash.add(op.a);
    hash.add(op.b);
    hash.add(op.num_groups);
  }
}

}  // namespace

bool is_norm(OpKind kind) { return info(kind).norm; }
std::string_view to_string(OpKind kind) { return info(kind).name; }
OperandKind operand_kind(OpKind kind) { return info(kind).operand; }
int num_scalars(OpKind kind) { return info(kind).scalars; }

std::optional<OpKind> find_op(std::string_view name) {
  for (std::size_t i = 0; i < std::size(kOps); ++i) {
    if (kOps[i].name == name) return static_cast<OpKind>(i);
  }
  return std::nullopt;
}

int num_operands(const Op& op) {
  const OpInfo& entry = info(op.kind);
  if (entry.norm) return entry.given_operands + (op.affine ? entry.affine_operands : 0);
  return entry.operand == OperandKind::none ? 0 : 1;
}

Reach reach(OpKind kind) {
  switch (kind) {
    case OpKind::group_norm:
      return Reach::group_positions;
    case OpKind::layer_norm:
      return Reach::channels;
    default:
      return Reach::element;  // pointwise; batch_norm, whose statistics are given
  }
}

int norm_index(const Epilogue& epilogue) {
  for (std::size_t i = 0; i < epilogue.ops.size(); ++i) {
    if (is_norm(epilogue.ops[i].kind)) return static_cast<int>(i);
  }
  return -1;
}

int operand_offset(const Epilogue& epilogue, int index) {
  int slots = 0;
  for (int i = 0; i < index; ++i) slots += num_operands(epilogue.ops[static_cast<std::size_t>(i)]);
  return slots;
}

int num_operands(const Epilogue& epilogue) { return operand_offset(epilogue, static_cast<int>(epilogue.ops.size())); }

std::int64_t num_statistics(const Problem& problem, const Epilogue& epilogue) {
  const int index = norm_index(epilogue);
  if (index < 0) return 0;
  const Op& norm = epilogue.ops[static_cast<std::size_t>(index)];
  switch (norm.kind) {
    case OpKind::group_norm:
      return problem.batch * norm.num_groups;
    case OpKind::layer_norm:
      return problem.batch * volume(output_size(problem));
    default:
      return 0;
  }
}

void validate(const Epilogue& epilogue, const Problem& problem) {
  for (const Op& op : epilogue.pre) {
    if (is_norm(op.kind) || operand_kind(op.kind) != OperandKind::none) {
      refuse("pre must consist of pointwise operations without operands, got " + to_string(op));
    }
  }
  int norms = 0;
  for (const Op& op : epilogue.ops) {
    if (!is_norm(op.kind)) continue;
    if (++norms > 1) refuse("a chain may contain one normalisation, got a second: " + to_string(op));
    if (op.kind == OpKind::group_norm && (op.num_groups < 1 || problem.out_channels % op.num_groups != 0)) {
      refuse("num_groups must be positive and divide the number of channels, got num_groups=" +
             std::to_string(op.num_groups) + " and " + std::to_string(problem.out_channels) + " channels");
    }
  }
  if (num_operands(epilogue) > kMaxOperands) {
    refuse("a chain may have at most " + std::to_string(kMaxOperands) + " operands, got " +
           std::to_string(num_operands(epilogue)));
  }
  const bool gradient = problem.direction == Direction::grad_input || problem.direction == Direction::grad_weight;
  if (gradient && (epilogue.bias || !epilogue.ops.empty())) {
    refuse("direction " + std::string(to_string(problem.direction)) + " takes no epilogue, got " + to_string(epilogue));
  }
  if (problem.direction == Direction::grad_epilogue && epilogue.bias) {
    refuse("direction grad_epilogue takes no bias, because its input holds it already, got " + to_string(epilogue));
  }
  if (problem.direction != Direction::forward && problem.direction != Direction::grad_weight && !epilogue.pre.empty()) {
    refuse("direction " + std::string(to_string(problem.direction)) + " takes no pre-activation, got " +
           to_string(epilogue));
  }
}

std::string to_string(const Epilogue& epilogue) {
  std::string text;
  const auto append = [&](const std::string& token) {
    if (!text.empty()) text += ' ';
    text += token;
  };
  for (const Op& op : epilogue.pre) append("pre:" + to_string(op));
  if (epilogue.bias) append("bias");
  for (const Op& op : epilogue.ops) append(to_string(op));
  if (epilogue.operand_dtype) append("operands:" + std::string(to_string(*epilogue.operand_dtype)));
  if (epilogue.output_dtype) append("out:" + std::string(to_string(*epilogue.output_dtype)));
  if (epilogue.save) append("save");
  return text;
}

Epilogue parse_epilogue(std::string_view text) {
  Epilogue epilogue;
  constexpr std::string_view kSpace = " \t\r\n";
  while (true) {
    const std::size_t start = text.find_first_not_of(kSpace);
    if (start == std::string_view::npos) return epilogue;
    text.remove_prefix(start);
    const std::string_view token = text.substr(0, text.find_first_of(kSpace));
    text.remove_prefix(token.size());
    if (token == "bias") {
      if (epilogue.bias || !epilogue.ops.empty()) bad_token(token, "bias comes once, before the operations");
      epilogue.bias = true;
    } else if (token == "save") {
      epilogue.save = true;
    } else if (token.starts_with("pre:")) {
      epilogue.pre.push_back(parse_op(token.substr(4)));
    } else if (token.starts_with("operands:")) {
      epilogue.operand_dtype = parse_dtype(token.substr(9), token);
    } else if (token.starts_with("out:")) {
      epilogue.output_dtype = parse_dtype(token.substr(4), token);
    } else {
      epilogue.ops.push_back(parse_op(token));
    }
  }
}

std::string to_string(const Problem& problem, const Epilogue& epilogue) {
  const std::string chain = to_string(epilogue);
  return chain.empty() ? to_string(problem) : to_string(problem) + " | " + chain;
}

std::pair<Problem, Epilogue> parse_problem_and_epilogue(std::string_view text) {
  const std::size_t bar = text.find('|');
  const Problem problem = parse_problem(text.substr(0, bar));
  const Epilogue epilogue = bar == std::string_view::npos ? Epilogue{} : parse_epilogue(text.substr(bar + 1));
  validate(epilogue, problem);
  return {problem, epilogue};
}

std::size_t hash_value(const Epilogue& epilogue) {
  Hash hash;
  hash_ops(hash, epilogue.pre);
  hash_ops(hash, epilogue.ops);
  hash.add(static_cast<int>(epilogue.bias) | static_cast<int>(epilogue.save) << 1 |
           (epilogue.operand_dtype ? static_cast<int>(*epilogue.operand_dtype) + 1 : 0) << 4 |
           (epilogue.output_dtype ? static_cast<int>(*epilogue.output_dtype) + 1 : 0) << 8);
  return hash.value();
}

}  // namespace tconv
