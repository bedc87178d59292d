// Every device source for every problem that its kernel serves compiles for sm_80 and sm_90a, without spills and within
// the limits of shared memory and registers; and the disk cache keeps its promises. Needs NVRTC, but neither GPU nor
// driver.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <thread>

#include "cuda/driver.h"
#include "cuda/jit.h"
#include "planner.h"

namespace tconv::cuda {
namespace {

namespace fs = std::filesystem;

// `make test` installs NVRTC as a wheel into the repository's virtual environment.
void find_nvrtc() {
  static std::once_flag once;
  std::call_once(once, [] {
    std::error_code ignored;
    const fs::path environment = fs::path(TCONV_TESTS_DIR).parent_path() / ".venv" / "lib";
    for (const auto& python : fs::directory_iterator(environment, ignored)) {
      for (const char* folder : {"cu13/lib", "cuda_nvrtc/lib"}) {
        add_search_path((python.path() / "site-packages" / "nvidia" / folder).string());
      }
    }
  });
}

#define NEEDS_NVRTC()                                                                  \
  do {                                                                                 \
    find_nvrtc();                                                                      \
    if (const std::string why = missing_compiler(); !why.empty()) GTEST_SKIP() << why; \
  } while (false)

// What take_remainder() in convert.cuh does with it.
TEST(Divisor, QuotientsAreExactBelow2To31) {
  std::vector<std::int64_t> divisors{1, 2, 3, 5, 7, 11, 127, 128, 129, 1000, 65535, 65537, (1 << 30) - 1, 1 << 30};
  for (std::int64_t divisor = 1; divisor < (std::int64_t{1} << 31); divisor = divisor * 3 + 1)
    divisors.push_back(divisor);
  for (const std::int64_t divisor : divisors) {
    const Divisor by = divisor_of(divisor);
    for (std::int64_t base = 0; base < (std::int64_t{1} << 31); base = base * 5 + divisor)
      for (std::int64_t n : {base - 1, base, base + 1, base / divisor * divisor - 1, (std::int64_t{1} << 31) - 1}) {
        if (n < 0 || n >= (std::int64_t{1} << 31)) continue;
        const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) * by.multiplier >> 32);
        ASSERT_EQ((high + static_cast<std::uint32_t>(n)) >> by.shift, n / divisor) << n << " / " << divisor;
      }
  }
}

// ------------------------------------------------------------------------------------------------- all device sources

struct Work {
  Unit unit;
  std::string what;
};

// The cheapest config of every kernel on every problem that it serves, with the steps before and behind it. One program
// per different text. The problems that have a name (a comment) are compiled for both targets, of the others every
// fourth for each, which keeps the test to minutes on two cores; TCONV_COMPILE_ALL=1 compiles everything for both.
std::vector<Work> all_units(const Device& device, int turn) {
  std::vector<Work> work;
  std::set<std::string> seen;
  const bool everything = std::getenv("TCONV_COMPILE_ALL") != nullptr;
  int number = 0;
  std::ifstream file(TCONV_TESTS_DIR "/problems.txt");
  EXPECT_TRUE(file);
  for (std::string line; std::getline(file, line);) {
    const std::size_t comment = line.find('#');
    line = line.substr(0, comment);
    if (line.find_first_not_of(' ') == std::string::npos) continue;
    if (comment == std::string::npos && !everything && number++ % 4 != turn) continue;
    const auto [problem, epilogue] = parse_problem_and_epilogue(line);
    for (const Kernel* kernel : kernels(Backend::cuda)) {
      Plan plan;
      try {
        plan = make_plan(problem, epilogue, device, kernel->name, kernels(Backend::cuda));
      } catch (const std::invalid_argument&) {
        continue;  // refuses
      }
      for (const Step& step : plan.steps) {
        for (Unit& unit : step.kernel->units(step)) {
          if (!seen.insert(unit.source + '\n' + unit.entry + '\n' + unit.prelude).second) continue;
          std::string what = unit.entry + " of " + std::string(step.kernel->name) + ":" + to_string(step.config) +
                             " for " + to_string(step.problem, step.epilogue);
          work.push_back({std::move(unit), std::move(what)});
        }
      }
    }
  }
  return work;
}

