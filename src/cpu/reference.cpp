// reference — plain loops in double: the specification of every direction.
//
// Computes  forward, grad_input, grad_weight (and grad_bias), epilogue, grad_epilogue; every dtype and layout.
// Method    Gathers: each result element is one sum over taps and channels in double, in the order channel, depth,
//           height, width. Taps that fall outside contribute nothing, so 0 * inf never occurs.
// Refuses   Nothing. Its price is high, so that it only runs when nothing else fits or when it is asked for.
// Reads as  the definition in problem.h, once per direction.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "cpu/element.h"
#include "cpu/parallel.h"
#include "kernel.h"

namespace tconv::cpu {
namespace {

double tconv_exp(double x) { return std::exp(x); }
double tconv_tanh(double x) { return std::tanh(x); }
double tconv_log1p(double x) { return std::log1p(x); }
double tconv_normal_cdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752440); }
double tconv_tanh_softplus(double x) { return std::tanh(x > 20 ? x : std::log1p(std::exp(x))); }

struct Derivatives {
  double value, d_x, d_v;
};

Derivatives pointwise(const Op& op, double x, double v) {
  using T = double;
  [[maybe_unused]] const double a = op.a, b = op.b;
  switch (op.kind) {
#define POINTWISE(name, operand, scalars, value, d_x, d_v) \
  case OpKind::name:                                       \
    return {value, d_x, d_v};
#define NORM(name, ...) \
  case OpKind::name:    \
    break;
#include "tconv/epilogue.def"
  }
  return {x, 1, 0};
}

// The epilogue with its operands at hand.
struct Chain {
  const Problem& problem;
  const Epilogue& epilogue;
  const Tensors& tensors;
  std::int64_t channels, positions;  // of the output

  Chain(const Problem& p, const Epilogue& e, const Tensors& t)
      : problem(p), epilogue(e), tensors(t), channels(p.out_channels), positions(volume(output_size(p))) {}

  DType operand_dtype() const { return epilogue.operand_dtype.value_or(problem.dtype); }
  DType output_dtype() const { return epilogue.output_dtype.value_or(problem.dtype); }
  double channel_operand(int slot, std::int64_t c) const {
    return load_element(tensors.operands[slot], operand_dtype(), c);
  }
  double operand(int index, std::int64_t c, std::int64_t element) const {
    const int slot = operand_offset(epilogue, index);
    switch (operand_kind(epilogue.ops[index].kind)) {
      case OperandKind::none:
        return 0;
      case OperandKind::channel:
        return channel_operand(slot, c);
      case OperandKind::tensor:
        return load_element(tensors.operands[slot], problem.dtype, element);
    }
    return 0;
  }
  double apply(int first, int last, double x, std::int64_t c, std::int64_t element) const {
    for (int index = first; index < last; ++index)
      x = pointwise(epilogue.ops[index], x, operand(index, c, element)).value;
    return x;
  }
};

double apply_pre(const Epilogue& epilogue, double x) {
  for (const Op& op : epilogue.pre) x = pointwise(op, x, 0).value;
  return x;
}

struct Moments {
  double mean = 0, rstd = 0;
};

// Which statistics an element belongs to.
std::int64_t statistic_of(const Op& norm, const Chain& chain, std::int64_t b, std::int64_t c, std::int64_t position) {
  if (norm.kind == OpKind::layer_norm) return b * chain.positions + position;
  if (norm.kind == OpKind::group_norm) return b * norm.num_groups + c / (chain.channels / norm.num_groups);
  return c;  // batch_norm
}

// Mean and reciprocal deviation for every statistic, from `values` in (b, c, position) order, in two passes.
std::vector<Moments> moments(const Chain& chain, int norm_position, const std::vector<double>& values) {
  const Op& norm = chain.epilogue.ops[norm_position];
  const int slot = operand_offset(chain.epilogue, norm_position);
  const std::int64_t batch = chain.problem.batch;
  std::vector<Moments> result;
  if (norm.kind == OpKind::batch_norm) {
    for (std::int64_t c = 0; c < chain.channels; ++c)
      result.push_back({chain.channel_operand(slot, c), 1 / std::sqrt(chain.channel_operand(slot + 1, c) + norm.a)});
    return result;
  }
  result.resize(norm.kind == OpKind::layer_norm ? batch * chain.positions : batch * norm.num_groups);
  std::vector<double> count(result.size()), variance(result.size());
  auto each = [&](auto&& body) {
    for (std::int64_t b = 0, i = 0; b < batch; ++b)
      for (std::int64_t c = 0; c < chain.channels; ++c)
        for (std::int64_t position = 0; position < chain.positions; ++position, ++i)
          body(statistic_of(norm, chain, b, c, position), values[i]);
  };
  each([&](std::int64_t s, double x) { result[s].mean += x, count[s] += 1; });
  for (std::size_t s = 0; s < result.size(); ++s) result[s].mean /= count[s];
  each([&](std::int64_t s, double x) { variance[s] += (x - result[s].mean) * (x - result[s].mean); });
  for (std::size_t s = 0; s < result.size(); ++s) result[s].rstd = 1 / std::sqrt(variance[s] / count[s] + norm.a);
  return result;
}

