// Choosing, pricing, splitting into steps, caching, running — with kernels defined here, whose prices are known, and
// with the registered ones against hand-written devices. The snapshot holds every choice for the problems that matter:
//   TCONV_UPDATE_SNAPSHOT=1 planner_test --gtest_filter='Registered.*'    writes it anew
// SPDX-License-Identifier: Apache-2.0
#include "planner.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <thread>

namespace tconv {
namespace {

#define EXPECT_CONTAINS(text, part) EXPECT_NE((text).find(part), std::string::npos) << "in: " << (text)

// ---- kernels of known price; every launch is recorded ----

struct Launch {
  std::string kernel;
  Direction direction;
  std::string chain;
  Tensors tensors;
};
std::vector<Launch> launches;

void record(const Step& step, const Tensors& tensors, Stream) {
  launches.push_back({std::string(step.kernel->name), step.problem.direction, to_string(step.epilogue), tensors});
}

bool convolves(const Problem& problem) {
  return problem.direction != Direction::epilogue && problem.direction != Direction::grad_epilogue;
}

Fit refuse(std::string reason) {
  Fit fit;
  fit.refusal = std::move(reason);
  return fit;
}

// Cheap, fuses nothing, forward only; the larger tile is cheaper from 100 outputs on.
constexpr Config kPlainConfigs[] = {{16, 16, 8, 0, 0, 0}, {64, 32, 8, 3, 8, 0}};
Fit fit_plain(const Problem& problem, const Epilogue&, const Device&, const Config& config) {
  if (problem.direction != Direction::forward) return refuse("computes forward only");
  Fit fit;
  fit.microseconds = config.block_m == 64 ? 10 : output_elements(problem) > 100 ? 12 : 5;
  fit.workspace_bytes = 100;
  return fit;
}
const Kernel kPlain = {"plain", kPlainConfigs, fit_plain, nullptr, nullptr, record};

// Dearer, but applies pointwise operations and the pre-activation.
constexpr Config kOne[] = {{}};
Fit fit_fusing(const Problem& problem, const Epilogue& epilogue, const Device&, const Config&) {
  if (!convolves(problem)) return refuse("computes convolutions only");
  if (epilogue.output_dtype && *epilogue.output_dtype != problem.dtype)
    return refuse("stores the problem's dtype only");
  Fit fit;
  fit.microseconds = 20;
  fit.fused_pre = true;
  const int norm = norm_index(epilogue);
  fit.fused_ops = norm < 0 ? static_cast<int>(epilogue.ops.size()) : norm;
  return fit;
}
const Kernel kFusing = {"fusing", kOne, fit_fusing, nullptr, nullptr, record};

// The chain by itself: 7 us, and 300 bytes of workspace.
Fit fit_chain(const Problem& problem, const Epilogue&, const Device&, const Config&) {
  if (convolves(problem)) return refuse("computes epilogue and grad_epilogue only");
  Fit fit;
  fit.microseconds = 7;
  fit.workspace_bytes = 300;
  return fit;
}
const Kernel kChain = {"chain", kOne, fit_chain, nullptr, nullptr, record};

// Fits everything at a price nobody pays.
Fit fit_fallback(const Problem&, const Epilogue& epilogue, const Device&, const Config&) {
  Fit fit;
  fit.microseconds = 1e6;
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  fit.fused_pre = true;
  return fit;
}
const Kernel kFallback = {"fallback", kOne, fit_fallback, nullptr, nullptr, record};

const Kernel* const kAll[] = {&kPlain, &kFusing, &kChain, &kFallback};

Plan plan_of(std::string_view line, std::string_view only = {}) {
  const auto [problem, epilogue] = parse_problem_and_epilogue(line);
  return make_plan(problem, epilogue, known_device("cpu_avx2"), only, kAll);
}

std::string steps_of(const Plan& plan) {
  std::string text;
  for (const Step& step : plan.steps) {
    if (!text.empty()) text += " -> ";
    text += std::string(step.kernel->name) + "[" + to_string(step.epilogue) + "]";
  }
  return text;
}

const char* const kSmall = "2d b2 c4>4 i3x3 t3 s2 p1";

TEST(Planner, TakesTheCheapestConfig) {
  const Plan small = plan_of("1d c1>1 i3 t3"), large = plan_of("1d c4>4 i99 t3");
  EXPECT_EQ(small.steps.at(0).config, kPlainConfigs[0]);
  EXPECT_EQ(large.steps.at(0).config, kPlainConfigs[1]);
  EXPECT_EQ(large.microseconds, 10);
  EXPECT_EQ(large.candidates.size(), 5u);
}

TEST(Planner, PricesTheStepsThatACandidateLeavesBehind) {
  // plain 10 beats fusing 20 without a chain, ties at 10 + 7 ... and loses with two more steps: 10 + 7 + 7 > 20.
  EXPECT_EQ(steps_of(plan_of(kSmall)), "plain[]");
  EXPECT_EQ(steps_of(plan_of(std::string(kSmall) + " | relu")), "plain[] -> chain[relu]");
  const Plan plan = plan_of(std::string(kSmall) + " | pre:relu bias gelu");
  EXPECT_EQ(steps_of(plan), "fusing[pre:relu bias gelu]");
  EXPECT_EQ(plan.microseconds, 20);
  for (const Candidate& candidate : plan.candidates) {
    if (candidate.kernel == "plain") {
      EXPECT_GE(candidate.fit.microseconds, 24);
    }
  }
}

TEST(Planner, SplitsTheChainWhereTheKernelStops) {
  const Plan plan = plan_of(std::string(kSmall) + " | bias prelu layer_norm(affine) add_tensor", "fusing");
  EXPECT_EQ(steps_of(plan), "fusing[bias prelu] -> chain[layer_norm(eps=1e-05,affine) add_tensor]");
  EXPECT_EQ(plan.steps[1].first_operand, 1);
  EXPECT_EQ(plan.steps[1].problem.direction, Direction::epilogue);
  EXPECT_EQ(plan.microseconds, 27);
}

TEST(Planner, TrainingKeepsTheRawResultApart) {
  const Plan plan = plan_of(std::string(kSmall) + " | bias gelu group_norm(2) save", "fusing");
  EXPECT_EQ(steps_of(plan), "fusing[bias] -> chain[gelu group_norm(2,eps=1e-05) save]");
  EXPECT_EQ(plan.raw_offset, Plan::npos);
  // Without operations there is nothing to keep apart.
  EXPECT_EQ(plan_of(std::string(kSmall) + " | bias save").steps.size(), 1u);
}

TEST(Planner, ConvertsInTheStepThatCanStoreTheDType) {
  const Plan plan = plan_of(std::string(kSmall) + " bf16 | bias gelu out:f32", "fusing");
  EXPECT_EQ(steps_of(plan), "fusing[bias gelu] -> chain[out:f32]");
  EXPECT_NE(plan.raw_offset, Plan::npos);
  const Plan all = plan_of(std::string(kSmall) + " bf16 | bias gelu out:f32", "fallback");
  EXPECT_EQ(steps_of(all), "fallback[bias gelu out:f32]");
}

TEST(Planner, LaysOutTheWorkspace) {
  const Plan plan = plan_of(std::string(kSmall) + " bf16 | pre:relu bias layer_norm out:f32", "plain");
  EXPECT_EQ(steps_of(plan), "chain[relu] -> plain[bias] -> chain[layer_norm(eps=1e-05) out:f32]");
  EXPECT_EQ(plan.pre_step, 0);
  EXPECT_EQ(plan.conv_step, 1);
  EXPECT_EQ(plan.finish_step, 2);
  const std::size_t pre = 2 * 4 * 9 * 2, raw = 2 * 4 * 25 * 2;
  EXPECT_EQ(plan.pre_offset, 0u);
  EXPECT_EQ(plan.raw_offset, 256u);
  EXPECT_GE(plan.raw_offset, pre);
  for (const Step& step : plan.steps) {
    EXPECT_EQ(step.workspace_offset % 256, 0u);
    EXPECT_GE(step.workspace_offset, plan.raw_offset + raw);
    EXPECT_LE(step.workspace_offset + step.workspace_bytes, plan.workspace_bytes);
  }
}

TEST(Planner, RunsTheStepsOnTheRightTensors) {
  const Plan plan = plan_of(std::string(kSmall) + " | pre:relu bias prelu layer_norm(affine)", "plain");
  ASSERT_EQ(plan.steps.size(), 3u);
  alignas(256) static std::byte workspace[1 << 14];
  ASSERT_LE(plan.workspace_bytes, sizeof workspace);
  int input = 0, weight = 0, output = 0, slope = 0, scale = 0, shift = 0;
  Tensors tensors;
  tensors.input = &input;
  tensors.weight = &weight;
  tensors.output = &output;
  tensors.operands = {&slope, &scale, &shift};
  tensors.workspace = workspace;
  launches.clear();
  execute(plan, tensors);
  ASSERT_EQ(launches.size(), 3u);
  EXPECT_EQ(launches[0].tensors.input, &input);
  EXPECT_EQ(launches[0].tensors.output, workspace + plan.pre_offset);
  EXPECT_EQ(launches[1].tensors.input, workspace + plan.pre_offset);
  EXPECT_EQ(launches[1].tensors.output, &output) << "raw lives in the output when the dtypes agree";
  EXPECT_EQ(launches[1].tensors.weight, &weight);
  EXPECT_EQ(launches[2].tensors.input, &output);
  EXPECT_EQ(launches[2].tensors.output, &output);
  EXPECT_EQ(launches[2].tensors.operands[0], &slope);
  EXPECT_EQ(launches[2].tensors.operands[2], &shift);
  EXPECT_NE(launches[1].tensors.workspace, nullptr);

  const Plan split = plan_of(std::string(kSmall) + " | bias prelu layer_norm(affine) save", "fusing");
  int raw = 0;
  tensors.raw = &raw;
  launches.clear();
  execute(split, tensors);
  ASSERT_EQ(launches.size(), 2u);
  EXPECT_EQ(launches[0].tensors.output, &raw);
  EXPECT_EQ(launches[1].tensors.input, &raw);
  EXPECT_EQ(launches[1].tensors.output, &output);

  const Plan later = plan_of(std::string(kSmall) + " | bias prelu layer_norm(affine)", "fusing");
  launches.clear();
  execute(later, tensors);
  EXPECT_EQ(launches.at(1).tensors.operands[0], &scale) << "operands start at the step's first";
  EXPECT_EQ(launches.at(1).tensors.operands[1], &shift);

  tensors.workspace = nullptr;  // allowed on the CPU
  launches.clear();
  execute(plan, tensors);
  EXPECT_NE(launches.at(0).tensors.output, nullptr);
}

TEST(Planner, EmptyResultsNeedNoStep) {
  for (const char* line :
       {"2d b0 c4>4 i3x3 t3", "2d b0 c4>4 i3x3 t3 grad_input", "2d b0 c4>4 i3x3 t3 epilogue | relu"}) {
    const Plan plan = plan_of(line);
    EXPECT_TRUE(plan.steps.empty()) << line;
    execute(plan, {});
    EXPECT_CONTAINS(explain(plan), "nothing to do");
  }
  EXPECT_EQ(plan_of("2d b0 c4>4 i3x3 t3 grad_weight").steps.size(), 1u) << "zeros must be written";
}

TEST(Planner, OtherDirectionsAreOneStep) {
  EXPECT_EQ(steps_of(plan_of("2d c4>4 i3x3 t3 grad_input")), "fusing[]");
  EXPECT_EQ(steps_of(plan_of("2d c4>4 i3x3 t3 epilogue | gelu layer_norm")), "chain[gelu layer_norm(eps=1e-05)]");
  EXPECT_EQ(steps_of(plan_of("2d c4>4 i3x3 t3 grad_epilogue | gelu layer_norm")), "chain[gelu layer_norm(eps=1e-05)]");
}

TEST(Planner, OnlyRestrictsAndSaysWhyNot) {
  EXPECT_EQ(plan_of("2d c4>4 i3x3 t3", "fallback").steps.at(0).kernel, &kFallback);
  EXPECT_EQ(plan_of("2d c4>4 i3x3 t3", "plain:16x16x8").steps.at(0).config, kPlainConfigs[0]);
  EXPECT_EQ(plan_of("2d c4>4 i3x3 t3", "plain:64x32x8,s3,w8").steps.at(0).config, kPlainConfigs[1]);
  const auto refusal = [](std::string_view line, std::string_view only) -> std::string {
    try {
      plan_of(line, only);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_CONTAINS(refusal("2d c4>4 i3x3 t3 grad_input", "plain"),
                  "plain refuses `2d c4>4 i3x3 t3x3 grad_input`: computes forward only");
  EXPECT_CONTAINS(refusal("2d c4>4 i3x3 t3", "planner"),
                  "no kernel is named `planner`; known: plain fusing chain fallback");
  EXPECT_CONTAINS(refusal("2d c4>4 i3x3 t3", "plain:8x8"), "known: plain plain:16x16x8 plain:64x32x8,s3,w8");
}

TEST(Planner, ExplainNamesPricesAndRefusals) {
  const std::string text = explain(plan_of("2d c4>4 i9x9 t3"));
  EXPECT_CONTAINS(text, "chosen  plain:64x32x8,s3,w8 10.0 us");
  EXPECT_CONTAINS(text, "fits    fusing:default 20.0 us");
  EXPECT_CONTAINS(text, "refuses chain: computes epilogue and grad_epilogue only");
  EXPECT_LT(text.find("chosen"), text.find("fits"));
  EXPECT_LT(text.find("fits    fallback"), text.find("refuses"));
}

TEST(Planner, ConfigPrintsItsFields) {
  EXPECT_EQ(to_string(Config{64, 128, 32, 3, 8, 4}), "64x128x32,s3,w8,k4");
  EXPECT_EQ(to_string(Config{0, 0, 0, 0, 4, 0}), "w4");
  EXPECT_EQ(to_string(Config{}), "default");
}

TEST(Planner, ValidatesFirst) {
  Problem problem;
  problem.stride = {0, 1, 1};
  EXPECT_THROW(make_plan(problem, {}, known_device("cpu_avx2"), {}, kAll), std::invalid_argument);
  EXPECT_THROW(plan(problem, {}, cpu_device()), std::invalid_argument);
}

// ---- the cache ----

TEST(PlanCache, ReturnsTheSamePlanUntilItIsCleared) {
  clear_plan_cache();
  const auto [problem, epilogue] = parse_problem_and_epilogue("2d c3>5 i6x7 t3 s2 | bias relu");
  const auto first = plan(problem, epilogue, cpu_device());
  EXPECT_EQ(plan(problem, epilogue, cpu_device()), first);
  const auto other = plan(problem, {}, cpu_device());
  EXPECT_NE(other, first);
  EXPECT_NE(plan(problem, epilogue, cpu_device(), kernel_names(Backend::cpu).back()), first);
  clear_plan_cache();
  EXPECT_NE(plan(problem, epilogue, cpu_device()), first);
  EXPECT_EQ(first->problem, problem) << "a plan in use survives the cache";
}

TEST(Planner, PlansOfARequestAreThoseOfPlan) {
  clear_plan_cache();
  const Problem layer = parse_problem("2d b2 c8>8 i9x7 t3x3 s2");
  std::vector<PlanRequest> requests;
  for (const Direction direction : {Direction::grad_weight, Direction::grad_input, Direction::forward}) {
    Problem problem = layer;
    problem.direction = direction;
    requests.push_back({problem, {}, cpu_device(), ""});
  }
  requests.push_back({layer, parse_epilogue("relu"), known_device("h200"), ""});
  requests.push_back(requests[0]);  // asked twice
  const auto there = plan(requests[1].problem, {}, cpu_device());
  const auto made = plans(requests);
  ASSERT_EQ(made.size(), requests.size());
  EXPECT_EQ(made[1], there);
  EXPECT_EQ(made[4], made[0]);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const PlanRequest& r = requests[i];
    EXPECT_EQ(made[i]->problem, r.problem);
    EXPECT_EQ(plan(r.problem, r.epilogue, r.device, r.only), made[i]);
  }
  EXPECT_TRUE(plans({}).empty());

  // One that is refused leaves nothing behind.
  clear_plan_cache();
  requests.push_back({layer, {}, cpu_device(), "no_such_kernel"});
  EXPECT_THROW(plans(requests), std::invalid_argument);
  EXPECT_NE(plan(requests[1].problem, {}, cpu_device()), there);
}

TEST(PlanCache, IsSharedByThreads) {
  clear_plan_cache();
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 400; ++i) {
        Problem problem = parse_problem("1d c2>2 i4 t3");
        problem.input[2] = 4 + i % 20;
        const auto found = plan(problem, {}, cpu_device());
        wrong += found->problem != problem;
        if (i % 97 == 0) clear_plan_cache();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(PlanCache, AHitIsCheap) {
  const auto [problem, epilogue] =
      parse_problem_and_epilogue("2d b8 c64>64 i64x64 t3 | bias gelu group_norm(8,affine)");
  const Device device = cpu_device();
  plan(problem, epilogue, device);
  double best = 1e9;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 1000; ++i) plan(problem, epilogue, device);
    best = std::min(best,
                    std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / 1000);
  }
  RecordProperty("nanoseconds", static_cast<int>(best));
  std::printf("plan cache hit: %.0f ns\n", best);
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__)
  EXPECT_LT(best, 1500) << "300 ns on an idle machine; five times that leaves room for a busy one";
#endif
}

// ---- the registered kernels ----

constexpr const char* kDevices[] = {"h200",       "a100",     "cpu_avx512_amx", "cpu_avx512_bf16",
                                    "cpu_avx512", "cpu_avx2", "cpu_portable"};

std::vector<std::string> problems() {
  std::ifstream file(TCONV_TESTS_DIR "/problems.txt");
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(' ') != std::string::npos) lines.push_back(line);
  }
  return lines;
}

