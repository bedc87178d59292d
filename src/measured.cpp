// measured.cpp — see measured.h.
// SPDX-License-Identifier: Apache-2.0
#include "measured.h"

#include <unordered_map>

#include "simplify.h"

namespace tconv {
namespace {

struct Line {
  std::string_view problem, choice;
};

constexpr Line kH200[] = {
#define MEASURED(problem, choice) {problem, choice},
#include "measured_h200.def"
#undef MEASURED
    {{}, {}}};

struct Hash {
  std::size_t operator()(const Problem& problem) const { return hash_value(problem); }
};

struct Choice {
  std::int64_t batch;
  std::string_view kernel;
};

using Table = std::unordered_multimap<Problem, Choice, Hash>;

Table read(const Line* line) {
  Table table;
  for (; !line->problem.empty(); ++line) {
    Problem key = simplify(parse_problem(line->problem), {});
    const std::int64_t batch = key.batch;
    key.batch = 1;
    table.emplace(key, Choice{batch, line->choice});
  }
  return table;
}

}  // namespace

std::string_view measured_choice(const Problem& problem, const Device& device) {
  if (device.backend != Backend::cuda || device.compute_capability != 90 || device.multiprocessors != 132) return {};
  static const Table table = read(kH200);
  Problem key = problem;
  key.batch = 1;
  const auto [begin, end] = table.equal_range(key);
  for (auto at = begin; at != end; ++at)
    if (problem.batch <= 4 * at->second.batch && at->second.batch <= 4 * problem.batch) return at->second.kernel;
  return {};
}

}  // namespace tconv