struct Target {
  const char* arch;
  const char* device;
  int turn;
};

class Compile : public testing::TestWithParam<Target> {};

constexpr std::size_t kShards = 4;  // tests run in parallel

void compile_one(const Unit& unit, const std::string& what, const char* arch, const Device& device) {
  BuildReport report;
  std::string code;
  try {
    code = compile(unit, arch, &report);
  } catch (const std::runtime_error& error) {
    ADD_FAILURE() << what << ": " << error.what();
    return;
  }
  EXPECT_EQ(code.substr(0, 4),
            "\x7f"
            "ELF")
      << what;
  EXPECT_GT(report.registers, 0) << what << ": the compiler's report has no entry of this name";
  EXPECT_EQ(report.spill_bytes, 0u) << what;
  EXPECT_LE(unit.shared_bytes + report.static_shared_bytes, device.shared_memory_per_block) << what;
  EXPECT_LE(report.static_shared_bytes, 48u * 1024) << what;
  EXPECT_GT(unit.threads, 0) << what;
  // Registers are handed out in units of 8 a thread, 65536 to a multiprocessor.
  EXPECT_LE((report.registers + 7) / 8 * 8 * ((unit.threads + 31) / 32 * 32), 65536) << what;
}

void compile_all(const Target& target, std::size_t shard) {
  const Device device = known_device(target.device);
  const std::vector<Work> work = all_units(device, target.turn);
  ASSERT_GT(work.size(), 50u);
  for (std::size_t i = shard; i < work.size(); i += kShards)
    compile_one(work[i].unit, work[i].what, target.arch, device);
}

// A chunk of channels is a stage of the ring where all stay for several passes, and a stage has barriers.
TEST(CompileConfigs, BarriersOfManyChunksFit) {
  NEEDS_NVRTC();
  const Device device = known_device("h200");
  const Problem problem = parse_problem("2d b8 c1024>512 i32x32 t2x2 s2 f16");
  for (const char* config : {"ring_gemm_sm90:64x32x8,s7,w20", "ring_gemm_sm90:64x48x8,s1,w20,k2"}) {
    const Plan plan = make_plan(problem, {}, device, config, kernels(Backend::cuda));
    for (const Step& step : plan.steps)
      for (const Unit& unit : step.kernel->units(step))
        compile_one(unit, unit.entry + " of " + config, "sm_90a", device);
  }
}

// Blocks of 768 threads have 80 registers each: what needs most of them, and is seldom the cheapest.
TEST(CompileConfigs, RegistersOf24WarpsSuffice) {
  NEEDS_NVRTC();
  const Device device = known_device("h200");
  for (const char* text :
       {"3d b4 c32>32 i32x64x128 t3x3x3 s2 p1 f16 | bias gelu", "2d b8 c32>48 i64x64 t3x3 s3 f16 channels_last | bias",
        "3d b4 c32>32 i32x64x128 t3x3x3 s2 p1 tf32 | bias gelu"}) {
    const auto [problem, epilogue] = parse_problem_and_epilogue(text);
    for (const char* config : {"ring_gemm_sm90:64x64x8,s7,w24", "ring_gemm_sm90:64x64x16,s7,w24"}) {
      const Plan plan = make_plan(problem, epilogue, device, config, kernels(Backend::cuda));
      for (const Step& step : plan.steps)
        for (const Unit& unit : step.kernel->units(step))
          compile_one(unit, unit.entry + " of " + config + ' ' + text, "sm_90a", device);
    }
  }
}