TEST(Registered, EveryProblemHasAPlanOnEveryDevice) {
  ASSERT_GT(problems().size(), 100u);
  for (const char* name : kDevices) {
    const Device device = known_device(name);
    if (kernels(device.backend).empty()) continue;
    for (const std::string& line : problems()) {
      const auto [problem, epilogue] = parse_problem_and_epilogue(line);
      Plan plan;
      ASSERT_NO_THROW(plan = make_plan(problem, epilogue, device, {}, kernels(device.backend)))
          << line << "\non " << name;
      for (const Candidate& candidate : plan.candidates) {
        if (candidate.fit) {
          ASSERT_GT(candidate.fit.microseconds, 0) << candidate.kernel << " for " << line;
          ASSERT_LT(candidate.fit.microseconds, 1e12) << candidate.kernel << " for " << line;
        }
      }
    }
  }
}

// A kernel that no problem would ever run on any device is dead weight. The last of a list, the fallback, may be.
TEST(Registered, EveryKernelIsChosenSomewhere) {
  std::map<Backend, std::set<std::string>> chosen;
  for (const char* name : kDevices) {
    const Device device = known_device(name);
    if (kernels(device.backend).empty()) continue;
    for (const std::string& line : problems()) {
      const auto [problem, epilogue] = parse_problem_and_epilogue(line);
      const Plan plan = make_plan(problem, epilogue, device, {}, kernels(device.backend));
      for (const Step& step : plan.steps) chosen[device.backend].insert(std::string(step.kernel->name));
    }
  }
  for (const Backend backend : {Backend::cpu, Backend::cuda}) {
    const auto names = kernel_names(backend);
    for (std::size_t i = 0; i + 1 < names.size(); ++i) {
      EXPECT_TRUE(chosen[backend].contains(names[i])) << names[i] << " is never chosen";
    }
  }
}