void store_moments(const Chain& chain, const std::vector<Moments>& result) {
  const DType dtype = chain.problem.dtype == DType::f64 ? DType::f64 : DType::f32;
  for (std::size_t s = 0; s < result.size(); ++s) {
    if (chain.tensors.mean) store_element(chain.tensors.mean, dtype, s, result[s].mean);
    if (chain.tensors.rstd) store_element(chain.tensors.rstd, dtype, s, result[s].rstd);
  }
}

std::vector<Moments> load_moments(const Chain& chain, std::int64_t count) {
  const DType dtype = chain.problem.dtype == DType::f64 ? DType::f64 : DType::f32;
  std::vector<Moments> result(count);
  for (std::int64_t s = 0; s < count; ++s)
    result[s] = {load_element(chain.tensors.mean, dtype, s), load_element(chain.tensors.rstd, dtype, s)};
  return result;
}

struct Affine {
  int weight_slot = -1, bias_slot = -1;
};

Affine affine_slots(const Epilogue& epilogue, int norm_position) {
  const Op& norm = epilogue.ops[norm_position];
  if (!norm.affine) return {};
  const int slot = operand_offset(epilogue, norm_position) + (norm.kind == OpKind::batch_norm ? 2 : 0);
  return {slot, slot + 1};
}

// values, in (b, c, position) order and before the bias, through the whole chain into tensors.output.
void run_chain(const Chain& chain, std::vector<double>& values) {
  const Problem& problem = chain.problem;
  const Epilogue& epilogue = chain.epilogue;
  const int norm_position = norm_index(epilogue), num_ops = static_cast<int>(epilogue.ops.size());
  const int before = norm_position < 0 ? num_ops : norm_position;
  auto index_of = [&](std::int64_t b, std::int64_t c, std::int64_t position) {
    return element_index(problem.layout, chain.channels, chain.positions, b, c, position);
  };
  for (std::int64_t b = 0, i = 0; b < problem.batch; ++b)
    for (std::int64_t c = 0; c < chain.channels; ++c)
      for (std::int64_t position = 0; position < chain.positions; ++position, ++i) {
        if (epilogue.bias) values[i] += load_element(chain.tensors.bias, problem.dtype, c);
        values[i] = chain.apply(0, before, values[i], c, index_of(b, c, position));
      }
  std::vector<Moments> statistics;
  Affine affine;
  if (norm_position >= 0) {
    statistics = moments(chain, norm_position, values);
    affine = affine_slots(epilogue, norm_position);
    if (epilogue.ops[norm_position].kind != OpKind::batch_norm) store_moments(chain, statistics);
  }
  for (std::int64_t b = 0, i = 0; b < problem.batch; ++b)
    for (std::int64_t c = 0; c < chain.channels; ++c)
      for (std::int64_t position = 0; position < chain.positions; ++position, ++i) {
        double x = values[i];
        if (norm_position >= 0) {
          const Moments& m = statistics[statistic_of(epilogue.ops[norm_position], chain, b, c, position)];
          x = (x - m.mean) * m.rstd;
          if (affine.weight_slot >= 0)
            x = x * chain.channel_operand(affine.weight_slot, c) + chain.channel_operand(affine.bias_slot, c);
          x = chain.apply(norm_position + 1, num_ops, x, c, index_of(b, c, position));
        }
        store_element(chain.tensors.output, chain.output_dtype(), index_of(b, c, position), x);
      }
}

void run_epilogue(const Chain& chain) {
  const Problem& problem = chain.problem;
  std::vector<double> values(problem.batch * chain.channels * chain.positions);
  for (std::int64_t b = 0, i = 0; b < problem.batch; ++b)
    for (std::int64_t c = 0; c < chain.channels; ++c)
      for (std::int64_t position = 0; position < chain.positions; ++position, ++i)
        values[i] =
            apply_pre(chain.epilogue,
                      load_element(chain.tensors.input, problem.dtype,
                                   element_index(problem.layout, chain.channels, chain.positions, b, c, position)));
  run_chain(chain, values);
}

