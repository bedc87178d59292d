// cpu_test.cpp — the thread pool, the rows' dtypes, and values that are not finite.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/element.h"
#include "cpu/parallel.h"
#include "kernel.h"

namespace tconv {
namespace {

TEST(Parallel, RunsEveryItemOnce) {
  for (int threads : {1, 2, 5}) {
    std::vector<std::atomic<int>> runs(1000);
    cpu::parallel_for(1000, threads, [&](std::int64_t item) { ++runs[static_cast<std::size_t>(item)]; });
    for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
  }
}

TEST(Parallel, NestsAndServesSeveralCallers) {
  std::atomic<int> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 200; ++repeat)
        cpu::parallel_for(8, 3, [&](std::int64_t) { cpu::parallel_for(4, 3, [&](std::int64_t) { ++total; }); });
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 4 * 200 * 8 * 4);
}

TEST(Parallel, PassesExceptionsOnAndStaysUsable) {
  auto fail = [](std::int64_t item) {
    if (item == 5) throw std::runtime_error("item 5");
  };
  EXPECT_THROW(cpu::parallel_for(50, 2, fail), std::runtime_error);
  std::atomic<int> total{0};
  cpu::parallel_for(50, 2, [&](std::int64_t) { ++total; });
  EXPECT_EQ(total.load(), 50);
}

TEST(Parallel, WorksInAForkedChild) {
  std::atomic<int> before{0};
  cpu::parallel_for(50, 2, [&](std::int64_t) { ++before; });
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int> total{0};
    cpu::parallel_for(50, 2, [&](std::int64_t) { ++total; });
    _exit(total.load() == 50 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(Element, SixteenBitNumbersSurviveTheRoundTrip) {
  for (DType dtype : {DType::f16, DType::bf16})
    for (int bits = 0; bits < 65536; ++bits) {
      double from[1] = {}, to[1] = {};  // room for an element of any dtype
      std::memcpy(from, &bits, 2);
      const double value = cpu::load_element(from, dtype, 0);
      cpu::store_element(to, dtype, 0, value);
      if (std::isnan(value))
        EXPECT_TRUE(std::isnan(cpu::load_element(to, dtype, 0)));
      else
        ASSERT_EQ(std::memcmp(from, to, 2), 0) << bits;
    }
}

// Padding times infinity must not be NaN: every kernel agrees with the reference about which results are finite.
TEST(Kernels, ZerosOutsideAreNotMultiplied) {
  for (const char* text :
       {"2d b2 c5>6 i6x7 t3x3 s2 p1", "2d b2 c5>6 i6x7 t3x3 s2 p1 channels_last grad_input",
        "2d b2 c5>6 i6x7 t3x3 p1 grad_weight", "1d g4 c4>8 i9 t4 s3 p1 f64 grad_weight",
        "2d b2 c3>5 i6x7 t3x3 s2 p1 bf16 channels_last", "2d b2 c5>1 i6x7 t5x5 s2 p2 bf16 channels_last grad_input",
        "2d b2 g5 c5>5 i6x7 t3x3 s2 p1 channels_last grad_weight"}) {
    const Problem problem = parse_problem(text);
    const Device device = cpu_device();
    const DType dtype = problem.dtype;
    const auto elements = [&](std::int64_t count) {
      std::vector<char> data(static_cast<std::size_t>(count) * size_of(dtype));
      for (std::int64_t i = 0; i < count; ++i) cpu::store_element(data.data(), dtype, i, double(i % 7) - 3.5);
      return data;
    };
    std::vector<char> input = elements(input_elements(problem)), weight = elements(weight_elements(problem));
    std::vector<char> gradient = elements(output_elements(problem));
    const double infinity = std::numeric_limits<double>::infinity();
    cpu::store_element(input.data(), dtype, 3, infinity);
    cpu::store_element(weight.data(), dtype, 8, -infinity);
    cpu::store_element(gradient.data(), dtype, 5, infinity);
    const std::int64_t count = problem.direction == Direction::forward      ? output_elements(problem)
                               : problem.direction == Direction::grad_input ? input_elements(problem)
                                                                            : weight_elements(problem);
    const auto run = [&](const Kernel& kernel, const Fit& fit) {
      std::vector<char> result = elements(count), workspace(fit.workspace_bytes + 256);
      Step step;
      step.kernel = &kernel;
      step.problem = problem;
      step.device = device;
      if (kernel.prepare) kernel.prepare(step);
      const auto address = reinterpret_cast<std::uintptr_t>(workspace.data());
      Tensors tensors;
      tensors.input = input.data();
      tensors.weight = weight.data();
      tensors.grad_output = gradient.data();
      tensors.output = result.data();
      tensors.workspace = workspace.data() + (256 - address % 256);
      kernel.launch(step, tensors, {nullptr, 2});
      return result;
    };
    const Kernel& reference = *kernels(Backend::cpu).back();
    const std::vector<char> expected = run(reference, reference.fit(problem, {}, device, {}));
    int compared = 0;
    for (const Kernel* kernel : kernels(Backend::cpu)) {
      const Fit fit = kernel->fit(problem, {}, device, {});
      if (kernel == &reference || !fit) continue;
      ++compared;
      const std::vector<char> got = run(*kernel, fit);
      for (std::int64_t i = 0; i < count; ++i) {
        const double a = cpu::load_element(got.data(), dtype, i), b = cpu::load_element(expected.data(), dtype, i);
        if (std::isfinite(b))
          EXPECT_NEAR(a, b, 1e-3) << kernel->name << " " << text << " element " << i;
        else
          EXPECT_TRUE(std::isnan(a) == std::isnan(b) && (std::isnan(a) || a == b)) << kernel->name << " " << text;
      }
    }
    EXPECT_GT(compared, 0) << text;
  }
}

}  // namespace
}  // namespace tconv
