// problem.cpp — checks, sizes and the problem string.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/problem.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "hash.h"

namespace tconv {
namespace {

constexpr std::string_view kDTypes[] = {"f32", "f64", "f16", "bf16"};
constexpr std::string_view kLayouts[] = {"contiguous", "channels_last"};
constexpr std::string_view kDirections[] = {"forward", "grad_input", "grad_weight", "epilogue", "grad_epilogue"};
constexpr std::string_view kPrecisions[] = {"fp32", "tf32"};

// No tensor may have more elements, and no size may be larger: sums and products of sizes then stay within 64 bits.
constexpr double kMaxElements = 1LL << 60;
constexpr std::int64_t kMaxSize = 1LL << 40;

// "(3, 5)": the dimensions that the rank uses, as Python prints a tuple.
std::string tuple(const Problem& problem, const Dims& dims) {
  if (problem.rank == 1) return std::to_string(dims[2]);
  std::string text = "(";
  for (int dim = 3 - problem.rank; dim < 3; ++dim) {
    text += std::to_string(dims[dim]);
    text += dim < 2 ? ", " : ")";
  }
  return text;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check_dims(const Problem& problem, const char* name, const Dims& dims, std::int64_t smallest,
                std::int64_t unused) {
  for (int dim = 0; dim < 3; ++dim) {
    if (dim < 3 - problem.rank && dims[dim] != unused) {
      refuse(std::string(name) + " has a value of " + std::to_string(dims[dim]) + " in a dimension that a " +
             std::to_string(problem.rank) + "d problem does not have; it must be " + std::to_string(unused));
    }
    if (dims[dim] < smallest) {
      refuse(std::string(name) + (smallest == 0 ? " must not be negative" : " must be greater than zero") + ", got " +
             name + "=" + tuple(problem, dims));
    }
    if (dims[dim] > kMaxSize) {
      refuse(std::string(name) + " must be at most " + std::to_string(kMaxSize) + ", got " + name + "=" +
             tuple(problem, dims));
    }
  }
}

void check_count(const char* name, std::int64_t value, std::int64_t smallest) {
  if (value < smallest || value > kMaxSize) {
    refuse(std::string(name) + " must be between " + std::to_string(smallest) + " and " + std::to_string(kMaxSize) +
           ", got " + name + "=" + std::to_string(value));
  }
}

void check_elements(const char* name, double first, double second, const Dims& dims) {
  const double elements = first * second * double(dims[0]) * double(dims[1]) * double(dims[2]);
  if (elements > kMaxElements) refuse(std::string(name) + " would have more than 2^60 elements");
}

bool all_equal(const Problem& problem, const Dims& dims, std::int64_t value) {
  return std::all_of(dims.begin() + (3 - problem.rank), dims.end(), [&](std::int64_t d) { return d == value; });
}

void print_dims(std::string& text, const Problem& problem, const char* letter, const Dims& dims) {
  text += letter;
  for (int dim = 3 - problem.rank; dim < 3; ++dim) {
    if (dim > 3 - problem.rank) text += 'x';
    text += std::to_string(dims[dim]);
  }
}

// As print_dims, but nothing for the default and one number when all dimensions agree.
void print_parameter(std::string& text, const Problem& problem, const char* letter, const Dims& dims,
                     std::int64_t unused) {
  if (all_equal(problem, dims, unused)) return;
  text += ' ';
  if (all_equal(problem, dims, dims[2])) {
    text += letter + std::to_string(dims[2]);
  } else {
    print_dims(text, problem, letter, dims);
  }
}

[[noreturn]] void bad_field(std::string_view field, const char* expected) {
  refuse("problem string: cannot read `" + std::string(field) + "`; expected " + expected);
}

std::int64_t parse_number(std::string_view digits, std::string_view field, const char* expected) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size() || digits.empty()) bad_field(field, expected);
  return value;
}

Dims parse_dims(const Problem& problem, std::string_view text, std::string_view field, std::int64_t unused,
                const char* expected) {
  Dims dims{unused, unused, unused};
  std::int64_t values[3];
  int count = 0;
  for (;;) {
    const std::size_t cross = text.find('x');
    if (count == 3) bad_field(field, expected);
    values[count++] = parse_number(text.substr(0, cross), field, expected);
    if (cross == std::string_view::npos) break;
    text.remove_prefix(cross + 1);
  }
  if (count == 1) {
    std::fill(dims.begin() + (3 - problem.rank), dims.end(), values[0]);
  } else if (count == problem.rank) {
    std::copy(values, values + count, dims.begin() + (3 - problem.rank));
  } else {
    bad_field(field, "one number, or one per dimension");
  }
  return dims;
}

template <class Enum, std::size_t N>
bool parse_name(std::string_view field, const std::string_view (&names)[N], Enum& result) {
  for (std::size_t i = 0; i < N; ++i) {
    if (field == names[i]) {
      result = static_cast<Enum>(i);
      return true;
    }
  }
  return false;
}

// How many pairs (i, t) of one dimension land on an output.
double pairs(const Problem& problem, int dim) {
  const std::int64_t s = problem.stride[dim], last = output_size(problem)[dim] - 1;
  double count = 0;
  for (std::int64_t t = 0; t < problem.kernel[dim]; ++t) {
    const std::int64_t offset = problem.dilation[dim] * t - problem.padding[dim];  // o = s * i + offset
    const std::int64_t first_i = offset >= 0 ? 0 : (-offset + s - 1) / s;
    if (last < offset) continue;
    const std::int64_t last_i = std::min(problem.input[dim] - 1, (last - offset) / s);
    count += static_cast<double>(std::max<std::int64_t>(0, last_i - first_i + 1));
  }
  return count;
}

}  // namespace

