// measured.cpp — see measured.h.
// SPDX-License-Identifier: Apache-2.0
#include "measured.h"

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
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
};

struct Hash {
  std::size_t operator()(const Problem& problem) const { return hash_value(problem); }
};

struct Choice {
  DType dtype;
  std::int64_t batch;
  std::string chain, kernel;
};

using Table = std::unordered_multimap<Problem, Choice, Hash>;

// Both 16-bit types have the same kernels and bytes, so a line of one serves the other that has none.
Problem key_of(Problem problem) {
  problem.batch = 1;
  if (problem.dtype == DType::bf16) problem.dtype = DType::f16;
  return problem;
}

void add(Table& table, const Line& line) {
  const auto [problem, epilogue] = parse_problem_and_epilogue(line.problem);
  const Problem simple = simplify(problem, epilogue);
  table.emplace(key_of(simple), Choice{simple.dtype, simple.batch, measured_chain(epilogue), std::string(line.choice)});
}

// Lines as `tconv tune --out` writes them; blank lines and // comments besides.
Table read_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::invalid_argument("TCONV_MEASURED: cannot read `" + path + "`");
  Table table;
  int number = 0;
  for (std::string text; std::getline(file, text);) {
    ++number;
    const std::size_t begin = text.find_first_not_of(" \t\r");
    if (begin == std::string::npos || text.compare(begin, 2, "//") == 0) continue;
    std::size_t quote[4] = {};
    for (std::size_t i = 0, at = begin; i < 4 && at != std::string::npos; ++i) at = quote[i] = text.find('"', at + 1);
    const bool complete = text.compare(begin, 9, "MEASURED(") == 0 && quote[3] != std::string::npos && quote[3] != 0;
    if (!complete) {
      throw std::invalid_argument("TCONV_MEASURED: line " + std::to_string(number) + " of `" + path +
                                  "` must read MEASURED(\"problem\", \"kernel:config\"), got `" + text + "`");
    }
    const std::string problem = text.substr(quote[0] + 1, quote[1] - quote[0] - 1);
    const std::string choice = text.substr(quote[2] + 1, quote[3] - quote[2] - 1);
    add(table, {problem, choice});
  }
  return table;
}

}  // namespace

std::string measured_chain(const Epilogue& epilogue) {
  Epilogue chain;
  chain.ops = epilogue.ops;
  chain.save = epilogue.save;
  return to_string(chain);
}

std::string_view measured_choice(const Problem& problem, const Epilogue& epilogue, const Device& device) {
  if (device.backend != Backend::cuda) return {};
  static const char* const path = std::getenv("TCONV_MEASURED");
  static const Table table = [] {
    if (path != nullptr && *path != 0) return read_file(path);
    Table built_in;
    for (const Line& line : kH200) add(built_in, line);
    return built_in;
  }();
  const bool own = path != nullptr && *path != 0;
  if (!own && (device.compute_capability != 90 || device.multiprocessors != 132)) return {};
  const auto [begin, end] = table.equal_range(key_of(problem));
  if (begin == end) return {};
  const std::string chain = measured_chain(epilogue);
  std::string_view best;
  int most = 0;
  for (auto at = begin; at != end; ++at) {
    const Choice& line = at->second;
    if (problem.batch > 4 * line.batch || line.batch > 4 * problem.batch) continue;
    if (line.chain != chain && !line.chain.empty()) continue;
    // Of its own chain, then of its own type.
    const int suits = 1 + 2 * (line.chain == chain) + (line.dtype == problem.dtype);
    if (suits > most) best = line.kernel, most = suits;
  }
  return best;
}

}  // namespace tconv
