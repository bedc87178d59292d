// Every registered CPU kernel and config on every problem that it fits, against the reference; and CUDA's where there
// is a device. Problems are reduced to a size that the reference can afford; kernels are specialised on neither batch
// nor spatial sizes. A failure prints the line that shows it again. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>

#include "check.h"

namespace tconv::bench {
namespace {

constexpr double kMaxProducts = 1e6;
constexpr int kShards = 8;

class Kernels : public testing::TestWithParam<int> {};

void check_all(const Device& device, int shard) {
  std::ifstream file(TCONV_TESTS_DIR "/problems.txt");
  ASSERT_TRUE(file);
  CheckOptions options;
  options.max_products = kMaxProducts;
  // TCONV_SEED=7 repeats a run with other data.
  const char* seed = std::getenv("TCONV_SEED");
  options.seed = seed != nullptr ? std::strtoull(seed, nullptr, 10) : 1;
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
