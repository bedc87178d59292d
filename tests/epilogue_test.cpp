// Names, slots, checks and the string of a fused chain.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/epilogue.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace tconv {
namespace {

const Problem kProblem = parse_problem("2d b2 c6>8 i5x7 t3 s2 p1");

std::string refusal(std::string_view chain, std::string_view problem = "2d b2 c6>8 i5x7 t3 s2 p1") {
  try {
    validate(parse_epilogue(chain), parse_problem(problem));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

#define EXPECT_CONTAINS(text, part) EXPECT_NE((text).find(part), std::string::npos) << "in: " << (text)

TEST(Epilogue, StringRoundTrips) {
  for (const char* text :
       {"", "bias", "gelu", "bias gelu group_norm(8,eps=1e-05,affine)", "pre:leaky_relu(0.1) pre:relu bias scale(2)",
        "layer_norm(eps=1e-06) gelu", "batch_norm(eps=0.001,affine) relu add_tensor", "clamp(-0.5,0.75)",
        "clamp(-inf,0)", "bias add(0.3333333333333333) operands:f32 out:f16 save"}) {
    EXPECT_EQ(to_string(parse_epilogue(text)), text);
  }
}

TEST(Epilogue, EveryOperationOfTheListPrintsAndParses) {
  int count = 0;
  for (const std::string_view name : {
#define POINTWISE(name, ...) std::string_view(#name),
#define NORM(name, ...) std::string_view(#name),
#include "tconv/epilogue.def"
       }) {
    const std::optional<OpKind> kind = find_op(name);
    ASSERT_TRUE(kind) << name;
    EXPECT_EQ(to_string(*kind), name);
    Epilogue epilogue;
    epilogue.ops.push_back({*kind, 0.1, num_scalars(*kind) > 1 ? 0.7 : 0, 0, false});
    if (num_scalars(*kind) == 0 && !is_norm(*kind)) epilogue.ops[0].a = 0;
    if (*kind == OpKind::group_norm) epilogue.ops[0].num_groups = 4;
    EXPECT_EQ(parse_epilogue(to_string(epilogue)), epilogue) << name;
    ++count;
  }
  EXPECT_GT(count, 20);
  EXPECT_FALSE(find_op("norm"));
}

TEST(Epilogue, DefaultsOfNormalisations) {
  const Epilogue epilogue = parse_epilogue("group_norm(8)");
  EXPECT_EQ(epilogue.ops[0].a, 1e-5);
  EXPECT_FALSE(epilogue.ops[0].affine);
  EXPECT_EQ(to_string(epilogue), "group_norm(8,eps=1e-05)");
  EXPECT_EQ(to_string(parse_epilogue("layer_norm")), "layer_norm(eps=1e-05)");
}

TEST(Epilogue, CountsOperandSlots) {
  const Epilogue epilogue = parse_epilogue("bias prelu batch_norm(affine) add_tensor relu scale_channel");
  EXPECT_EQ(num_operands(epilogue), 1 + 4 + 1 + 0 + 1);
  EXPECT_EQ(operand_offset(epilogue, 0), 0);
  EXPECT_EQ(operand_offset(epilogue, 1), 1);
  EXPECT_EQ(operand_offset(epilogue, 2), 5);
  EXPECT_EQ(operand_offset(epilogue, 4), 6);
  EXPECT_EQ(norm_index(epilogue), 1);
  EXPECT_EQ(norm_index(parse_epilogue("bias relu")), -1);
  EXPECT_EQ(num_operands(parse_epilogue("group_norm(2)")), 0);
  EXPECT_EQ(num_operands(parse_epilogue("batch_norm")), 2);
}

TEST(Epilogue, CountsStatistics) {
  const std::int64_t positions = volume(output_size(kProblem));
  EXPECT_EQ(num_statistics(kProblem, parse_epilogue("group_norm(4)")), 2 * 4);
  EXPECT_EQ(num_statistics(kProblem, parse_epilogue("layer_norm")), 2 * positions);
  EXPECT_EQ(num_statistics(kProblem, parse_epilogue("batch_norm")), 0);
  EXPECT_EQ(num_statistics(kProblem, parse_epilogue("relu")), 0);
}

TEST(Epilogue, ReachSaysWhatMustBeSeenWhole) {
  EXPECT_EQ(reach(OpKind::gelu), Reach::element);
  EXPECT_EQ(reach(OpKind::add_tensor), Reach::element);
  EXPECT_EQ(reach(OpKind::batch_norm), Reach::element);
  EXPECT_EQ(reach(OpKind::layer_norm), Reach::channels);
  EXPECT_EQ(reach(OpKind::group_norm), Reach::group_positions);
}

TEST(Epilogue, RefusesWhatTheGrammarForbids) {
  EXPECT_EQ(refusal("pre:relu bias gelu group_norm(8,affine) relu"), "");
  EXPECT_CONTAINS(refusal("layer_norm relu group_norm(2)"), "one normalisation, got a second: group_norm(2");
  EXPECT_CONTAINS(refusal("pre:layer_norm"),
                  "pre must consist of pointwise operations without operands, got layer_norm");
  EXPECT_CONTAINS(refusal("pre:prelu"), "got prelu");
  EXPECT_CONTAINS(refusal("group_norm(3)"), "num_groups=3 and 8 channels");
  EXPECT_CONTAINS(refusal("group_norm(0)"), "num_groups=0");
  EXPECT_CONTAINS(refusal("group_norm"), "needs its number of groups");
  EXPECT_CONTAINS(refusal("leaky_relu"), "leaky_relu takes 1 number(s)");
  EXPECT_CONTAINS(refusal("relu(1)"), "relu takes 0 number(s)");
  EXPECT_CONTAINS(refusal("scale(x)"), "`x` is not a number");
  EXPECT_CONTAINS(refusal("scale(1"), "closing parenthesis");
  EXPECT_CONTAINS(refusal("softmax"), "no operation is named `softmax`; known: relu");
  EXPECT_CONTAINS(refusal("relu bias"), "bias comes once, before the operations");
  EXPECT_CONTAINS(refusal("out:f8"), "known dtypes");
  std::string many;
  for (int i = 0; i < 17; ++i) many += "add_channel ";
  EXPECT_CONTAINS(refusal(many), "at most 16 operands, got 17");
  EXPECT_CONTAINS(refusal("relu", "2d c2>2 i3x3 t3 grad_input"), "direction grad_input takes no epilogue");
  EXPECT_CONTAINS(refusal("pre:relu", "2d c2>2 i3x3 t3 grad_input"), "takes no pre-activation");
  EXPECT_CONTAINS(refusal("bias relu", "2d c2>2 i3x3 t3 grad_epilogue"), "takes no bias");
  EXPECT_EQ(refusal("pre:relu", "2d c2>2 i3x3 t3 grad_weight"), "");
}

TEST(Epilogue, HashAndEqualityFollowEveryField) {
  const std::string base = "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05,affine) scale(2)";
  const Epilogue reference = parse_epilogue(base);
  EXPECT_EQ(hash_value(reference), hash_value(parse_epilogue(base)));
  for (const char* other : {"pre:leaky_relu(0.2) bias gelu group_norm(8,eps=1e-05,affine) scale(2)",
                            "bias gelu group_norm(8,eps=1e-05,affine) scale(2)",
                            "pre:leaky_relu(0.1) gelu group_norm(8,eps=1e-05,affine) scale(2)",
                            "pre:leaky_relu(0.1) bias silu group_norm(8,eps=1e-05,affine) scale(2)",
                            "pre:leaky_relu(0.1) bias gelu group_norm(4,eps=1e-05,affine) scale(2)",
                            "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-06,affine) scale(2)",
                            "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05) scale(2)",
                            "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05,affine) scale(2) save",
                            "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05,affine) scale(2) out:f32",
                            "pre:leaky_relu(0.1) bias gelu group_norm(8,eps=1e-05,affine) scale(2) operands:f32"}) {
    EXPECT_NE(reference, parse_epilogue(other));
    EXPECT_NE(hash_value(reference), hash_value(parse_epilogue(other))) << other;
  }
}

TEST(Epilogue, WholeLineRoundTrips) {
  const auto [problem, epilogue] = parse_problem_and_epilogue("2d c6>8 i5x7 t3x3 s2 p1 bf16 | bias gelu");
  EXPECT_EQ(to_string(problem, epilogue), "2d c6>8 i5x7 t3x3 s2 p1 bf16 | bias gelu");
  EXPECT_EQ(to_string(problem, {}), "2d c6>8 i5x7 t3x3 s2 p1 bf16");
  EXPECT_THROW(parse_problem_and_epilogue("2d c6>8 i5x7 t3x3 | group_norm(3)"), std::invalid_argument);
}

}  // namespace
}  // namespace tconv
