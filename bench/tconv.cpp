// tconv.cpp — the command line tool: plan.
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <exception>
#include <string>

#include "planner.h"

int main(int argc, char** argv) try {
  if (argc < 3 || std::string(argv[1]) != "plan") {
    std::fprintf(stderr, "usage: tconv plan \"<problem>\"\n");
    return 2;
  }
  const auto [problem, epilogue] = tconv::parse_problem_and_epilogue(argv[2]);
  const tconv::Device device = tconv::cpu_device();
  const tconv::Plan plan = tconv::make_plan(problem, epilogue, device, {}, tconv::kernels(device.backend));
  std::fputs(tconv::explain(plan).c_str(), stdout);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "tconv: %s\n", error.what());
  return 1;
}
