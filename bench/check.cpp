// check.cpp — random data, one run of the reference, two of every candidate, and a comparison element by element.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>

#include "cpu/element.h"
#include "memory.h"
#include "planner.h"
#include "tolerance.h"

namespace tconv::bench {
namespace {

// How the elements of a tensor are numbered, for messages.
enum class Shape { output, input, weight, channels, statistics };

struct Tensor {
  std::string name;
  Shape shape = Shape::channels;
  DType dtype = DType::f32;
  std::int64_t elements = 0;
  std::vector<std::byte> bytes;

  Tensor() = default;
  Tensor(std::string n, Shape s, DType t, std::int64_t count)
      : name(std::move(n)), shape(s), dtype(t), elements(count), bytes(static_cast<std::size_t>(count) * size_of(t)) {}
  double get(std::int64_t i) const { return cpu::load_element(bytes.data(), dtype, i); }
  void set(std::int64_t i, double value) { cpu::store_element(bytes.data(), dtype, i, value); }
};

std::string coordinates(const Problem& problem, Shape shape, std::int64_t index) {
  const bool output = shape == Shape::output;
  Dims size = output ? output_size(problem) : shape == Shape::weight ? problem.kernel : problem.input;
  const std::int64_t channels = output ? problem.out_channels : problem.in_channels;
  char text[160];
  if (shape == Shape::channels || shape == Shape::statistics) {
    std::snprintf(text, sizeof text, "[%lld]", static_cast<long long>(index));
    return text;
  }
  std::int64_t first, second, position;
  if (shape == Shape::weight) {
    const std::int64_t co_group = problem.out_channels / problem.groups;
    position = index % volume(size);
    second = index / volume(size) % co_group;
    first = index / volume(size) / co_group;
  } else if (problem.layout == Layout::channels_last) {
    second = index % channels;
    position = index / channels % volume(size);
    first = index / channels / volume(size);
  } else {
    position = index % volume(size);
    second = index / volume(size) % channels;
    first = index / volume(size) / channels;
  }
  std::snprintf(text, sizeof text, "[%s=%lld, %s=%lld, %lld, %lld, %lld]", shape == Shape::weight ? "ci" : "b",
                static_cast<long long>(first), shape == Shape::weight ? "co" : "c", static_cast<long long>(second),
                static_cast<long long>(position / (size[1] * size[2])),
                static_cast<long long>(position / size[2] % size[1]), static_cast<long long>(position % size[2]));
  return text;
}

// Everything that one problem reads.
struct Inputs {
  std::vector<Tensor> operands;
  Tensor input, weight, bias, grad_output, mean, rstd;
};

struct Outputs {
  std::vector<Tensor> tensors;  // [0] is the main result
};

bool has_grad_bias(const Problem& problem) { return problem.direction == Direction::grad_weight; }

bool saves_raw(const Problem& problem, const Epilogue& epilogue) {
  return problem.direction == Direction::forward && epilogue.save && !epilogue.ops.empty();
}

bool saves_statistics(const Problem& problem, const Epilogue& epilogue) {
  return epilogue.save && num_statistics(problem, epilogue) > 0 && problem.direction != Direction::grad_epilogue;
}

DType statistics_dtype(const Problem& problem) { return problem.dtype == DType::f64 ? DType::f64 : DType::f32; }

Inputs make_inputs(const Problem& problem, const Epilogue& epilogue, const CheckOptions& options) {
  std::mt19937_64 random(options.seed);
  const auto fill = [&](Tensor tensor, double low = -1) {
    std::uniform_real_distribution<double> uniform(low, low + 2);
    for (std::int64_t i = 0; i < tensor.elements; ++i) tensor.set(i, uniform(random));
    return tensor;
  };
  const bool chain_only = problem.direction == Direction::epilogue || problem.direction == Direction::grad_epilogue;
  const DType output_dtype = epilogue.output_dtype.value_or(problem.dtype);
  Inputs in;
  in.input = chain_only ? fill({"input", Shape::output, problem.dtype, output_elements(problem)})
                        : fill({"input", Shape::input, problem.dtype, input_elements(problem)});
  in.weight = fill({"weight", Shape::weight, problem.dtype, weight_elements(problem)});
  in.bias = fill({"bias", Shape::channels, problem.dtype, problem.out_channels});
  in.grad_output =
      fill({"grad_output", Shape::output, problem.direction == Direction::grad_epilogue ? output_dtype : problem.dtype,
            output_elements(problem)});
  if (options.non_finite) {
    for (Tensor* tensor : {&in.input, &in.weight, &in.grad_output}) {
      for (const double value : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
        if (tensor->elements == 0) continue;
        tensor->set(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(tensor->elements)), value);
      }
    }
  }
  const DType operand_dtype = epilogue.operand_dtype.value_or(problem.dtype);
  for (const Op& op : epilogue.ops) {
    for (int k = 0; k < num_operands(op); ++k) {
      const std::string name = "operand of " + std::string(to_string(op.kind));
      if (operand_kind(op.kind) == OperandKind::tensor) {
        in.operands.push_back(fill({name, Shape::output, problem.dtype, output_elements(problem)}));
      } else {
        // A variance is positive.
        const bool variance = op.kind == OpKind::batch_norm && k == 1;
        in.operands.push_back(fill({name, Shape::channels, operand_dtype, problem.out_channels}, variance ? 0.5 : -1));
      }
    }
  }
  return in;
}

Outputs make_outputs(const Problem& problem, const Epilogue& epilogue) {
  Outputs out;
  const DType output_dtype = epilogue.output_dtype.value_or(problem.dtype);
  switch (problem.direction) {
    case Direction::forward:
    case Direction::epilogue:
      out.tensors.emplace_back("output", Shape::output, output_dtype, output_elements(problem));
      break;
    case Direction::grad_input:
      out.tensors.emplace_back("grad_input", Shape::input, problem.dtype, input_elements(problem));
      break;
    case Direction::grad_weight:
      out.tensors.emplace_back("grad_weight", Shape::weight, problem.dtype, weight_elements(problem));
      break;
    case Direction::grad_epilogue:
      out.tensors.emplace_back("gradient of raw", Shape::output, problem.dtype, output_elements(problem));
      break;
  }
  if (has_grad_bias(problem))
    out.tensors.emplace_back("grad_bias", Shape::channels, problem.dtype, problem.out_channels);
  if (saves_raw(problem, epilogue)) {
    out.tensors.emplace_back("raw", Shape::output, problem.dtype, output_elements(problem));
  }
  if (saves_statistics(problem, epilogue)) {
    for (const char* name : {"mean", "rstd"}) {
      out.tensors.emplace_back(name, Shape::statistics, statistics_dtype(problem), num_statistics(problem, epilogue));
    }
  }
  if (problem.direction == Direction::grad_epilogue) {
    for (const Op& op : epilogue.ops) {
      for (int k = 0; k < num_operands(op); ++k) {
        const bool whole = operand_kind(op.kind) == OperandKind::tensor;
        out.tensors.emplace_back("gradient of operand " + std::to_string(k) + " of " + std::string(to_string(op.kind)),
                                 whole ? Shape::output : Shape::channels,
                                 whole ? problem.dtype : epilogue.operand_dtype.value_or(problem.dtype),
                                 whole ? output_elements(problem) : problem.out_channels);
      }
    }
  }
  return out;
}

// Pointers for one run; `read` and `written` give the addresses of an input and an output tensor.
template <class Read, class Written>
Tensors bind(const Problem& problem, const Epilogue& epilogue, const Inputs& in, const Outputs& out, const Read& read,
             const Written& written) {
  Tensors tensors;
  tensors.input = read(in.input);
  tensors.weight = read(in.weight);
  tensors.bias = read(in.bias);
  tensors.grad_output = read(in.grad_output);
  for (std::size_t i = 0; i < in.operands.size(); ++i) tensors.operands[i] = read(in.operands[i]);
  std::size_t next = 0;
  tensors.output = written(out.tensors[next++]);
  if (has_grad_bias(problem)) tensors.grad_bias = written(out.tensors[next++]);
  if (saves_raw(problem, epilogue)) tensors.raw = written(out.tensors[next++]);
  if (saves_statistics(problem, epilogue)) {
    tensors.mean = written(out.tensors[next++]);
    tensors.rstd = written(out.tensors[next++]);
  } else if (in.mean.elements > 0) {
    tensors.mean = const_cast<void*>(read(in.mean));
    tensors.rstd = const_cast<void*>(read(in.rstd));
  }
  if (problem.direction == Direction::grad_epilogue) {
    for (std::size_t i = 0; i < in.operands.size(); ++i) tensors.grad_operands[i] = written(out.tensors[next++]);
  }
  return tensors;
}

void launch_reference(const Problem& problem, const Epilogue& epilogue, const Tensors& tensors) {
  Step step;
  step.kernel = kernels(Backend::cpu).back();  // the list ends with the specification
  step.problem = problem;
  step.epilogue = epilogue;
  step.config = step.kernel->configs[0];
  step.device = cpu_device();
  step.kernel->launch(step, tensors, {});
}

// The specification, on the problem as it was stated: no simplification, no plan.
void run_reference(const Problem& problem, const Epilogue& epilogue, const Inputs& in, Outputs& out) {
  Tensors tensors = bind(
      problem, epilogue, in, out, [](const Tensor& t) -> const void* { return t.bytes.data(); },
      [](const Tensor& t) -> void* { return const_cast<std::byte*>(t.bytes.data()); });
  if (!saves_raw(problem, epilogue)) {
    launch_reference(problem, epilogue, tensors);
    return;
  }
  Epilogue before = epilogue, after = epilogue;
  before.ops.clear();
  before.output_dtype.reset();
  before.save = false;
  after.pre.clear();
  after.bias = false;
  Problem chain = problem;
  chain.direction = Direction::epilogue;
  Tensors first = tensors, second = tensors;
  first.output = tensors.raw;
  second.input = tensors.raw;
  launch_reference(problem, before, first);
  launch_reference(chain, after, second);
}

// The largest reciprocal deviation that the chain's normalisation meets, from a run that keeps the statistics.
double largest_rstd(const Problem& problem, const Epilogue& epilogue, Inputs& in) {
  const int norm = norm_index(epilogue);
  if (norm < 0) return 1;
  if (num_statistics(problem, epilogue) == 0) return 1 / std::sqrt(0.5);  // batch_norm: variances start at 0.5
  Problem forward = problem;
  Epilogue saving = epilogue;
  saving.save = true;
  if (problem.direction == Direction::grad_epilogue) {
    forward.direction = Direction::epilogue;
    saving.bias = false;
  }
  Outputs out = make_outputs(forward, saving);
  run_reference(forward, saving, in, out);
  Tensor& rstd = out.tensors[out.tensors.size() - 1];
  double largest = 0;
  for (std::int64_t i = 0; i < rstd.elements; ++i) largest = std::max(largest, rstd.get(i));
  if (problem.direction == Direction::grad_epilogue) {
    in.mean = out.tensors[out.tensors.size() - 2];
    in.rstd = rstd;
  }
  return largest;
}

Tolerance tolerance_of(const Tensor& tensor, bool main, const Problem& problem, const Epilogue& epilogue, double rstd) {
  if (main) return tolerance(problem, epilogue, rstd);
  const double positions = double(problem.batch) * double(volume(output_size(problem)));
  Epilogue before = epilogue;
  before.ops.clear();
  before.output_dtype.reset();
  if (tensor.name == "grad_bias") return sum_tolerance(problem.dtype, tensor.dtype, positions, 1);
  if (tensor.name == "raw") return tolerance(problem, before);
  const double gain = chain_gain(epilogue.ops, rstd);
  if (tensor.shape == Shape::statistics) {
    Tolerance result = tolerance(problem, before);
    const double rounding = 4 * unit_roundoff(problem.dtype) * (2 * std::sqrt(num_terms(problem)) + 2);
    result.absolute =
        (result.absolute + rounding) * std::max(1.0, chain_gain(epilogue.ops, std::max(1.0, rstd * rstd)));
    return result;
  }
  // Gradients of operands: sums over all positions of values that went through the chain backward.
  const double terms = tensor.shape == Shape::output ? 1 : positions;
  Tolerance result = sum_tolerance(problem.dtype, tensor.dtype, terms, std::max(1.0, gain) * 8);
  result.absolute += std::max(1.0, gain) * 4 * unit_roundoff(problem.dtype);
  return result;
}

// A derivative jumps where an operation after a normalisation has a corner, and rounding decides on which side a value
// lies; so few of many elements may differ there.
std::int64_t allowed_outliers(const Problem& problem, const Epilogue& epilogue, std::int64_t elements) {
  if (problem.direction != Direction::grad_epilogue || norm_index(epilogue) < 0) return 0;
  for (std::size_t i = static_cast<std::size_t>(norm_index(epilogue)) + 1; i < epilogue.ops.size(); ++i) {
    switch (epilogue.ops[i].kind) {
      case OpKind::relu:
      case OpKind::leaky_relu:
      case OpKind::hardswish:
      case OpKind::hardsigmoid:
      case OpKind::clamp:
      case OpKind::hardtanh:
      case OpKind::prelu:
        return 2 + elements / 10000;
      default:
        break;
    }
  }
  return 0;
}

// Compares one tensor; returns the worst error as a fraction of the tolerance and describes the first failure.
double compare(const Tensor& got, const Tensor& expected, const Tolerance& allowed, const Problem& problem,
               std::int64_t outliers, std::string& failure) {
  double worst = 0;
  std::int64_t wrong = 0, first_wrong = -1;
  for (std::int64_t i = 0; i < expected.elements; ++i) {
    const double x = got.get(i), y = expected.get(i);
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    if (std::isinf(y)) {
      // Another infinity, or a number: wrong, whatever the tolerance.
      if (first_wrong < 0) first_wrong = i;
      ++wrong;
      continue;
    }
    const double fraction = std::abs(x - y) / (allowed.absolute + allowed.relative * std::abs(y));
    if (fraction <= 1) {
      worst = std::max(worst, fraction);
    } else {  // also when it is NaN
      if (first_wrong < 0) first_wrong = i;
      ++wrong;
    }
  }
  if (wrong > outliers) {
    char text[256];
    const double x = got.get(first_wrong), y = expected.get(first_wrong);
    std::snprintf(text, sizeof text, ": got %.9g, expected %.9g, difference %.3g, allowed %.3g; %lld of %lld differ", x,
                  y, std::abs(x - y), allowed.absolute + allowed.relative * std::abs(y), static_cast<long long>(wrong),
                  static_cast<long long>(expected.elements));
    failure = got.name + coordinates(problem, got.shape, first_wrong) + text;
    worst = std::max(worst, 2.0);
  }
  return worst;
}

// One run on the device into fresh, poisoned, guarded memory.
std::string run(const Plan& plan, const Inputs& in, Outputs& out, Stream stream) {
  std::vector<Guarded> reads, writes;
  reads.reserve(in.operands.size() + 6);
  writes.reserve(out.tensors.size());
  const auto read = [&](const Tensor& tensor) -> const void* {
    reads.emplace_back(plan.device, tensor.bytes.size());
    reads.back().write(tensor.bytes.data());
    return reads.back().data();
  };
  const auto written = [&](const Tensor& tensor) -> void* {
    writes.emplace_back(plan.device, tensor.bytes.size());
    return writes.back().data();
  };
  Tensors tensors = bind(plan.problem, plan.epilogue, in, out, read, written);
  Guarded workspace(plan.device, plan.workspace_bytes);
  tensors.workspace = workspace.data();
  execute(plan, tensors, stream);
  synchronize(plan.device);
  if (!workspace.guards_intact()) return "wrote outside the workspace";
  for (std::size_t i = 0; i < writes.size(); ++i) {
    if (!writes[i].guards_intact()) return "wrote outside " + out.tensors[i].name;
    out.tensors[i].bytes = writes[i].read();
  }
  return {};
}

}  // namespace

