// Every registered CPU kernel and config on every problem that it fits, against the reference; where there is a device,
// the CUDA kernels that plans choose, or all with TCONV_EVERY_CONFIG=1. Problems are reduced to a size that the
// reference can afford; kernels are specialised on neither batch nor spatial sizes. A failure prints the line that
// shows it again.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <random>
#include <stdexcept>

#include "check.h"

namespace tconv::bench {
namespace {

constexpr double kMaxProducts = 1e6;
constexpr int kShards = 8;

std::uint64_t seed_of_this_run() {
  const char* seed = std::getenv("TCONV_SEED");  // TCONV_SEED=7 repeats a run with other data and other problems
  return seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1;
}

class Kernels : public testing::TestWithParam<int> {};

void check_all(const Device& device, int shard) {
  std::ifstream file(TCONV_TESTS_DIR "/problems.txt");
  ASSERT_TRUE(file);
  CheckOptions options;
  options.max_products = kMaxProducts;
  options.seed = seed_of_this_run();
  // Every config of every CUDA kernel is 15 000 compilations; by default, those that plans choose.
  options.chosen = device.backend == Backend::cuda && std::getenv("TCONV_EVERY_CONFIG") == nullptr;
  int number = 0;
  std::size_t checked = 0;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(' ') == std::string::npos || number++ % kShards != shard) continue;
    const auto [problem, epilogue] = parse_problem_and_epilogue(line);
    const auto results = check(problem, epilogue, device, options);
    checked += results.size();
    for (const CheckResult& result : results) EXPECT_EQ(result.failure, "") << result.kernel << " for " << line;
  }
  EXPECT_GT(checked, 10u);
}

TEST_P(Kernels, MatchTheReferenceOnTheCpu) { check_all(cpu_device(), GetParam()); }

TEST_P(Kernels, MatchTheReferenceOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  check_all(cuda_device(0), GetParam());
}

INSTANTIATE_TEST_SUITE_P(Shard, Kernels, testing::Range(0, kShards));

// A valid problem with every parameter drawn at random.
Problem random_problem(std::mt19937_64& random) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  for (;;) {
    Problem p;
    p.rank = static_cast<int>(draw(1, 3));
    p.batch = draw(1, 3);
    p.groups = draw(0, 2) > 0 ? 1 : draw(2, 5);
    p.in_channels = p.groups * (draw(0, 4) > 0 ? draw(1, 9) : draw(10, 40));
    p.out_channels = p.groups * (draw(0, 4) > 0 ? draw(1, 9) : draw(10, 40));
    for (int dim = 3 - p.rank; dim < 3; ++dim) {
      p.input[dim] = draw(1, p.rank == 1 ? 70 : p.rank == 2 ? 13 : 6);
      p.kernel[dim] = draw(1, p.rank == 1 ? 12 : 5);
      p.stride[dim] = draw(0, 1) ? draw(1, 2) : draw(1, 5);
      p.dilation[dim] = draw(0, 1) ? 1 : draw(1, 4);
      p.padding[dim] = draw(0, static_cast<int>(p.dilation[dim] * (p.kernel[dim] - 1) + 1));
      p.output_padding[dim] = draw(0, static_cast<int>(std::max(p.stride[dim], p.dilation[dim])) - 1);
    }
    p.dtype = static_cast<DType>(draw(0, 3));
    p.layout = static_cast<Layout>(draw(0, 1));
    p.direction = static_cast<Direction>(draw(0, 2));
    p.precision = static_cast<Precision>(draw(0, 1));
    try {
      validate(p);
      return p;
    } catch (const std::invalid_argument&) {  // no output, or too much padding: draw again
    }
  }
}

void check_random(const Device& device, int count, bool non_finite) {
  std::mt19937_64 random(seed_of_this_run());
  for (int i = 0; i < count; ++i) {
    const Problem problem = random_problem(random);
    Epilogue epilogue;
    // A bias does not change what an infinity or a NaN becomes.
    epilogue.bias = problem.direction == Direction::forward && i % 2 == 0;
    CheckOptions options;
    options.seed = random();
    options.non_finite = non_finite;
    options.chosen = device.backend == Backend::cuda && std::getenv("TCONV_EVERY_CONFIG") == nullptr;
    for (const CheckResult& result : check(problem, epilogue, device, options)) EXPECT_EQ(result.failure, "");
  }
}

TEST(RandomProblems, MatchTheReferenceOnTheCpu) { check_random(cpu_device(), 500, false); }

// A tap outside the input contributes nothing, not zero times infinity; and nothing hides a NaN.
TEST(RandomProblems, InfinitiesAndNaNsStayWhereTheyBelongOnTheCpu) { check_random(cpu_device(), 300, true); }

