// Sizes, checks and the problem string.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/problem.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <stdexcept>

namespace tconv {
namespace {

std::string refusal(std::string_view text) {
  try {
    parse_problem(text);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_CONTAINS(text, part) EXPECT_NE((text).find(part), std::string::npos) << "in: " << (text)

TEST(Problem, OutputSizeIsPyTorchs) {
  // torch.nn.functional.conv_transpose2d(x[1, 4, 9, 5], w[4, 4, 5, 7], stride=(3, 2), padding=(1, 3),
  // output_padding=(2, 1), dilation=(1, 2)) has shape (1, 4, 29, 16)
  const Problem p = parse_problem("2d c4>4 i9x5 t5x7 s3x2 p1x3 op2x1 d1x2");
  EXPECT_EQ(output_size(p), (Dims{1, 29, 16}));
  EXPECT_EQ(output_size(parse_problem("1d c1>1 i32 t16 s8 p4")), (Dims{1, 1, 256}));
  EXPECT_EQ(output_size(parse_problem("3d c1>1 i2x3x4 t3 s2 p1 op1")), (Dims{4, 6, 8}));
}

TEST(Problem, StringLeavesOutDefaultsAndCollapsesEqualDimensions) {
  const auto canonical = [](std::string_view text) { return to_string(parse_problem(text)); };
  EXPECT_EQ(canonical("2d b1 g1 c64>64 i1024x1024 t3 s1 p0 op0 d1 f32 contiguous forward fp32"),
            "2d c64>64 i1024x1024 t3x3");
  EXPECT_EQ(canonical("  3d\tb4 g4 c32>32 i32x64x128 t3 s2x2x2 p1 op1x0x1 bf16 channels_last grad_input"),
            "3d b4 g4 c32>32 i32x64x128 t3x3x3 s2 p1 op1x0x1 bf16 channels_last grad_input");
  EXPECT_EQ(canonical("1d c3>2 i7 t2 tf32 grad_weight"), "1d c3>2 i7 t2 grad_weight tf32");
}

TEST(Problem, StringRoundTripsForRandomProblems) {
  std::mt19937 random(7);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  int valid = 0;
  std::set<std::size_t> hashes;
  std::set<std::string> strings;
  for (int i = 0; i < 5000; ++i) {
    Problem p;
    p.rank = static_cast<int>(draw(1, 3));
    p.batch = draw(0, 3);
    p.groups = draw(1, 3);
    p.in_channels = p.groups * draw(1, 4);
    p.out_channels = p.groups * draw(1, 4);
    for (int dim = 3 - p.rank; dim < 3; ++dim) {
      p.input[dim] = draw(1, 9);
      p.kernel[dim] = draw(1, 5);
      p.stride[dim] = draw(1, 4);
      p.padding[dim] = draw(0, 3);
      p.dilation[dim] = draw(1, 3);
      p.output_padding[dim] = draw(0, std::max(p.stride[dim], p.dilation[dim]) - 1);
    }
    p.dtype = static_cast<DType>(draw(0, 3));
    p.layout = static_cast<Layout>(draw(0, 1));
    p.direction = static_cast<Direction>(draw(0, 4));
    p.precision = static_cast<Precision>(draw(0, 1));
    try {
      validate(p);
    } catch (const std::invalid_argument&) {
      continue;
    }
    ++valid;
    EXPECT_EQ(parse_problem(to_string(p)), p) << to_string(p);
    strings.insert(to_string(p));
    hashes.insert(hash_value(p));
  }
  EXPECT_GT(valid, 2000);
  EXPECT_EQ(hashes.size(), strings.size()) << "two different problems with the same hash";
}

TEST(Problem, RefusesWhatPyTorchRefuses) {
  EXPECT_CONTAINS(refusal("2d c2>2 i4x4 t3 s0"), "stride must be greater than zero, got stride=(0, 0)");
  EXPECT_CONTAINS(refusal("2d c2>2 i4x4 t3 d1x0"), "dilation must be greater than zero, got dilation=(1, 0)");
  EXPECT_CONTAINS(refusal("2d c2>2 i4x4 t0x3"), "kernel_size must be greater than zero, got kernel_size=(0, 3)");
  EXPECT_CONTAINS(refusal("2d c2>2 i4x4 t3 p-1"), "padding must not be negative, got padding=(-1, -1)");
  EXPECT_CONTAINS(refusal("1d c2>2 i4 t3 s2 op-1"), "output_padding must not be negative, got output_padding=-1");
  EXPECT_CONTAINS(refusal("2d c2>2 i4x4 t3 op1"), "output_padding must be smaller than either stride or dilation");
  EXPECT_CONTAINS(refusal("2d g0 c2>2 i4x4 t3"), "groups=0");
  EXPECT_CONTAINS(refusal("2d g3 c4>6 i4x4 t3"), "in_channels must be divisible by groups, got in_channels=4");
  EXPECT_CONTAINS(refusal("2d g3 c6>4 i4x4 t3"), "out_channels must be divisible by groups, got out_channels=4");
  EXPECT_CONTAINS(refusal("2d c0>2 i4x4 t3"), "in_channels=0");
  EXPECT_CONTAINS(refusal("2d c2>0 i4x4 t3"), "out_channels=0");
  EXPECT_CONTAINS(refusal("2d b-1 c2>2 i4x4 t3"), "batch=-1");
  EXPECT_CONTAINS(refusal("2d c2>2 i0x4 t3"), "input size=(0, 4)");
  EXPECT_CONTAINS(
      refusal("2d c2>2 i4x1 t2 p0x1"),
      "Given input size per channel: (4, 1). Calculated output size per channel: (5, 0). Output size is too small");
}

TEST(Problem, AcceptsWhatPyTorchAccepts) {
  // output_padding only has to be below one of the two, in each dimension by itself.
  EXPECT_EQ(output_size(parse_problem("2d c2>2 i4x4 t3 s1x2 d2x1 op1")), (Dims{1, 9, 10}));
  EXPECT_EQ(output_size(parse_problem("2d b0 c2>2 i0x4 t3")), (Dims{1, 2, 6}));
  EXPECT_EQ(output_elements(parse_problem("2d b0 c2>2 i1x1 t2 p1")), 0);
  EXPECT_CONTAINS(refusal("2d b0 c2>2 i1x1 t1 p1"), "Output size is too small");
}

TEST(Problem, RefusesSizesThatOverflow) {
  EXPECT_CONTAINS(refusal("3d b1000000 c1000000>1 i1000000x1000000x1000000 t1"), "2^60 elements");
  EXPECT_CONTAINS(refusal("1d c1>1 i1000000000000 t1 s1000000000000"), "2^60");
  EXPECT_CONTAINS(refusal("1d c1>1 i9223372036854775807 t1"), "at most");
  EXPECT_CONTAINS(refusal("1d c1>1 i99223372036854775807 t1"), "cannot read");
}

TEST(Problem, NamesTheFieldThatItCannotRead) {
  EXPECT_CONTAINS(refusal("4d c1>1 i1 t1"), "`4d`; expected 1d, 2d or 3d first");
  EXPECT_CONTAINS(refusal("2d c1>1 i1x1 t1 q3"), "`q3`");
  EXPECT_CONTAINS(refusal("2d c1:1 i1x1 t1"), "`c1:1`; expected c<in_channels>><out_channels>");
  EXPECT_CONTAINS(refusal("3d c1>1 i2x2 t1"), "one number, or one per dimension");
  EXPECT_CONTAINS(refusal("2d c1>1 i1x1x1x1 t1"), "`i1x1x1x1`");
  EXPECT_CONTAINS(refusal("2d c1>1 i1x1 t"), "`t`");
  EXPECT_CONTAINS(refusal("2d i1x1 t1"), "needs at least rank, channels");
  EXPECT_CONTAINS(refusal(""), "needs at least rank, channels");
}

TEST(Problem, RejectsUnusedDimensionsThatAreSet) {
  Problem p = parse_problem("1d c2>2 i4 t3");
  p.stride[0] = 2;
  EXPECT_THROW(validate(p), std::invalid_argument);
}

TEST(Problem, CountsProductsThatLandOnAnOutput) {
  // By brute force over every (i, t) of one dimension; the other dimensions multiply.
  for (const char* text :
       {"1d b2 g2 c4>6 i7 t5 s3 p4 d2 op1", "1d c1>1 i1 t1", "1d c3>2 i9 t7 s1 p6", "1d c1>1 i4 t2 s5"}) {
    const Problem p = parse_problem(text);
    const std::int64_t size = output_size(p)[2];
    double pairs = 0;
    for (std::int64_t i = 0; i < p.input[2]; ++i) {
      for (std::int64_t t = 0; t < p.kernel[2]; ++t) {
        const std::int64_t o = p.stride[2] * i + p.dilation[2] * t - p.padding[2];
        pairs += o >= 0 && o < size;
      }
    }
    EXPECT_EQ(useful_flops(p), 2 * pairs * double(p.batch * p.in_channels * (p.out_channels / p.groups))) << text;
  }
  // kernelbench 57: 618.475 GFLOP, 4.3035 GB in fp32
  const Problem s1 = parse_problem("2d b8 c64>64 i1024x1024 t3x3");
  EXPECT_NEAR(useful_flops(s1) * 1e-9, 618.475, 0.001);
  EXPECT_NEAR(minimum_bytes(s1) * 1e-9, 4.3035, 0.0001);
}

}  // namespace
}  // namespace tconv