// Reverse mode over the chain. The bias is part of the raw result already.
void run_grad_epilogue(const Chain& chain) {
  const Problem& problem = chain.problem;
  const Epilogue& epilogue = chain.epilogue;
  const Tensors& tensors = chain.tensors;
  const int norm_position = norm_index(epilogue), num_ops = static_cast<int>(epilogue.ops.size());
  const int before = norm_position < 0 ? num_ops : norm_position;
  const std::int64_t total = problem.batch * chain.channels * chain.positions;
  std::vector<double> raw(total), value(total), gradient(total);
  std::vector<std::vector<double>> channel_sums(num_operands(epilogue));

  auto each = [&](auto&& body) {
    for (std::int64_t b = 0, i = 0; b < problem.batch; ++b)
      for (std::int64_t c = 0; c < chain.channels; ++c)
        for (std::int64_t position = 0; position < chain.positions; ++position, ++i)
          body(b, c, position, i, element_index(problem.layout, chain.channels, chain.positions, b, c, position));
  };
  // Gradient by the value before ops[first], from that after ops[last - 1]; operand gradients on the way.
  auto reverse = [&](int first, int last, double x, double g, std::int64_t c, std::int64_t element) {
    std::vector<double> inputs;
    for (int index = first; index < last; ++index) {
      inputs.push_back(x);
      x = pointwise(epilogue.ops[index], x, chain.operand(index, c, element)).value;
    }
    for (int index = last - 1; index >= first; --index) {
      const Derivatives d = pointwise(epilogue.ops[index], inputs[index - first], chain.operand(index, c, element));
      const OperandKind kind = operand_kind(epilogue.ops[index].kind);
      const int slot = operand_offset(epilogue, index);
      if (kind == OperandKind::channel) {
        if (channel_sums[slot].empty()) channel_sums[slot].resize(chain.channels);
        channel_sums[slot][c] += g * d.d_v;
      } else if (kind == OperandKind::tensor && tensors.grad_operands[slot]) {
        store_element(tensors.grad_operands[slot], problem.dtype, element, g * d.d_v);
      }
      g *= d.d_x;
    }
    return g;
  };

  each([&](auto, std::int64_t c, auto, std::int64_t i, std::int64_t element) {
    raw[i] = load_element(tensors.input, problem.dtype, element);
    value[i] = chain.apply(0, before, raw[i], c, element);
    gradient[i] = load_element(tensors.grad_output, chain.output_dtype(), element);
  });
  if (norm_position >= 0) {
    const Op& norm = epilogue.ops[norm_position];
    const Affine affine = affine_slots(epilogue, norm_position);
    const std::vector<Moments> statistics = norm.kind == OpKind::batch_norm || !tensors.mean || !tensors.rstd
                                                ? moments(chain, norm_position, value)
                                                : load_moments(chain, num_statistics(problem, epilogue));
    std::vector<double> sum_g(statistics.size()), sum_gx(statistics.size()), count(statistics.size());
    std::vector<double> grad_weight(chain.channels), grad_bias(chain.channels);
    std::vector<double> grad_mean(chain.channels), grad_variance(chain.channels);
    each([&](std::int64_t b, std::int64_t c, std::int64_t position, std::int64_t i, std::int64_t element) {
      const std::int64_t s = statistic_of(norm, chain, b, c, position);
      const double normal = (value[i] - statistics[s].mean) * statistics[s].rstd;
      const double w = affine.weight_slot >= 0 ? chain.channel_operand(affine.weight_slot, c) : 1;
      const double v = affine.bias_slot >= 0 ? chain.channel_operand(affine.bias_slot, c) : 0;
      const double g = reverse(norm_position + 1, num_ops, normal * w + v, gradient[i], c, element);
      grad_weight[c] += g * normal;
      grad_bias[c] += g;
      gradient[i] = g * w;
      sum_g[s] += g * w;
      sum_gx[s] += g * w * normal;
      count[s] += 1;
    });
    each([&](std::int64_t b, std::int64_t c, std::int64_t position, std::int64_t i, auto) {
      const std::int64_t s = statistic_of(norm, chain, b, c, position);
      const double normal = (value[i] - statistics[s].mean) * statistics[s].rstd;
      if (norm.kind == OpKind::batch_norm) {
        grad_mean[c] -= gradient[i] * statistics[s].rstd;
        grad_variance[c] -= gradient[i] * normal * statistics[s].rstd * statistics[s].rstd / 2;
        gradient[i] *= statistics[s].rstd;
      } else {
        gradient[i] = (gradient[i] - (sum_g[s] + normal * sum_gx[s]) / count[s]) * statistics[s].rstd;
      }
    });
    const int slot = operand_offset(epilogue, norm_position);
    if (norm.kind == OpKind::batch_norm) {
      channel_sums[slot] = grad_mean;
      channel_sums[slot + 1] = grad_variance;
    }
    if (norm.affine) {
      channel_sums[affine.weight_slot] = grad_weight;
      channel_sums[affine.bias_slot] = grad_bias;
    }
  }
  each([&](auto, std::int64_t c, auto, std::int64_t i, std::int64_t element) {
    const double g = reverse(0, before, raw[i], gradient[i], c, element);
    if (tensors.output) store_element(tensors.output, problem.dtype, element, g);
  });
  for (int index = 0, slot = 0; index < num_ops; ++index)
    for (int k = 0; k < num_operands(epilogue.ops[index]); ++k, ++slot) {
      if (operand_kind(epilogue.ops[index].kind) == OperandKind::tensor || !tensors.grad_operands[slot]) continue;
      for (std::int64_t c = 0; c < chain.channels; ++c)
        store_element(tensors.grad_operands[slot], chain.operand_dtype(), c,
                      channel_sums[slot].empty() ? 0.0 : channel_sums[slot][c]);
    }
}