Problem reduced(const Problem& problem, double max_products) {
  Problem smaller = problem;
  if (useful_flops(smaller) / 2 <= max_products && output_elements(smaller) <= max_products) return smaller;
  smaller.batch = std::min<std::int64_t>(smaller.batch, 2);
  const auto too_large = [&] {
    Problem forward = smaller;
    forward.direction = Direction::forward;
    return useful_flops(forward) / 2 > max_products || double(output_elements(smaller)) > max_products;
  };
  while (too_large()) {
    const int dim =
        static_cast<int>(std::max_element(smaller.input.begin(), smaller.input.end()) - smaller.input.begin());
    const std::int64_t size = smaller.input[dim];
    if (size <= 3) break;
    smaller.input[dim] =
        std::max<std::int64_t>(3, (size * 3 / 4) | 1) < size ? std::max<std::int64_t>(3, (size * 3 / 4) | 1) : size - 1;
    if (output_size(smaller)[dim] < 1) {
      smaller.input[dim] = size;
      break;
    }
  }
  return smaller;
}

std::vector<CheckResult> check(const Problem& stated, const Epilogue& epilogue, const Device& device,
                               const CheckOptions& options) {
  const Problem problem = options.max_products > 0 ? reduced(stated, options.max_products) : stated;
  validate(problem);
  validate(epilogue, problem);
  Inputs in = make_inputs(problem, epilogue, options);
  const double rstd = largest_rstd(problem, epilogue, in);
  Outputs expected = make_outputs(problem, epilogue);
  run_reference(problem, epilogue, in, expected);

  std::vector<CheckResult> results;
  std::string only = options.only;
  if (options.chosen) {
    const Plan plan = make_plan(problem, epilogue, device, options.only, kernels(device.backend));
    if (plan.steps.empty()) return results;  // an empty result has no kernel
    const Step& conv = plan.steps[static_cast<std::size_t>(plan.conv_step)];
    only = std::string(conv.kernel->name) + ":" + to_string(conv.config);
  }
  const std::string line = to_string(problem, epilogue);
  for (const Kernel* kernel : kernels(device.backend)) {
    for (const Config& config : kernel->configs) {
      CheckResult result;
      result.kernel = std::string(kernel->name) + ":" + to_string(config);
      if (!only.empty() && only != kernel->name && only != result.kernel) continue;
      Plan plan;
      try {
        plan = make_plan(problem, epilogue, device, result.kernel, kernels(device.backend));
      } catch (const std::invalid_argument&) {
        continue;  // it refuses, or the machine lacks its instructions
      }
      if (plan.steps.empty()) return results;
      try {
        for (Step& step : plan.steps) {
          if (step.kernel->prepare != nullptr) step.kernel->prepare(step);
        }
        Outputs got = make_outputs(problem, epilogue), again = got;
        result.failure = run(plan, in, got, {});
        if (result.failure.empty()) {
          Stream one;
          one.num_threads = 1;
          result.failure = run(plan, in, again, one);
        }
        for (std::size_t i = 0; result.failure.empty() && i < got.tensors.size(); ++i) {
          const Tensor& tensor = expected.tensors[i];
          result.worst = std::max(
              result.worst, compare(got.tensors[i], tensor, tolerance_of(tensor, i == 0, problem, epilogue, rstd),
                                    problem, allowed_outliers(problem, epilogue, tensor.elements), result.failure));
          if (result.failure.empty() && got.tensors[i].bytes != again.tensors[i].bytes) {
            result.failure = tensor.name + ": two runs of the same plan gave different bits";
          }
        }
      } catch (const std::exception& error) {
        result.failure = error.what();
      }
      if (!result.failure.empty()) {
        result.failure +=
            "\n  tconv check --seed " + std::to_string(options.seed) + " --only " + result.kernel + " \"" + line + "\"";
      }
      results.push_back(std::move(result));
    }
  }
  return results;
}

}  // namespace tconv::bench