TEST(Registered, NamesAreUnique) {
  for (const Backend backend : {Backend::cpu, Backend::cuda}) {
    const auto names = kernel_names(backend);
    EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), names.size());
  }
}

TEST(Registered, PlansForHandWrittenGpusCannotRun) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const auto made = plan(parse_problem("2d c64>64 i8x8 t3"), {}, known_device("h200"));
  EXPECT_THROW(execute(*made, {}), std::runtime_error);
}

// A line of the table with a chain serves that chain alone; one without serves the rest, results kept for backward included.
TEST(Registered, AMeasuredChainGoesBeforeItsLayer) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const std::string layer = "2d b32 c64>64 i256x256 t4x4 s2 p1 op1 tf32";
  const auto config = [&](const std::string& chain) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(layer + chain);
    const Plan made = make_plan(problem, epilogue, known_device("h200"), {}, kernels(Backend::cuda));
    return to_string(made.steps.at(0).config);
  };
  EXPECT_EQ(config(" | bias add_channel tanh"), config(" | add_channel tanh"));
  EXPECT_NE(config(" | bias add_channel tanh"), config(""));
  EXPECT_EQ(config(" | bias add_channel tanh save"), config(""));
  EXPECT_EQ(config(" | bias relu"), config(""));
}

TEST(Registered, AMeasuredChoiceServesBoth16BitTypes) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const auto chosen = [](const std::string& type) {
    const Plan made = make_plan(parse_problem("2d b8 c64>64 i1024x1024 t3x3 " + type), {}, known_device("h200"), {},
                                kernels(Backend::cuda));
    EXPECT_NE(explain(made).find("measured as the best"), std::string::npos) << type;
    return std::string(made.steps.at(0).kernel->name) + to_string(made.steps.at(0).config);
  };
  EXPECT_EQ(chosen("f16"), chosen("bf16"));
}

