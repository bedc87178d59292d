// tconv.cpp — the command line tool: plan, check, time, tune, compile.
// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cuda/driver.h"
#include "measured.h"
#include "memory.h"
#include "planner.h"
#include "simplify.h"

namespace tconv::bench {
namespace {

constexpr const char* kUsage = R"(usage: tconv <command> [options] ["<problem>" ...]

  plan     every kernel with its predicted cost or its reason to refuse
  check    every kernel and config that fits, against the reference
  time     median time of the chosen plan, as rates and as a share of the device's floor
  tune     times the configs that look best, says how far the planner's choice is from the best of them
  compile  every device source that fits, for an architecture; needs no GPU

A problem reads `2d b8 c64>64 i32x64 t3x3 s2 p1 op1 d1 g1 f32 channels_last grad_input tf32 | bias gelu group_norm(8)`.

options
  --problems FILE    one problem a line, after those on the command line; # starts a comment
  --device NAME      cpu, cuda, cuda:1 (this machine), or for plan and compile one of h200 a100 cpu_avx512_amx
                     cpu_avx512_bf16 cpu_avx512 cpu_avx2 cpu_portable. Default: cpu; check also runs on cuda when
                     there is one
  --only NAME        a kernel, or kernel:config; some configs take a tile of positions and stages of
                     weights, in this order: kernel:config,t2x64,b4
  --arch ARCH        compile: sm_80, sm_90a ... Default: that of the device
  --chosen           check, compile: only what the planner chooses, not every kernel and config that fits
  --top N            tune, compile: only the N configs of each kernel with the lowest predicted cost. Default of tune: 6
  --tiles N          tune, compile: with --top, the N tiles of each of those configs with the lowest
                     predicted cost, where the kernel has a choice. Default: 1
  --out FILE         tune: where to write the lines of a measured_<device>.def table; TCONV_MEASURED=FILE uses them
  --jobs N           compile: how many at once. Default: all cores
  --reduce PRODUCTS  check, compile: shrink batch and sizes until a problem has about so many multiply-adds
  --non-finite       check: with a few infinities and NaNs in the data
  --runs N           time: how many runs. Default: as many as take about a second, at least 5
  --threads N        time: CPU threads. Default: all cores
  --seed N           check: of the random data. Default: a new one
)";

struct Options {
  std::string command, device, only, arch, out;
  std::vector<std::string> problems;
  double reduce = 0;
  int jobs = 0, runs = 0, threads = 0, top = 0, tiles = 1;
  std::uint64_t seed = 0;
  bool have_seed = false, chosen = false, non_finite = false;
};

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void read_problems(const std::string& path, std::vector<std::string>& problems) {
  std::ifstream file(path);
  if (!file) throw UsageError("cannot read " + path);
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(" \t\r") != std::string::npos) problems.push_back(line);
  }
}

template <typename T>
T parse_number(const std::string& option, const std::string& text, T least) {
  T number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || !(number >= least)) {
    std::ostringstream what;
    what << option << " must be a" << (std::is_integral_v<T> ? " whole" : "") << " number of at least " << least
         << ", got `" << text << '`';
    throw UsageError(what.str());
  }
  return number;
}

Options parse_options(int argc, char** argv) {
  Options options;
  if (argc < 2) throw UsageError("a command is missing");
  options.command = argv[1];
  std::vector<std::string> files;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!argument.starts_with("--")) {
      options.problems.push_back(argument);
      continue;
    }
    if (argument == "--chosen") {
      options.chosen = true;
      continue;
    }
    if (argument == "--non-finite") {
      options.non_finite = true;
      continue;
    }
    if (i + 1 == argc) throw UsageError(argument + " needs a value");
    const std::string value = argv[++i];
    if (argument == "--problems") {
      files.push_back(value);
    } else if (argument == "--device") {
      options.device = value;
    } else if (argument == "--only") {
      options.only = value;
    } else if (argument == "--arch") {
      options.arch = value;
    } else if (argument == "--jobs") {
      options.jobs = parse_number(argument, value, 1);
    } else if (argument == "--top") {
      options.top = parse_number(argument, value, 1);
    } else if (argument == "--tiles") {
      options.tiles = parse_number(argument, value, 1);
    } else if (argument == "--out") {
      options.out = value;
    } else if (argument == "--reduce") {
      options.reduce = parse_number(argument, value, 1.0);
    } else if (argument == "--runs") {
      options.runs = parse_number(argument, value, 1);
    } else if (argument == "--threads") {
      options.threads = parse_number(argument, value, 1);
    } else if (argument == "--seed") {
      options.seed = parse_number<std::uint64_t>(argument, value, 0);
      options.have_seed = true;
    } else {
      throw UsageError("unknown option " + argument);
    }
  }
  for (const std::string& file : files) read_problems(file, options.problems);
  if (options.problems.empty()) throw UsageError("a problem is missing");
  return options;
}