Dims output_size(const Problem& problem) {
  Dims output;
  for (int dim = 0; dim < 3; ++dim) {
    output[dim] = (problem.input[dim] - 1) * problem.stride[dim] - 2 * problem.padding[dim] +
                  problem.dilation[dim] * (problem.kernel[dim] - 1) + problem.output_padding[dim] + 1;
  }
  return output;
}

void validate(const Problem& problem) {
  if (problem.rank < 1 || problem.rank > 3) {
    refuse("rank must be 1, 2 or 3, got rank=" + std::to_string(problem.rank));
  }
  check_count("batch", problem.batch, 0);
  check_count("groups", problem.groups, 1);
  check_count("in_channels", problem.in_channels, 1);
  check_count("out_channels", problem.out_channels, 1);
  for (const auto& [name, channels] :
       {std::pair{"in_channels", problem.in_channels}, std::pair{"out_channels", problem.out_channels}}) {
    if (channels % problem.groups != 0) {
      refuse(std::string(name) + " must be divisible by groups, got " + name + "=" + std::to_string(channels) +
             " and groups=" + std::to_string(problem.groups));
    }
  }
  check_dims(problem, "kernel_size", problem.kernel, 1, 1);
  check_dims(problem, "stride", problem.stride, 1, 1);
  check_dims(problem, "dilation", problem.dilation, 1, 1);
  check_dims(problem, "padding", problem.padding, 0, 0);
  check_dims(problem, "output_padding", problem.output_padding, 0, 0);
  // PyTorch accepts an input without positions only in an empty batch.
  check_dims(problem, "input size", problem.input, problem.batch == 0 ? 0 : 1, 1);
  for (int dim = 0; dim < 3; ++dim) {
    if (problem.output_padding[dim] > 0 &&
        problem.output_padding[dim] >= std::max(problem.stride[dim], problem.dilation[dim])) {
      refuse("output_padding must be smaller than either stride or dilation, got output_padding=" +
             tuple(problem, problem.output_padding) + ", stride=" + tuple(problem, problem.stride) +
             ", dilation=" + tuple(problem, problem.dilation));
    }
    // The terms of the output size, each bounded by 2^40, times one another.
    if (double(problem.input[dim]) * double(problem.stride[dim]) +
            double(problem.kernel[dim]) * double(problem.dilation[dim]) >
        kMaxElements) {
      refuse("the output size would exceed 2^60 for input size " + tuple(problem, problem.input));
    }
  }
  const Dims output = output_size(problem);
  for (int dim = 0; dim < 3; ++dim) {
    if (output[dim] < (problem.batch == 0 ? 0 : 1)) {
      refuse("Given input size per channel: " + tuple(problem, problem.input) +
             ". Calculated output size per channel: " + tuple(problem, output) +
             ". Output size is too small; it must be at least 1 in every dimension, from kernel_size=" +
             tuple(problem, problem.kernel) + ", stride=" + tuple(problem, problem.stride) + ", padding=" +
             tuple(problem, problem.padding) + ", output_padding=" + tuple(problem, problem.output_padding) +
             ", dilation=" + tuple(problem, problem.dilation));
    }
  }
  check_elements("input", double(problem.batch), double(problem.in_channels), problem.input);
  check_elements("output", double(problem.batch), double(problem.out_channels), output);
  check_elements("weight", double(problem.in_channels), double(problem.out_channels / problem.groups), problem.kernel);
}

