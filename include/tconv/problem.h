// problem.h — what is convolved: one transposed convolution, in one direction.
//
// Computes  output[b, co, o] = bias[co] + sum over ci, t with o = s*i + d*t - p of input[b, ci, i] * weight[ci, co, t]
// Letters   b batch, g group, ci/co channels, i/o input and output position, t tap, s stride, p padding, d dilation
// Every dimension array is (depth, height, width); a problem of lower rank leaves the leading entries at their
// defaults, so a kernel written for three dimensions serves all ranks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#pragma GCC visibility push(default)
namespace tconv {

enum class DType : std::uint8_t { f32, f64, f16, bf16 };
// Memory order of input and output: (b, c, d, h, w) or (b, d, h, w, c). Weights are always (ci, co / groups, taps).
enum class Layout : std::uint8_t { contiguous, channels_last };
// forward      input, weight, bias            -> output
// grad_input   grad_output, weight            -> grad_input
// grad_weight  input, grad_output             -> grad_weight, grad_bias
// epilogue     input (out_channels, output size) -> the epilogue applied to it, no convolution
// grad_epilogue  the input of the epilogue, grad_output -> gradient of that input and of the epilogue's operands
enum class Direction : std::uint8_t { forward, grad_input, grad_weight, epilogue, grad_epilogue };
// What fp32 operands may be rounded to before they are multiplied. Sums are fp32 either way; other dtypes ignore it.
enum class Precision : std::uint8_t { fp32, tf32 };

using Dims = std::array<std::int64_t, 3>;  // depth, height, width

struct Problem {
  int rank = 2;  // 1, 2 or 3
  std::int64_t batch = 1;
  std::int64_t groups = 1;
  std::int64_t in_channels = 1;
  std::int64_t out_channels = 1;
  Dims input{1, 1, 1};
  Dims kernel{1, 1, 1};
  Dims stride{1, 1, 1};
  Dims padding{0, 0, 0};
  Dims output_padding{0, 0, 0};
  Dims dilation{1, 1, 1};
  DType dtype = DType::f32;
  Layout layout = Layout::contiguous;
  Direction direction = Direction::forward;
  Precision precision = Precision::fp32;

  friend bool operator==(const Problem&, const Problem&) = default;
};

// (i - 1) * s - 2 * p + d * (t - 1) + output_padding + 1 per dimension; may be negative for invalid problems.
Dims output_size(const Problem& problem);

// Throws std::invalid_argument naming the argument, its value and what is allowed. Zero batch, zero channels of either
// kind and zero-size inputs are valid exactly where PyTorch accepts them.
void validate(const Problem& problem);

// The problem string, shared by tools, tests and logs: `2d b8 g1 c64>64 i1024x1024 t3x3 s1 p0 f32`. Fields at their
// defaults are left out (b1 g1 s1 p0 op0 d1 f32 contiguous forward fp32); one number stands for all dimensions.
// to_string and parse_problem are inverse to each other. parse_problem validates and throws std::invalid_argument.
std::string to_string(const Problem& problem);
Problem parse_problem(std::string_view text);

std::string_view to_string(DType dtype);
std::string_view to_string(Layout layout);
std::string_view to_string(Direction direction);
std::string_view to_string(Precision precision);

std::size_t hash_value(const Problem& problem);

// Bytes of one element.
constexpr std::size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

constexpr std::int64_t volume(const Dims& dims) { return dims[0] * dims[1] * dims[2]; }

// Elements of each tensor.
std::int64_t input_elements(const Problem& problem);
std::int64_t output_elements(const Problem& problem);
std::int64_t weight_elements(const Problem& problem);
// Multiply-add pairs times two that contribute to an output (taps outside the output are not counted).
double useful_flops(const Problem& problem);
// Each tensor of the direction moved once.
double minimum_bytes(const Problem& problem);

}  // namespace tconv
#pragma GCC visibility pop
