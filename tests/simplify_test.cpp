// Each rewrite, and that none of them changes a result: the reference on the stated problem against the reference on
// the simpler one, over the same memory.
// SPDX-License-Identifier: Apache-2.0
#include "simplify.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernel.h"

namespace tconv {
namespace {

std::string simplified(std::string_view text) {
  const auto [problem, epilogue] = parse_problem_and_epilogue(text);
  return to_string(simplify(problem, epilogue));
}

TEST(Simplify, DropsParametersThatMeetNothing) {
  EXPECT_EQ(simplified("2d c2>3 i5x5 t1x3 d4x1"), "2d c2>3 i5x5 t1x3");
  EXPECT_EQ(simplified("2d c2>3 i1x5 t3 s7 op2"), "2d c2>3 i1x5 t3x3 s1x7 op2");
  EXPECT_EQ(simplified("1d c2>3 i5 t3 bf16 tf32"), "1d c2>3 i5 t3 bf16");
  EXPECT_EQ(simplified("1d c2>3 i5 t3 tf32"), "1d c2>3 i5 t3 tf32");
}

TEST(Simplify, MergesPointwiseDimensions) {
  EXPECT_EQ(simplified("3d b2 c2>3 i4x5x6 t1"), "1d b2 c2>3 i120 t1");
  EXPECT_EQ(simplified("3d b2 c2>3 i4x5x6 t1x1x3 p0x0x1"), "2d b2 c2>3 i20x6 t1x3 p0x1");
  EXPECT_EQ(simplified("3d b2 c2>3 i4x5x6 t3x1x1 p1x0x0"), "2d b2 c2>3 i4x30 t3x1 p1x0");
  EXPECT_EQ(simplified("3d b2 c2>3 i4x1x6 t3x1x3"), "2d b2 c2>3 i4x6 t3x3");
  EXPECT_EQ(simplified("2d b2 c2>3 i4x1 t3x1"), "1d b2 c2>3 i4 t3");
  EXPECT_EQ(simplified("3d b2 c2>3 i4x1x6 t1"), "1d b2 c2>3 i24 t1");
  // Not pointwise: padding crops, stride spreads.
  EXPECT_EQ(simplified("2d c2>3 i4x5 t1 p1"), "2d c2>3 i4x5 t1x1 p1");
  EXPECT_EQ(simplified("2d c2>3 i4x5 t1 s2"), "2d c2>3 i4x5 t1x1 s2");
}

TEST(Simplify, MovesLeadingPositionsIntoTheBatchOfChannelsLast) {
  EXPECT_EQ(simplified("2d b2 c2>3 i4x5 t1x3 channels_last"), "1d b8 c2>3 i5 t3 channels_last");
  EXPECT_EQ(simplified("2d b2 c2>3 i4x5 t1x3 channels_last | layer_norm"), "1d b8 c2>3 i5 t3 channels_last");
  // Statistics of one sample must stay together.
  EXPECT_EQ(simplified("2d b2 c2>3 i4x5 t1x3 channels_last | group_norm(1)"), "2d b2 c2>3 i4x5 t1x3 channels_last");
  EXPECT_EQ(simplified("2d b2 c2>3 i4x5 t1x3"), "2d b2 c2>3 i4x5 t1x3");
}

TEST(Simplify, PrefersContiguousWhereTheLayoutsAgree) {
  EXPECT_EQ(simplified("2d b2 c1>1 i4x5 t3 channels_last"), "2d b2 c1>1 i4x5 t3x3");
  EXPECT_EQ(simplified("2d b2 c4>6 i1x1 t1 channels_last"), "1d b2 c4>6 i1 t1");
  EXPECT_EQ(simplified("2d b2 c4>6 i1x1 t3 channels_last"), "2d b2 c4>6 i1x1 t3x3 channels_last");
}

TEST(Simplify, AnEpilogueNeedsNoConvolution) {
  EXPECT_EQ(simplified("2d b2 g2 c4>6 i4x5 t3 s2 tf32 epilogue | gelu"), "1d b2 c6>6 i99 t1 epilogue");
}

TEST(Simplify, IsIdempotent) {
  for (const char* text :
       {"3d b2 c2>3 i4x5x6 t1x1x3", "2d b2 c2>3 i4x5 t1x3 channels_last", "3d c2>2 i1x1x1 t3 s2 p1 op1"}) {
    const Problem once = simplify(parse_problem(text), {});
    EXPECT_EQ(simplify(once, {}), once) << text;
  }
}

std::vector<double> run_reference(const Problem& problem, const Epilogue& epilogue, std::size_t elements) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto fill = [&](std::int64_t count) {
    std::vector<double> values(static_cast<std::size_t>(count));
    for (double& value : values) value = uniform(random);
    return values;
  };
  const std::int64_t outputs = output_elements(problem);
  const bool chain = problem.direction == Direction::epilogue;
  const auto input = fill(chain ? outputs : input_elements(problem));
  const auto grad_output = fill(outputs);
  const auto bias = fill(problem.out_channels), first = fill(problem.out_channels), second = fill(problem.out_channels);
  const auto weight = fill(weight_elements(problem));
  std::vector<double> output(elements, std::nan(""));
  Tensors tensors;
  tensors.input = input.data();
  tensors.grad_output = grad_output.data();
  tensors.weight = weight.data();
  tensors.bias = bias.data();
  tensors.operands[0] = first.data();
  tensors.operands[1] = second.data();
  tensors.output = output.data();
  Step step;
  step.kernel = kernels(Backend::cpu).back();
  step.problem = problem;
  step.epilogue = epilogue;
  step.device = cpu_device();
  step.kernel->launch(step, tensors, {});
  return output;
}

TEST(Simplify, KeepsEveryResult) {
  std::mt19937 random(11);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  const char* chains[] = {"", "bias", "bias group_norm(1,affine)", "layer_norm(affine) relu",
                          "add_channel gelu scale_channel"};
  int changed = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    Problem p;
    p.rank = static_cast<int>(draw(1, 3));
    p.batch = draw(1, 3);
    p.groups = draw(1, 2);
    p.in_channels = p.groups * draw(1, 2);
    p.out_channels = p.groups * draw(1, 2);
    for (int dim = 3 - p.rank; dim < 3; ++dim) {
      p.input[dim] = draw(0, 1) ? draw(1, 4) : 1;
      if (draw(0, 1)) continue;  // pointwise
      p.kernel[dim] = draw(1, 3);
      p.stride[dim] = draw(1, 3);
      p.padding[dim] = draw(0, 1);
      p.dilation[dim] = draw(1, 2);
      p.output_padding[dim] = draw(0, std::max(p.stride[dim], p.dilation[dim]) - 1);
    }
    p.dtype = DType::f64;
    p.layout = static_cast<Layout>(draw(0, 1));
    p.direction = static_cast<Direction>(draw(0, 3));
    const bool fuses = p.direction == Direction::forward || p.direction == Direction::epilogue;
    const Epilogue epilogue = parse_epilogue(chains[fuses ? draw(0, 4) : 0]);
    try {
      validate(p);
    } catch (const std::invalid_argument&) {
      continue;
    }
    const Problem simple = simplify(p, epilogue);
    changed += simple != p;
    const std::int64_t elements = p.direction == Direction::grad_input    ? input_elements(p)
                                  : p.direction == Direction::grad_weight ? weight_elements(p)
                                                                          : output_elements(p);
    const auto stated = run_reference(p, epilogue, static_cast<std::size_t>(elements));
    const auto simpler = run_reference(simple, epilogue, static_cast<std::size_t>(elements));
    for (std::size_t i = 0; i < stated.size(); ++i) {
      // Statistics of few values amplify the last bits by up to 1 / sqrt(eps).
      ASSERT_NEAR(stated[i], simpler[i], 1e-10) << to_string(p, epilogue) << "\n"
                                                << to_string(simple, epilogue) << "\nat " << i;
    }
  }
  EXPECT_GT(changed, 500);
}

}  // namespace
}  // namespace tconv