std::string to_string(const Problem& problem) {
  std::string text = std::to_string(problem.rank) + "d";
  if (problem.batch != 1) text += " b" + std::to_string(problem.batch);
  if (problem.groups != 1) text += " g" + std::to_string(problem.groups);
  text += " c" + std::to_string(problem.in_channels) + ">" + std::to_string(problem.out_channels) + " ";
  print_dims(text, problem, "i", problem.input);
  print_dims(text += ' ', problem, "t", problem.kernel);
  print_parameter(text, problem, "s", problem.stride, 1);
  print_parameter(text, problem, "p", problem.padding, 0);
  print_parameter(text, problem, "op", problem.output_padding, 0);
  print_parameter(text, problem, "d", problem.dilation, 1);
  if (problem.dtype != DType::f32) text.append(" ").append(to_string(problem.dtype));
  if (problem.layout != Layout::contiguous) text.append(" ").append(to_string(problem.layout));
  if (problem.direction != Direction::forward) text.append(" ").append(to_string(problem.direction));
  if (problem.precision != Precision::fp32) text.append(" ").append(to_string(problem.precision));
  return text;
}

Problem parse_problem(std::string_view text) {
  Problem problem;
  bool have_rank = false, have_channels = false, have_input = false, have_kernel = false;
  constexpr std::string_view kSpace = " \t\r\n";
  while (true) {
    const std::size_t start = text.find_first_not_of(kSpace);
    if (start == std::string_view::npos) break;
    text.remove_prefix(start);
    const std::string_view field = text.substr(0, text.find_first_of(kSpace));
    text.remove_prefix(field.size());

    if (!have_rank) {
      if (field != "1d" && field != "2d" && field != "3d") bad_field(field, "1d, 2d or 3d first");
      problem.rank = field[0] - '0';
      have_rank = true;
    } else if (parse_name(field, kDTypes, problem.dtype) || parse_name(field, kLayouts, problem.layout) ||
               parse_name(field, kDirections, problem.direction) || parse_name(field, kPrecisions, problem.precision)) {
      continue;
    } else if (field.starts_with("op")) {
      problem.output_padding =
          parse_dims(problem, field.substr(2), field, 0, "op<output_padding>, such as op1 or op1x0");
    } else if (field[0] == 'b') {
      problem.batch = parse_number(field.substr(1), field, "b<batch>, such as b8");
    } else if (field[0] == 'g') {
      problem.groups = parse_number(field.substr(1), field, "g<groups>, such as g4");
    } else if (field[0] == 'c') {
      const char* expected = "c<in_channels>><out_channels>, such as c64>32";
      const std::size_t arrow = field.find('>');
      if (arrow == std::string_view::npos) bad_field(field, expected);
      problem.in_channels = parse_number(field.substr(1, arrow - 1), field, expected);
      problem.out_channels = parse_number(field.substr(arrow + 1), field, expected);
      have_channels = true;
    } else if (field[0] == 'i') {
      problem.input = parse_dims(problem, field.substr(1), field, 1, "i<input size>, such as i32x64");
      have_input = true;
    } else if (field[0] == 't') {
      problem.kernel = parse_dims(problem, field.substr(1), field, 1, "t<kernel size>, such as t3x3");
      have_kernel = true;
    } else if (field[0] == 's') {
      problem.stride = parse_dims(problem, field.substr(1), field, 1, "s<stride>, such as s2");
    } else if (field[0] == 'p') {
      problem.padding = parse_dims(problem, field.substr(1), field, 0, "p<padding>, such as p1");
    } else if (field[0] == 'd') {
      problem.dilation = parse_dims(problem, field.substr(1), field, 1, "d<dilation>, such as d2");
    } else {
      bad_field(field, "b g c i t s p op d followed by numbers, a dtype, a layout, a direction or a precision");
    }
  }
  if (!have_rank || !have_channels || !have_input || !have_kernel) {
    refuse(
        "problem string: needs at least rank, channels, input size and kernel size, such as `2d c64>32 i16x16 t3x3`");
  }
  validate(problem);
  return problem;
}