TEST_P(Compile, Shard0) {
  NEEDS_NVRTC();
  compile_all(GetParam(), 0);
}
TEST_P(Compile, Shard1) {
  NEEDS_NVRTC();
  compile_all(GetParam(), 1);
}
TEST_P(Compile, Shard2) {
  NEEDS_NVRTC();
  compile_all(GetParam(), 2);
}
TEST_P(Compile, Shard3) {
  NEEDS_NVRTC();
  compile_all(GetParam(), 3);
}
INSTANTIATE_TEST_SUITE_P(Targets, Compile, testing::Values(Target{"sm_80", "a100", 0}, Target{"sm_90a", "h200", 1}),
                         [](const auto& info) { return std::string(info.param.arch); });

// -------------------------------------------------------------------------------------------------------- the compiler

Step step_for(std::string_view line) {
  const auto [problem, epilogue] = parse_problem_and_epilogue(line);
  return make_plan(problem, epilogue, known_device("h200"), {}, kernels(Backend::cuda)).steps.back();
}

// A small program, different for every number.
Unit small_unit(int number) {
  const Step step = step_for("2d c4>4 i8x8 t1 epilogue | scale(" + std::to_string(number) + ")");
  return step.kernel->units(step).back();
}

TEST(Program, TakesEveryIncludeOnceAndKeepsLineNumbers) {
  const std::string text = program_text(small_unit(1));
  const auto count = [&](std::string_view what) {
    int found = 0;
    for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
    return found;
  };
  EXPECT_EQ(count("struct Operands {"), 1);
  EXPECT_EQ(count("#include"), 0);
  EXPECT_EQ(count("#pragma once"), 0);
  EXPECT_GE(count("\"finish.cu\""), 2);  // at its start and behind its include
}

TEST(Program, ErrorsNameTheSourceAndTheLine) {
  NEEDS_NVRTC();
  Unit unit = small_unit(1);
  unit.prelude += "\nthis is not C++;\n";
  try {
    compile(unit, "sm_90a");
    FAIL() << "compiled";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("prelude of finish.cu("), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("sm_90a"), std::string::npos) << error.what();
  }
}

// What a process finds is decided once, so the attempt has a process of its own.
TEST(ProgramDeathTest, MissingCompilerSaysWhatIsNeeded) {
  EXPECT_EXIT(
      {
        setenv("TCONV_NVRTC_PATH", "/nonexistent/folder", 1);
        try {
          compile(small_unit(1), "sm_90a");
        } catch (const std::runtime_error& error) {
          std::fputs(error.what(), stderr);
          std::exit(3);
        }
        std::exit(4);
      },
      testing::ExitedWithCode(3), "looked in /nonexistent/folder.*NVRTC 11.8 or newer");
}

// ----------------------------------------------------------------------------------------------------------- the cache