// Calls body(tap, position) for every tap of the kernel that links `origin` to a valid position of the other side.
// Forward: origin is an output, position an input. Backward: the other way round.
template <class F>
void each_tap(const Problem& problem, const Dims& origin, const Dims& limit, bool origin_is_output, F&& body) {
  auto link = [&](int dim, std::int64_t tap) -> std::int64_t {
    const std::int64_t s = problem.stride[dim], p = problem.padding[dim], d = problem.dilation[dim];
    std::int64_t position;
    if (origin_is_output) {
      const std::int64_t distance = origin[dim] + p - d * tap;
      if (distance < 0 || distance % s != 0) return -1;
      position = distance / s;
    } else {
      position = s * origin[dim] + d * tap - p;
    }
    return position >= 0 && position < limit[dim] ? position : -1;
  };
  for (std::int64_t td = 0; td < problem.kernel[0]; ++td) {
    const std::int64_t pd = link(0, td);
    if (pd < 0) continue;
    for (std::int64_t th = 0; th < problem.kernel[1]; ++th) {
      const std::int64_t ph = link(1, th);
      if (ph < 0) continue;
      for (std::int64_t tw = 0; tw < problem.kernel[2]; ++tw) {
        const std::int64_t pw = link(2, tw);
        if (pw < 0) continue;
        body((td * problem.kernel[1] + th) * problem.kernel[2] + tw, (pd * limit[1] + ph) * limit[2] + pw);
      }
    }
  }
}

template <class F>
void each_position(const Dims& size, F&& body) {
  std::int64_t flat = 0;
  for (std::int64_t d = 0; d < size[0]; ++d)
    for (std::int64_t h = 0; h < size[1]; ++h)
      for (std::int64_t w = 0; w < size[2]; ++w) body(Dims{d, h, w}, flat++);
}

void run_forward(const Problem& problem, const Epilogue& epilogue, const Tensors& tensors, int threads) {
  const Dims out = output_size(problem);
  const std::int64_t ci_group = problem.groups ? problem.in_channels / problem.groups : 0;
  const std::int64_t co_group = problem.groups ? problem.out_channels / problem.groups : 0;
  const std::int64_t taps = volume(problem.kernel), in_positions = volume(problem.input), out_positions = volume(out);
  std::vector<double> values(problem.batch * problem.out_channels * out_positions);
  parallel_for(problem.batch * problem.out_channels, threads, [&](std::int64_t item) {
    const std::int64_t b = item / problem.out_channels, co = item % problem.out_channels, g = co / co_group;
    each_position(out, [&](const Dims& o, std::int64_t flat) {
      double sum = 0;
      each_tap(problem, o, problem.input, true, [&](std::int64_t tap, std::int64_t i) {
        for (std::int64_t ci = g * ci_group; ci < (g + 1) * ci_group; ++ci) {
          const double x = load_element(tensors.input, problem.dtype,
                                        element_index(problem.layout, problem.in_channels, in_positions, b, ci, i));
          sum += apply_pre(epilogue, x) *
                 load_element(tensors.weight, problem.dtype, (ci * co_group + co % co_group) * taps + tap);
        }
      });
      values[item * out_positions + flat] = sum;
    });
  });
  run_chain(Chain(problem, epilogue, tensors), values);
}