TEST(Registered, AConfigMayStateItsTile) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const Problem problem = parse_problem("3d b4 c32>32 i32x64x128 t3x3x3 s2 p1 tf32");
  const auto made = [&](const std::string& only) {
    return make_plan(problem, {}, known_device("h200"), only, kernels(Backend::cuda));
  };
  const auto refusal = [&](const std::string& only) {
    try {
      made(only);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  const Plan stated = made("ring_gemm_sm90:64x64x16,s7,w24,t1x128,b4");
  ASSERT_EQ(stated.candidates.size(), 1u);
  EXPECT_EQ(to_string(stated.steps.at(0).config), "64x64x16,s7,w24,t1x128,b4");
  EXPECT_EQ(stated.steps.at(0).config.tile_h, 1);
  EXPECT_EQ(stated.steps.at(0).config.tile_w, 128);
  EXPECT_EQ(stated.steps.at(0).config.weight_stages, 4);
  // The program is another one.
  const auto program = [](const Plan& plan) { return plan.steps.at(0).kernel->units(plan.steps.at(0)).at(0).prelude; };
  EXPECT_NE(program(stated), program(made("ring_gemm_sm90:64x64x16,s7,w24")));
  EXPECT_NE(program(stated), program(made("ring_gemm_sm90:64x64x16,s7,w24,t1x128")));

  // A measured line with a tile goes before the prices and stands beside the config without it.
  const Plan chosen = made("");
  EXPECT_NE(explain(chosen).find("measured as the best"), std::string::npos);
  EXPECT_GT(chosen.steps.at(0).config.tile_w, 0);

  EXPECT_NE(refusal("ring_gemm_sm90:64x64x16,s7,w24,t1x300").find("that tile does not fit"), std::string::npos);
  EXPECT_NE(refusal("phase_gemm_sm80:128x32x32,s1,w4,t1x24").find("that tile does not fit"), std::string::npos);
  EXPECT_NE(refusal("phase_gemm_sm80:128x32x32,s1,w4,b4").find("its weights have no stages"), std::string::npos);
  for (const char* stages : {",b2", ",b9"})
    EXPECT_NE(refusal(std::string("ring_gemm_sm90:64x64x16,s7,w24,t2x64") + stages).find("weights have 3 to 8 stages"),
              std::string::npos);
  EXPECT_NE(refusal("gather:2x8,w4,t1x128").find("its configs have one tile"), std::string::npos);
  const std::string unknown = refusal("ring_gemm_sm90:64x64x16,s9,w24");
  EXPECT_NE(unknown.find("ring_gemm_sm90:64x64x16,s7,w24"), std::string::npos);
  EXPECT_EQ(unknown.find("ring_gemm_sm90:64x184x8"), std::string::npos) << unknown;
  EXPECT_NE(refusal("ring_gemm_sm90:1x1x1").find("more configs"), std::string::npos);
  for (const char* end : {",t1", ",t0x64", ",tx64", ",t1x64x", ",b", ",b0", ",t-1x64", ",t1x64,k1"})
    EXPECT_NE(refusal(std::string("ring_gemm_sm90:64x64x16,s7,w24") + end).find("no kernel is named"),
              std::string::npos)
        << end;
}

// Why a config, "kernel:config", refuses a problem on an H200; empty where it does not.
std::string refusal_of(const std::string& problem, const std::string& config) {
  try {
    make_plan(parse_problem(problem), {}, known_device("h200"), config, kernels(Backend::cuda));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Registered, ConfigsThatWalkOrSplitTheWidth) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const auto refusal = [](const std::string& problem, const std::string& config) {
    return refusal_of(problem, "ring_gemm_sm90:" + config);
  };
  const std::string walks = "64x128x16,s7,w20,k4", splits = "64x96x32,s1,w20,k8";
  EXPECT_EQ(refusal("2d c64>64 i64x64 t3x3 tf32", walks), "");
  EXPECT_EQ(refusal("3d c32>32 i8x8x64 t3x3x3 s2 p1 tf32", walks), "");
  EXPECT_CONTAINS(refusal("2d c64>64 i64x64 t2x2 s2 tf32", walks), "share no source");
  EXPECT_CONTAINS(refusal("1d c64>64 i64 t3 tf32", walks), "share no source");
  EXPECT_CONTAINS(refusal("3d c32>32 i64x64x64 t9x3x3 d8x1x1 p32x1x1 tf32", walks), "no tile fits");
  EXPECT_EQ(refusal("2d c64>64 i16x16 t4x4 s2 p1 tf32", splits), "");
  EXPECT_EQ(refusal("2d b128 c64>64 i128x128 t4x4 s2 p1 tf32 channels_last", splits), "");
  EXPECT_CONTAINS(refusal("2d b128 c64>64 i128x128 t4x4 s2 p1 tf32", splits), "half of the L2");
  EXPECT_CONTAINS(refusal("2d c64>64 i16x16 t3x3 tf32", splits), "have the same shifts");
}

TEST(Registered, LinesOfARowRefuse) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  const auto refusal = [](const std::string& problem, const std::string& config) {
    return refusal_of(problem + " channels_last grad_weight", "line_gemm_grad_weight_sm90:" + config);
  };
  const std::string narrow = "64x32x64,s2,w12", wide = "64x64x64,s2,w12";
  EXPECT_EQ(refusal("3d c32>32 i8x8x64 t3x3x3 s2 p1 f16", narrow), "");
  EXPECT_EQ(refusal("2d c64>64 i16x16 t4x4 s2 p1 bf16", wide), "");  // a piece at a time
  EXPECT_CONTAINS(refusal("2d c64>64 i16x16 t3x3 s2 p1", wide), "not a 16-bit");
  EXPECT_CONTAINS(refusal("2d g2 c64>64 i16x16 t3x3 f16", wide), "groups 2");
  EXPECT_CONTAINS(refusal("2d c64>60 i16x16 t3x3 f16", wide), "no multiple of 8");
  EXPECT_CONTAINS(refusal("2d c64>64 i16x16 t9x9 f16", wide), "do not fit registers");
  EXPECT_CONTAINS(refusal("1d c64>512 i100 t256 s128 p64 f16", wide), "constant memory");
  EXPECT_CONTAINS(refusal("2d c64>64 i16x16 t1x3 d1x600 p0x600 f16", wide), "no tile fits");
}