// A cache of its own, so that nothing is found that another test or run has left.
class Cache : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("tconv_cache_test_" + std::to_string(getpid()));
    fs::remove_all(folder_);
    setenv("TCONV_CACHE_DIR", folder_.c_str(), 1);
    forget_programs();
  }
  void TearDown() override {
    unsetenv("TCONV_CACHE_DIR");
    unsetenv("TCONV_CACHE_MAX_BYTES");
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  // Compiles as a fresh process would; whether the disk had it.
  bool compile_again(int number, std::string* code = nullptr) {
    forget_programs();
    BuildReport report;
    const std::string result = compile(small_unit(number), "sm_90a", &report);
    EXPECT_GT(report.registers, 0);
    if (code) *code = result;
    return report.from_cache;
  }
  std::vector<fs::path> entries() const {
    std::vector<fs::path> list;
    for (const auto& entry : fs::directory_iterator(folder_)) list.push_back(entry.path());
    return list;
  }
  static std::string contents(const fs::path& path) {
    std::ifstream stream(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  }
  static void write(const fs::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
  }

  fs::path folder_;
};

TEST_F(Cache, FindsWhatItWrote) {
  NEEDS_NVRTC();
  std::string first, second;
  EXPECT_FALSE(compile_again(1, &first));
  EXPECT_TRUE(compile_again(1, &second));
  EXPECT_TRUE(first == second);
  EXPECT_FALSE(compile_again(2));  // another program
  ASSERT_EQ(entries().size(), 2u);
}

TEST_F(Cache, CompilesAgainWhatIsDamaged) {
  NEEDS_NVRTC();
  std::string good, code;
  compile_again(1, &good);
  ASSERT_EQ(entries().size(), 1u);
  const fs::path path = entries()[0];
  const std::string file = contents(path);
  std::string flipped = file;
  flipped[file.size() / 2] = static_cast<char>(flipped[file.size() / 2] ^ 1);
  std::string older = file;
  older[7] = '0';
  for (const std::string& bad : {std::string(), file.substr(0, 20), file.substr(0, file.size() - 1), file + "x",
                                 flipped, older, std::string(file.size(), 'x')}) {
    write(path, bad);
    EXPECT_FALSE(compile_again(1, &code));
    EXPECT_TRUE(code == good);
    EXPECT_TRUE(compile_again(1));  // repaired
  }
}

TEST_F(Cache, IgnoresAnotherProgramsEntry) {
  NEEDS_NVRTC();
  std::string one, two;
  compile_again(1, &one);
  const fs::path first = entries()[0];
  compile_again(2, &two);
  fs::path second = entries()[0] == first ? entries()[1] : entries()[0];
  fs::copy_file(first, second, fs::copy_options::overwrite_existing);
  std::string code;
  EXPECT_FALSE(compile_again(2, &code));
  EXPECT_TRUE(code == two);
}

TEST_F(Cache, StaysBelowItsLimitAndKeepsWhatIsUsed) {
  NEEDS_NVRTC();
  compile_again(0);
  const std::uintmax_t size = fs::file_size(entries()[0]), limit = 5 * size;
  setenv("TCONV_CACHE_MAX_BYTES", std::to_string(limit).c_str(), 1);
  for (int number = 1; number < 12; ++number) {
    EXPECT_TRUE(compile_again(0)) << "deleted although used last, at " << number;
    EXPECT_FALSE(compile_again(number));
    std::uintmax_t total = 0;
    for (const fs::path& entry : entries()) total += fs::file_size(entry);
    EXPECT_LE(total, limit);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // times on disk must differ
  }
  EXPECT_FALSE(compile_again(1));  // used longest ago
}

TEST_F(Cache, IsNotNeeded) {
  NEEDS_NVRTC();
  write(folder_, "a file where the folder should be");
  EXPECT_FALSE(compile_again(1));
  setenv("TCONV_CACHE_DIR", "", 1);
  EXPECT_FALSE(compile_again(1));
}

TEST_F(Cache, ServesProcessesAtTheSameTime) {
  NEEDS_NVRTC();
  constexpr int kProcesses = 4, kPrograms = 3;
  std::vector<pid_t> children;
  for (int process = 0; process < kProcesses; ++process) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      int status = 1;
      try {
        for (int round = 0; round < 3; ++round) {
          for (int number = 0; number < kPrograms; ++number) compile_again(number);
        }
        status = testing::Test::HasFailure() ? 1 : 0;
      } catch (const std::exception&) {
        // Reported by the exit status.
      }
      _exit(status);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 1;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  for (int number = 0; number < kPrograms; ++number) EXPECT_TRUE(compile_again(number));
  for (const fs::path& entry : entries()) EXPECT_EQ(entry.extension(), ".bin");
  EXPECT_EQ(entries().size(), static_cast<std::size_t>(kPrograms));
}

TEST(Programs, CompileOnceForAllThreads) {
  NEEDS_NVRTC();
  setenv("TCONV_CACHE_DIR", "", 1);
  forget_programs();
  std::atomic<int> compiled = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      BuildReport report;
      compile(small_unit(7), "sm_80", &report);
      compiled += !report.from_cache;
    });
  }
  for (std::thread& thread : threads) thread.join();
  unsetenv("TCONV_CACHE_DIR");
  EXPECT_EQ(compiled, 1);
}

}  // namespace
}  // namespace tconv::cuda