std::string_view to_string(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }
std::string_view to_string(Layout layout) { return kLayouts[static_cast<int>(layout)]; }
std::string_view to_string(Direction direction) { return kDirections[static_cast<int>(direction)]; }
std::string_view to_string(Precision precision) { return kPrecisions[static_cast<int>(precision)]; }

std::size_t hash_value(const Problem& problem) {
  Hash hash;
  hash.add(problem.batch);
  hash.add(problem.groups);
  hash.add(problem.in_channels);
  hash.add(problem.out_channels);
  for (const Dims* dims : {&problem.input, &problem.kernel, &problem.stride, &problem.padding, &problem.output_padding,
                           &problem.dilation}) {
    for (const std::int64_t d : *dims) hash.add(d);
  }
  hash.add(problem.rank | static_cast<int>(problem.dtype) << 4 | static_cast<int>(problem.layout) << 8 |
           static_cast<int>(problem.direction) << 12 | static_cast<int>(problem.precision) << 16);
  return hash.value();
}

std::int64_t input_elements(const Problem& problem) {
  return problem.batch * problem.in_channels * volume(problem.input);
}

std::int64_t output_elements(const Problem& problem) {
  return problem.batch * problem.out_channels * volume(output_size(problem));
}

std::int64_t weight_elements(const Problem& problem) {
  return problem.in_channels * (problem.out_channels / problem.groups) * volume(problem.kernel);
}

double useful_flops(const Problem& problem) {
  if (problem.direction == Direction::epilogue || problem.direction == Direction::grad_epilogue) return 0;
  double flops =
      2.0 * double(problem.batch) * double(problem.in_channels) * double(problem.out_channels / problem.groups);
  for (int dim = 0; dim < 3; ++dim) flops *= pairs(problem, dim);
  return flops;
}

double minimum_bytes(const Problem& problem) {
  const double output = double(output_elements(problem));
  double elements = 0;
  switch (problem.direction) {
    case Direction::forward:
    case Direction::grad_input:
    case Direction::grad_weight:
      elements = double(input_elements(problem)) + double(weight_elements(problem)) + output;
      break;
    case Direction::epilogue:
      elements = 2 * output;
      break;
    case Direction::grad_epilogue:
      elements = 3 * output;
      break;
  }
  return elements * double(size_of(problem.dtype));
}

}  // namespace tconv