Device find_device(const std::string& name) {
  if (name.empty() || name == "cpu") return cpu_device();
  if (name == "cuda") return cuda_device(0);
  if (name.starts_with("cuda:")) return cuda_device(parse_number("--device cuda:", name.substr(5), 0));
  return known_device(name);
}

int run_plan(const Options& options) {
  const Device device = find_device(options.device);
  for (const std::string& line : options.problems) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(line);
    const Plan plan = make_plan(problem, epilogue, device, options.only, kernels(device.backend));
    std::fputs(explain(plan).c_str(), stdout);
  }
  return 0;
}

int run_check(const Options& options) {
  std::vector<Device> devices;
  if (!options.device.empty()) {
    devices.push_back(find_device(options.device));
  } else {
    devices.push_back(cpu_device());
    if (cuda_device_count() > 0) devices.push_back(cuda_device(0));
  }
  CheckOptions check_options;
  check_options.only = options.only;
  check_options.max_products = options.reduce;
  check_options.non_finite = options.non_finite;
  check_options.chosen = options.chosen;
  check_options.seed = options.have_seed ? options.seed : std::random_device{}();
  std::size_t checked = 0, failed = 0;
  for (const std::string& line : options.problems) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(line);
    for (const Device& device : devices) {
      for (const CheckResult& result : check(problem, epilogue, device, check_options)) {
        ++checked;
        failed += !result.failure.empty();
        std::printf("%s  %-44s %5.1f %% of tolerance  %s\n", result.failure.empty() ? "ok  " : "FAIL",
                    result.kernel.c_str(), 100 * result.worst, to_string(problem, epilogue).c_str());
        if (!result.failure.empty()) std::printf("  %s\n", result.failure.c_str());
      }
    }
    std::fflush(stdout);
  }
  std::printf("%zu of %zu passed\n", checked - failed, checked);
  if (checked == 0) throw UsageError("no kernel was checked");
  return failed > 0;
}

// The least time a device needs: each tensor moved once, or the products at its highest rate.
double floor_seconds(const Problem& problem, const Device& device) {
  double tflops = problem.dtype == DType::f64 ? device.fp64_tflops : device.fp32_tflops;
  if (problem.dtype == DType::f32 && problem.precision == Precision::tf32)
    tflops = std::max(tflops, device.tf32_tflops);
  if (size_of(problem.dtype) == 2) tflops = std::max(tflops, device.f16_tflops);
  return std::max(minimum_bytes(problem) / (device.bandwidth_tbs * 1e12), useful_flops(problem) / (tflops * 1e12));
}

// Tensors of a problem with uniform data in [0, 1): rates must not depend on zeros or denormals.
class RandomTensors {
 public:
  RandomTensors(const Problem& problem, const Epilogue& epilogue, const Device& device) : device_(device) {
    const std::size_t element = size_of(problem.dtype);
    const std::int64_t largest =
        std::max({input_elements(problem), output_elements(problem), weight_elements(problem), problem.out_channels});
    fill_random(problem.dtype, largest);
    const bool chain_only = problem.direction == Direction::epilogue || problem.direction == Direction::grad_epilogue;
    const std::size_t output_element = size_of(epilogue.output_dtype.value_or(problem.dtype));
    tensors.input = buffer(chain_only ? output_elements(problem) : input_elements(problem), element, true);
    tensors.weight = buffer(weight_elements(problem), element, true);
    tensors.bias = buffer(problem.out_channels, element, true);
    if (problem.direction != Direction::forward && problem.direction != Direction::epilogue) {
      // fp32 gradients of a 16-bit problem are poison, which costs the same
      tensors.grad_output = buffer(output_elements(problem), chain_only ? output_element : element,
                                   !chain_only || output_element == element);
    }
    switch (problem.direction) {
      case Direction::forward:
      case Direction::epilogue:
        tensors.output = buffer(output_elements(problem), output_element, false);
        break;
      case Direction::grad_epilogue:
        tensors.output = buffer(output_elements(problem), element, false);
        break;
      case Direction::grad_input:
        tensors.output = buffer(input_elements(problem), element, false);
        break;
      case Direction::grad_weight:
        tensors.output = buffer(weight_elements(problem), element, false);
        break;
    }
    if (epilogue.save) tensors.raw = buffer(output_elements(problem), element, false);
    if (epilogue.save || problem.direction == Direction::grad_epilogue) {
      tensors.mean = buffer(num_statistics(problem, epilogue), 8, false);
      tensors.rstd = buffer(num_statistics(problem, epilogue), 8, false);
    }
    int slot = 0;
    for (const Op& op : epilogue.ops) {
      for (int k = 0; k < num_operands(op); ++k, ++slot) {
        const bool whole = operand_kind(op.kind) == OperandKind::tensor;
        const std::int64_t elements = whole ? output_elements(problem) : problem.out_channels;
        const std::size_t size = whole ? element : size_of(epilogue.operand_dtype.value_or(problem.dtype));
        const auto index = static_cast<std::size_t>(slot);
        tensors.operands[index] = buffer(elements, size, size == element);
        if (problem.direction == Direction::grad_epilogue) tensors.grad_operands[index] = buffer(elements, size, false);
      }
    }
  }