TEST(RandomProblems, MatchTheReferenceOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  check_random(cuda_device(0), 100, false);
}

// Small problems fit the caches, so that nothing is cut into slabs of channels, and one tile holds a sample; here they do not.
TEST(SmallCaches, SlabsAndTilesMatchTheReference) {
  Device device = cpu_device();
  device.l2_bytes = 16 << 10;
  for (const char* text : {
           "1d b3 c64>48 i37 t16 s8 p4",
           "1d c70>33 i150 t7 s3 p2 d2",
           "1d b2 g2 c132>50 i21 t5 s2 f64",
           "2d b2 c65>40 i9x11 t4x4 s2 p1",
           "2d b3 c67>21 i5x7 t3x3 p1 channels_last",
           "3d b2 c64>24 i3x4x5 t3x2x3 s2 p1",
           "1d b5 c96>64 i9 t16 s8 p4 bf16",
           "2d b2 c64>40 i7x6 t3x3 s1x2 f16 channels_last",
           // The bias's sums belong to one tile each, and to none where rows are never read or lie behind the last tap.
           "2d b2 c8>12 i9x150 t4x4 s2 p1",
           "3d b2 g2 c16>16 i5x6x40 t3x3x3 s2 p1 bf16",
           "2d b2 c12>20 i7x13 t3x3 s3 p2 op1",
           "2d b2 c12>20 i7x40 t3x3 s3 p1 op2",
           "2d b2 c16>9 i6x70 t2x3 s3x2 op1",
           "2d b2 c9>10 i8x39 t3x3 s2 p1 d2",
           "3d b2 g8 c8>8 i6x7x20 t5x5x5 s2 p2",
           "1d b3 c40>36 i300 t5 s2 p1 f64",
       })
    for (const char* direction : {" grad_input", " grad_weight"})
      for (bool non_finite : {false, true}) {
        CheckOptions options;
        options.seed = seed_of_this_run();
        options.non_finite = non_finite;
        const Problem problem = parse_problem(std::string(text) + direction);
        for (const CheckResult& result : check(problem, {}, device, options)) EXPECT_EQ(result.failure, "");
      }
}

// Products of matrices take 16 positions by up to 16 pairs of channels by 16 results, two or four times: what is left over
// in each of these directions, rows that are not a step apart, weights in several parts.
TEST(Matrices, WhatIsLeftOverMatchesTheReference) {
  for (const char* text : {
           "2d c32>16 i5x7 t3x3 bf16 channels_last",
           "2d b2 c24>40 i9x17 t3x3 s2 p1 bf16 channels_last",
           "2d c40>16 i40x3 t3x3 bf16 channels_last",
           "2d b3 g2 c64>160 i4x4 t2x2 s2 bf16 channels_last",
           "1d c1200>64 i37 t3 s2 bf16 channels_last",
           "1d c64>1200 i67 t3 bf16 channels_last",
           "3d c32>48 i3x5x18 t3x3x3 s2 p1 op1 bf16 channels_last",
           "2d b5 c32>12 i3x3 t3x3 bf16 channels_last",
           "2d b2 c4>32 i9x20 t1x8 bf16 channels_last",
           "2d b2 c32>32 i8x16 t2x2 s2 bf16 channels_last",
           "2d c34>16 i9x9 t3x3 bf16 channels_last",
           "2d b2 c32>32 i6x35 t3x3 s1x3 p1 d2 bf16 channels_last",
       })
    for (const char* chain : {"", "bias gelu"})
      for (const char* direction : {"", " grad_input"})
        for (bool non_finite : {false, true}) {
          if (*chain != '\0' && *direction != '\0') continue;
          CheckOptions options;
          options.seed = seed_of_this_run();
          options.non_finite = non_finite;
          const Problem problem = parse_problem(std::string(text) + direction);
          for (const CheckResult& result : check(problem, parse_epilogue(chain), cpu_device(), options))
            EXPECT_EQ(result.failure, "");
        }
}

// A reduced problem keeps what kernels are specialised on.
TEST(Reduced, KeepsTheLayer) {
  const Problem large = parse_problem("3d b4 g4 c32>32 i32x64x128 t3 s2 p1 op1 bf16 channels_last grad_weight");
  const Problem small = reduced(large, kMaxProducts);
  EXPECT_LE(useful_flops(small) / 2, kMaxProducts);
  EXPECT_NO_THROW(validate(small));
  Problem same = large;
  same.batch = small.batch;
  same.input = small.input;
  EXPECT_EQ(same, small);
  const Problem tiny = parse_problem("1d c2>2 i4 t3");
  EXPECT_EQ(reduced(tiny, kMaxProducts), tiny);
}

}  // namespace
}  // namespace tconv::bench