// The tiles that `tconv tune` times beside a config's own: each fits and no two are the same.
TEST(Registered, TilesOfAConfigFit) {
  const Device device = known_device("h200");
  int kernels_with_tiles = 0;
  for (const Kernel* kernel : kernels(Backend::cuda)) {
    if (kernel->tiles == nullptr) continue;
    ++kernels_with_tiles;
    for (const char* text :
         {"3d b4 c32>32 i32x64x128 t3x3x3 s2 p1 tf32", "2d b2 g4 c32>64 i33x47 t3x5 f16 channels_last",
          "1d b5 c64>32 i60 t16 s8 p4 f16", "2d c24>40 i15x24 t3x3 s2 p1 op1 grad_input tf32"}) {
      const Problem problem = parse_problem(text);
      std::size_t found = 0;
      for (const Config& config : kernel->configs) {
        const std::vector<Config> tiles = kernel->tiles(problem, {}, device, config);
        found += tiles.size();
        std::set<std::string> names;
        for (const Config& tile : tiles) {
          names.insert(to_string(tile));
          EXPECT_TRUE(kernel->fit(problem, {}, device, tile)) << text << ' ' << to_string(tile);
        }
        EXPECT_EQ(names.size(), tiles.size()) << text << ' ' << to_string(config);
      }
      EXPECT_GT(found, 0u) << text;
    }
  }
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  EXPECT_EQ(kernels_with_tiles, 2);
}