  // Seconds of each run, with a workspace of its own.
  std::vector<double> time(const Plan& plan, int count, int threads) {
    const Guarded workspace(device_, plan.workspace_bytes);
    tensors.workspace = workspace.data();
    return time_runs(device_, count, [&](Stream stream) {
      stream.num_threads = threads;
      execute(plan, tensors, stream);
    });
  }

  Tensors tensors;

 private:
  void fill_random(DType dtype, std::int64_t elements) {
    constexpr std::int64_t kBlock = 1 << 22;  // repeated: drawing 10^9 values takes longer than timing with them
    const std::size_t element = size_of(dtype);
    random_.resize(static_cast<std::size_t>(elements) * element);
    std::mt19937 generator(1);
    std::uniform_real_distribution<double> uniform(0, 1);
    const std::int64_t drawn = std::min(elements, kBlock);
    for (std::int64_t i = 0; i < drawn; ++i) {
      const double value = uniform(generator);
      if (dtype == DType::f64) {
        reinterpret_cast<double*>(random_.data())[i] = value;
      } else if (dtype == DType::f32) {
        reinterpret_cast<float*>(random_.data())[i] = static_cast<float>(value);
      } else {  // 0.5 to 1 in both 16-bit formats
        const std::uint16_t base = dtype == DType::f16 ? 0x3800 : 0x3f00;
        reinterpret_cast<std::uint16_t*>(random_.data())[i] = static_cast<std::uint16_t>(base | (generator() & 0x7f));
      }
    }
    for (std::int64_t i = drawn; i < elements; i += drawn) {
      const std::int64_t count = std::min(drawn, elements - i);
      std::memcpy(random_.data() + static_cast<std::size_t>(i) * element, random_.data(),
                  static_cast<std::size_t>(count) * element);
    }
  }

  void* buffer(std::int64_t elements, std::size_t size, bool fill) {
    buffers_.emplace_back(device_, static_cast<std::size_t>(elements) * size);
    if (fill) buffers_.back().write(random_.data());
    return buffers_.back().data();
  }

  Device device_;
  std::vector<std::byte> random_;
  std::vector<Guarded> buffers_;
};

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int run_time(const Options& options) {
  const Device device = find_device(options.device);
  std::printf("%10s %9s %10s %8s %10s  %s\n", "median ms", "GB/s", "GFLOP/s", "floor", "predicted", "kernel, problem");
  for (const std::string& line : options.problems) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(line);
    const auto chosen = plan(problem, epilogue, device, options.only);
    if (chosen->steps.empty()) {
      std::printf("%10s %9s %10s %8s %10s  nothing to do, %s\n", "-", "-", "-", "-", "-", line.c_str());
      continue;
    }
    RandomTensors tensors(problem, epilogue, device);
    const double first = tensors.time(*chosen, 2, options.threads)[1];
    const int count = options.runs > 0 ? options.runs : std::clamp(static_cast<int>(1 / std::max(first, 1e-6)), 5, 200);
    const double median = median_of(tensors.time(*chosen, count, options.threads));
    const Step& conv = chosen->steps[static_cast<std::size_t>(chosen->conv_step)];
    std::printf("%10.4f %9.1f %10.1f %6.1f %% %10.4f  %s:%s, %s\n", median * 1e3,
                minimum_bytes(problem) / median * 1e-9, useful_flops(problem) / median * 1e-9,
                100 * floor_seconds(problem, device) / median, chosen->microseconds * 1e-3,
                std::string(conv.kernel->name).c_str(), to_string(conv.config).c_str(),
                to_string(problem, epilogue).c_str());
    std::fflush(stdout);
  }
  return 0;
}