void run_grad_input(const Problem& problem, const Tensors& tensors, int threads) {
  const Dims out = output_size(problem);
  const std::int64_t ci_group = problem.groups ? problem.in_channels / problem.groups : 0;
  const std::int64_t co_group = problem.groups ? problem.out_channels / problem.groups : 0;
  const std::int64_t taps = volume(problem.kernel), in_positions = volume(problem.input), out_positions = volume(out);
  parallel_for(problem.batch * problem.in_channels, threads, [&](std::int64_t item) {
    const std::int64_t b = item / problem.in_channels, ci = item % problem.in_channels, g = ci / ci_group;
    each_position(problem.input, [&](const Dims& i, std::int64_t flat) {
      double sum = 0;
      each_tap(problem, i, out, false, [&](std::int64_t tap, std::int64_t o) {
        for (std::int64_t co = 0; co < co_group; ++co)
          sum += load_element(
                     tensors.grad_output, problem.dtype,
                     element_index(problem.layout, problem.out_channels, out_positions, b, g * co_group + co, o)) *
                 load_element(tensors.weight, problem.dtype, (ci * co_group + co) * taps + tap);
      });
      store_element(tensors.output, problem.dtype,
                    element_index(problem.layout, problem.in_channels, in_positions, b, ci, flat), sum);
    });
  });
}

void run_grad_weight(const Problem& problem, const Epilogue& epilogue, const Tensors& tensors, int threads) {
  const Dims out = output_size(problem);
  const std::int64_t ci_group = problem.groups ? problem.in_channels / problem.groups : 0;
  const std::int64_t co_group = problem.groups ? problem.out_channels / problem.groups : 0;
  const std::int64_t taps = volume(problem.kernel), in_positions = volume(problem.input), out_positions = volume(out);
  parallel_for(problem.in_channels * co_group, threads, [&](std::int64_t item) {
    const std::int64_t ci = item / co_group, co = ci / ci_group * co_group + item % co_group;
    std::vector<double> sums(taps);
    for (std::int64_t b = 0; b < problem.batch; ++b)
      each_position(problem.input, [&](const Dims& i, std::int64_t flat) {
        const double x = apply_pre(
            epilogue, load_element(tensors.input, problem.dtype,
                                   element_index(problem.layout, problem.in_channels, in_positions, b, ci, flat)));
        each_tap(problem, i, out, false, [&](std::int64_t tap, std::int64_t o) {
          sums[tap] += x * load_element(tensors.grad_output, problem.dtype,
                                        element_index(problem.layout, problem.out_channels, out_positions, b, co, o));
        });
      });
    for (std::int64_t tap = 0; tap < taps; ++tap)
      store_element(tensors.output, problem.dtype, item * taps + tap, sums[tap]);
  });
  if (!tensors.grad_bias) return;
  parallel_for(problem.out_channels, threads, [&](std::int64_t co) {
    double sum = 0;
    for (std::int64_t b = 0; b < problem.batch; ++b)
      for (std::int64_t o = 0; o < out_positions; ++o)
        sum += load_element(tensors.grad_output, problem.dtype,
                            element_index(problem.layout, problem.out_channels, out_positions, b, co, o));
    store_element(tensors.grad_bias, problem.dtype, co, sum);
  });
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  // Measured on one Zen 5 core: 0.04 multiply-adds a nanosecond, 25 ns for each element of a chain.
  const double elements = static_cast<double>(output_elements(problem));
  const bool gradient = problem.direction == Direction::epilogue || problem.direction == Direction::grad_epilogue;
  const double sums = gradient ? 0 : useful_flops(problem) / 2 / 40 / device.cores;
  Fit fit;
  fit.microseconds = 100 + sums + elements * 0.025 * static_cast<double>(1 + epilogue.ops.size());
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  fit.fused_pre = true;
  return fit;
}

void launch(const Step& step, const Tensors& tensors, Stream stream) {
  const int threads = resolve_threads(stream.num_threads);
  switch (step.problem.direction) {
    case Direction::forward:
      return run_forward(step.problem, step.epilogue, tensors, threads);
    case Direction::grad_input:
      return run_grad_input(step.problem, tensors, threads);
    case Direction::grad_weight:
      return run_grad_weight(step.problem, step.epilogue, tensors, threads);
    case Direction::epilogue:
      return run_epilogue(Chain(step.problem, step.epilogue, tensors));
    case Direction::grad_epilogue:
      return run_grad_epilogue(Chain(step.problem, step.epilogue, tensors));
  }
}

constexpr Config kConfigs[] = {{}};

}  // namespace

extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {"reference", kConfigs, fit, nullptr, nullptr, launch};

}  // namespace tconv::cpu