TEST(Registered, APackedSourceComesInPieces) {
  if (kernels(Backend::cuda).empty()) GTEST_SKIP() << "no CUDA kernels";
  auto workspace = [](const char* problem) {
    const Plan plan = make_plan(parse_problem(problem), {}, known_device("h200"), "ring_gemm_sm90:64x96x8,s1,w20",
                                kernels(Backend::cuda));
    return plan.workspace_bytes;
  };
  constexpr std::size_t kMega = std::size_t{1} << 20;
  const std::size_t one = workspace("2d b1 c16>16 i1024x1024 t3x3 f16"),
                    many = workspace("2d b64 c16>16 i1024x1024 t3x3 f16");
  EXPECT_GE(one, 32 * kMega);    // 16 channels of 2 bytes at 2^20 positions
  EXPECT_GE(many, 256 * kMega);  // eight images of 64
  EXPECT_LT(many, 257 * kMega);
  EXPECT_THROW(workspace("2d b1 c16>16 i8192x8192 t3x3 f16"), std::invalid_argument);  // one image of 2 GiB
}

std::string snapshot() {
  std::ostringstream text;
  text << "# What is chosen for the problems that matter. Written by planner_test with TCONV_UPDATE_SNAPSHOT=1.\n";
  for (const char* name : {"h200", "cpu_avx512"}) {
    const Device device = known_device(name);
    for (const std::string& line : problems()) {
      const auto [problem, epilogue] = parse_problem_and_epilogue(line);
      if (useful_flops(problem) < 1e9) continue;
      const Plan plan = make_plan(problem, epilogue, device, {}, kernels(device.backend));
      text << name << " | " << to_string(problem, epilogue) << " =>";
      for (const Step& step : plan.steps) text << " " << step.kernel->name << ":" << to_string(step.config);
      text << "\n";
    }
  }
  return text.str();
}

TEST(Registered, ChoicesMatchTheSnapshot) {
  const char* path = TCONV_TESTS_DIR "/planner_snapshot.txt";
  const std::string now = snapshot();
  if (std::getenv("TCONV_UPDATE_SNAPSHOT") != nullptr) {
    std::ofstream(path) << now;
    return;
  }
  std::ifstream file(path);
  std::istringstream current(now);
  int differences = 0;
  std::string expected, actual;
  while (true) {
    const bool more_expected = static_cast<bool>(std::getline(file, expected));
    const bool more_actual = static_cast<bool>(std::getline(current, actual));
    if (!more_expected && !more_actual) break;
    if (!more_expected) expected.clear();
    if (!more_actual) actual.clear();
    if (expected != actual && ++differences <= 10) ADD_FAILURE() << "was  " << expected << "\nis   " << actual;
  }
  EXPECT_EQ(differences, 0)
      << "if the change is meant: TCONV_UPDATE_SNAPSHOT=1 planner_test --gtest_filter='Registered.*'";
}

}  // namespace
}  // namespace tconv