// kernel:config of the `top` cheapest configs of each kernel (or of `only`) by prediction, at most two of one tile (four
// where more than 8 are asked for), and of those the cheapest `most_tiles` tiles; none that is predicted to take over 12
// times the cheapest.
std::vector<std::string> top_candidates(const Problem& problem, const Epilogue& epilogue, const Device& device, int top,
                                        int most_tiles, const std::string& only) {
  const Plan plan = make_plan(problem, epilogue, device, {}, kernels(device.backend));
  std::vector<const Candidate*> fitting;
  for (const Candidate& candidate : plan.candidates)
    if (candidate.fit &&
        (only.empty() || only == candidate.kernel || only == candidate.kernel + ':' + to_string(candidate.config)))
      fitting.push_back(&candidate);
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Candidate* x, const Candidate* y) { return x->fit.microseconds < y->fit.microseconds; });
  std::map<std::string, int> of_kernel, of_tile;
  std::vector<std::string> names;
  for (const Candidate* candidate : fitting) {
    const std::string tile =
        candidate->kernel + std::to_string(candidate->config.block_m) + "x" + std::to_string(candidate->config.block_n);
    if (candidate->fit.microseconds > 12 * fitting.front()->fit.microseconds) break;
    if (of_tile[tile] >= (top > 8 ? 4 : 2) || of_kernel[candidate->kernel] >= top) continue;
    ++of_tile[tile];
    ++of_kernel[candidate->kernel];
    names.push_back(candidate->kernel + ":" + to_string(candidate->config));
    for (const Kernel* kernel : kernels(device.backend)) {
      if (kernel->name != candidate->kernel || kernel->tiles == nullptr || most_tiles == 1) continue;
      std::vector<Config> tiles = kernel->tiles(simplify(problem, epilogue), epilogue, device, candidate->config);
      tiles.resize(std::min(tiles.size(), static_cast<std::size_t>(most_tiles - 1)));
      for (const Config& tile : tiles) names.push_back(candidate->kernel + ":" + to_string(tile));
    }
  }
  return names;
}

void replace_file(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".part";
  std::ofstream(temporary) << text;
  if (std::rename(temporary.c_str(), path.c_str()) != 0) throw std::runtime_error("cannot write " + path);
}

int run_tune(const Options& options) {
  const Device device = find_device(options.device);
  std::string lines;
  double log_regret = 0;
  int measured = 0;
  for (std::size_t index = 0; index < options.problems.size(); ++index) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(options.problems[index]);
    const std::vector<std::string> names =
        top_candidates(problem, epilogue, device, options.top > 0 ? options.top : 6, options.tiles, options.only);
    if (names.empty()) continue;
    RandomTensors tensors(problem, epilogue, device);
    std::printf("[%zu/%zu] %s\n", index + 1, options.problems.size(), to_string(problem, epilogue).c_str());
    std::string best;
    double best_seconds = 0, first_seconds = 0;
    for (const std::string& name : names) {
      const auto one = plan(problem, epilogue, device, name);
      const double seconds = median_of(tensors.time(*one, options.runs > 0 ? options.runs : 5, options.threads));
      std::printf("  %-52s predicted %9.1f us, measured %9.1f us\n", name.c_str(), one->microseconds, seconds * 1e6);
      if (best.empty()) first_seconds = seconds;  // the planner's choice without a table
      if (best.empty() || seconds < best_seconds) {
        best = name;
        best_seconds = seconds;
      }
    }
    std::fflush(stdout);
    clear_plan_cache();
    log_regret += std::log(first_seconds / best_seconds);
    ++measured;
    // Within 5 % the prediction is left to stand: that is about the spread of two runs.
    const std::string chain = measured_chain(epilogue);
    if (first_seconds > 1.05 * best_seconds)
      lines += "MEASURED(\"" + to_string(problem) + (chain.empty() ? "" : " | " + chain) + "\", \"" + best + "\")\n";
    if (!options.out.empty()) replace_file(options.out, lines);  // a sweep takes minutes; what it has found stays
  }
  if (measured > 0)
    std::printf("%d problems; without a table the planner's choice takes %.3f times the best on average (geometric)\n",
                measured, std::exp(log_regret / measured));
  return 0;
}

struct Compilation {
  Unit unit;
  std::string kernel, problem;
};

int run_compile(const Options& options) {
  const Device device = find_device(options.device.empty() ? "h200" : options.device);
  if (device.backend != Backend::cuda) throw UsageError("compile needs a CUDA device, got " + device.name);
  const std::string arch = options.arch.empty() ? cuda::arch_of(device) : options.arch;
  std::vector<Compilation> work;
  std::set<std::string> seen;
  for (const std::string& line : options.problems) {
    const auto [stated, epilogue] = parse_problem_and_epilogue(line);
    const Problem problem = options.reduce > 0 ? reduced(stated, options.reduce) : stated;
    std::vector<std::string> names;  // what the plans are restricted to
    if (options.chosen) {
      names.push_back(options.only);
    } else if (options.top > 0) {
      names = top_candidates(problem, epilogue, device, options.top, options.tiles, options.only);
    } else {
      for (const Kernel* kernel : kernels(Backend::cuda)) {
        for (const Config& config : kernel->configs) {
          const std::string name = std::string(kernel->name) + ":" + to_string(config);
          if (options.only.empty() || options.only == kernel->name || options.only == name) names.push_back(name);
        }
      }
    }
    for (const std::string& name : names) {
      Plan plan;
      try {
        plan = make_plan(problem, epilogue, device, name, kernels(Backend::cuda));
      } catch (const std::invalid_argument&) {
        continue;  // it refuses
      }
      for (const Step& step : plan.steps) {
        if (step.kernel->units == nullptr) continue;
        for (Unit& unit : step.kernel->units(step)) {
          if (!seen.insert(unit.source + '\0' + unit.entry + '\0' + unit.prelude).second) continue;
          Compilation item;
          item.unit = std::move(unit);
          item.kernel = std::string(step.kernel->name) + ":" + to_string(step.config);
          item.problem = to_string(step.problem, step.epilogue);
          work.push_back(std::move(item));
        }
      }
    }
  }
  if (work.empty()) throw UsageError("no device source fits these problems");

  // NVRTC compiles one unit at a time in a process, so the jobs are processes; they share these counters.
  struct Progress {
    std::atomic<std::size_t> next, done, good;
  };
  void* shared_page = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared_page == MAP_FAILED) throw std::runtime_error("mmap failed");
  Progress& progress = *new (shared_page) Progress{0, 0, 0};
  const auto compile_all = [&] {
    for (std::size_t index; (index = progress.next++) < work.size();) {
      const Compilation& item = work[index];
      cuda::BuildReport report;
      std::string verdict;
      try {
        cuda::compile(item.unit, arch, &report);
      } catch (const std::exception& error) {
        verdict = error.what();
        // Without the compiler every other unit fails alike.
        if (verdict.find("libnvrtc cannot be opened") != std::string::npos) progress.next = work.size();
      }
      const std::size_t shared = item.unit.shared_bytes + report.static_shared_bytes;
      if (report.spill_bytes > 0) verdict += " spills";
      // Registers are handed out in units of 8 a thread; a multiprocessor has 65536.
      if ((report.registers + 7) / 8 * 8 * ((item.unit.threads + 31) / 32 * 32) > 65536) {
        verdict += " too many registers";
      }
      if (shared > device.shared_memory_per_block) verdict += " too much shared memory";
      progress.good += verdict.empty();
      std::printf("[%zu/%zu] %s  %3d registers  %5zu spilled  %6zu shared  %4d threads  %5.2f s%s  %s %s  %s%s%s\n",
                  ++progress.done, work.size(), verdict.empty() ? "ok  " : "FAIL", report.registers, report.spill_bytes,
                  shared, item.unit.threads, report.seconds, report.from_cache ? " cached" : "", item.kernel.c_str(),
                  item.unit.entry.c_str(), item.problem.c_str(), verdict.empty() ? "" : "\n  ", verdict.c_str());
      std::fflush(stdout);
    }
  };
  const int jobs = std::min(options.jobs > 0 ? options.jobs : cpu_device().cores, static_cast<int>(work.size()));
  std::vector<pid_t> children;
  for (int i = 1; i < jobs; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      compile_all();
      _exit(0);
    }
    if (child > 0) children.push_back(child);  // otherwise fewer jobs do the same work
  }
  compile_all();
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  std::printf("%zu of %zu compiled for %s without spills and within the limits\n", progress.good.load(), work.size(),
              arch.c_str());
  return progress.good < work.size();
}

int run(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h" || (i == 1 && argument == "help")) {
      std::fputs(kUsage, stdout);
      return 0;
    }
  }
  try {
    const Options options = parse_options(argc, argv);
    if (options.command == "plan") return run_plan(options);
    if (options.command == "check") return run_check(options);
    if (options.command == "time") return run_time(options);
    if (options.command == "tune") return run_tune(options);
    if (options.command == "compile") return run_compile(options);
    throw UsageError("unknown command " + options.command);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "tconv: %s (tconv --help lists commands and options)\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tconv: %s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace tconv::bench

int main(int argc, char** argv) { return tconv::bench::run(argc, argv); }
