// Kernels whose warps wait for each other run here on the CPU, from the very source that NVRTC compiles: what they compute
// is compared exactly, and a wait in vain ends the test. device_emulation.h says what is covered.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "cuda/driver.h"
#include "planner.h"

namespace tconv {
namespace {

namespace fs = std::filesystem;

std::size_t behind(const std::string& text, std::size_t open, char left, char right) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = open; i < text.size(); ++i) {
    if (quoted) {
      if (text[i] == '\\')
        ++i;
      else
        quoted = text[i] != '"';
    } else if (text[i] == '"') {
      quoted = true;
    } else if (text[i] == left) {
      ++depth;
    } else if (text[i] == right && --depth == 0) {
      return i + 1;
    }
  }
  throw std::runtime_error("unbalanced device source");
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

// Device text for a host compiler: no #line, no assembly, and none of the functions that device_emulation.h has instead.
std::string on_host(std::string text) {
  std::string lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);)
    if (!line.starts_with("#line")) lines += line + '\n';
  text = std::move(lines);
  for (const char* start : {"asm volatile(", "asm("})
    for (std::size_t at = 0; (at = text.find(start, at)) != std::string::npos;) {
      const std::size_t open = at + std::string(start).size() - 1;
      text.replace(at, text.find(';', behind(text, open, '(', ')')) + 1 - at, ";");
    }
  for (const char* name : {"shared_address",
                           "barrier_init",
                           "barrier_init_done",
                           "barrier_arrive",
                           "barrier_expect",
                           "barrier_wait",
                           "copy_bulk",
                           "copy_box",
                           "copy_async",
                           "copy_part",
                           "copy_async_commit",
                           "copy_async_wait",
                           "wgmma_fence",
                           "wgmma_commit",
                           "wgmma_wait",
                           "wgmma_shared",
                           "wgmma_step",
                           "loaders_barrier",
                           "to_tf32",
                           "fence_shared_for_wgmma",
                           "nearest",
                           "nearest_tf32",
                           "store_matrices",
                           "store_16",
                           "take_registers",
                           "give_registers",
                           "narrow_pair",
                           "load_turned_matrices",
                           "meet",
                           "come"}) {
    const std::string call = ' ' + std::string(name) + '(';
    for (std::size_t at = 0; (at = text.find(call, at)) != std::string::npos; ++at) {
      std::size_t begin = text.rfind('\n', at) + 1;
      if (text.compare(begin, 10, "__device__") != 0) continue;
      const std::size_t above = text.rfind('\n', begin - 2) + 1;
      if (text.compare(above, 8, "template") == 0) begin = above;
      const std::size_t body = text.find('{', behind(text, at + call.size() - 1, '(', ')'));
      text.erase(begin, behind(text, body, '{', '}') - begin);
      at = begin;
    }
  }
  const std::size_t widen = text.find("__device__ __forceinline__ float widen(f16_t x)");
  text.replace(widen, behind(text, text.find('{', widen), '{', '}') - widen,
               "inline float widen(f16_t x) { return emulated_f16(x.bits); }");
  replace_all(text, "return Narrow<S>::of(x);", "return emulated_narrow<S>(x);");
  replace_all(text, "template <typename S, typename A>\n",
              "template <typename S> S emulated_narrow(float x);\n"
              "template <typename S> unsigned narrow_pair(float low, float high) {\n"
              "  return emulated_narrow<S>(low).bits | static_cast<unsigned>(emulated_narrow<S>(high).bits) << 16;\n"
              "}\n"
              "template <typename S, typename A>\n");
  for (const char* alignment : {"128", "1024"})
    replace_all(text, "extern __shared__ __align__(" + std::string(alignment) + ") uint4 shared[];",
                "uint4* shared = reinterpret_cast<uint4*>(emulated_memory);");
  replace_all(text, "extern \"C\" __global__ void", "void");
  return text;
}

std::string definition(const std::string& text, const std::string& name) {
  const std::string start = "#define " + name + ' ';
  const std::size_t at = text.find(start);
  if (at == std::string::npos) throw std::runtime_error("the prelude does not define " + name);
  return text.substr(at + start.size(), text.find('\n', at) - at - start.size());
}

std::string list(const Dims& dims) {
  return std::to_string(dims[0]) + ',' + std::to_string(dims[1]) + ',' + std::to_string(dims[2]);
}

constexpr const char* kNarrowing =
    "template <> float emulated_narrow<float>(float x) { return x; }\n"
    "template <> f16_t emulated_narrow<f16_t>(float x) { return {emulated_f16_of(x)}; }\n"
    "template <> bf16_t emulated_narrow<bf16_t>(float x) { return {emulated_bf16_of(x)}; }\n";

std::string sizes(const Problem& problem, int offset) {
  return "#define EMULATED_BATCH " + std::to_string(problem.batch) + "\n#define EMULATED_OFFSET " +
         std::to_string(offset) + "\n#define EMULATED_INPUT " + list(problem.input) + "\n#define EMULATED_OUTPUT " +
         list(output_size(problem)) + '\n';
}

std::string emulated_type(DType dtype) {
  return std::string("EmulatedType::") + (dtype == DType::f32 ? "tf32" : dtype == DType::f16 ? "f16" : "bf16");
}

// The unit that a launch takes for tensors that start so many elements behind a 16-byte boundary.
const Unit& unit_for(const std::vector<Unit>& units, const Problem& problem, int offset) {
  const bool aligned = static_cast<std::size_t>(offset) * size_of(problem.dtype) % 16 == 0;
  return !aligned && units.back().on_demand ? units.back() : units[0];
}

// The complete program of ring_gemm_sm90 on a problem: emulation, device source, weights' packing, main.
std::string program(const Problem& problem, const Step& step, int offset) {
  const std::vector<Unit> units = step.kernel->units(step);
  const std::string kernel = on_host(cuda::program_text(unit_for(units, problem, offset))),
                    packing = on_host(cuda::program_text(units[1]));
  std::ostringstream text;
  text << "#include \"device_emulation.h\"\n"
       << "inline void wgmma_shared(float (&sum)[" << definition(kernel, "RG_N") << " / 2], unsigned long long a, "
       << "unsigned long long b, int accumulate) { emulated_wgmma(sum, a, b, accumulate != 0, "
       << emulated_type(problem.dtype) << "); }\n"
       << kernel << kNarrowing << "#define RG_ENTRY_TAP " << definition(packing, "RG_ENTRY_TAP")
       << "\n#define RG_ENTRY_PASS " << definition(packing, "RG_ENTRY_PASS") << "\n#define RG_ENTRY_COUNT "
       << definition(packing, "RG_ENTRY_COUNT") << "\n#define RG_PACK_SOURCE " << definition(packing, "RG_PACK_SOURCE")
       << "\nnamespace pack {\n"
       << packing.substr(packing.find("__constant__ int rg_entry_pass")) << "}\n"
       << sizes(problem, offset) << "#include \"ring_gemm_emulation.h\"\n";
  return text.str();
}

// The complete program of ring_gemm_grad_weight_sm90.
std::string grad_weight_program(const Problem& problem, const Step& step, int offset) {
  const std::string kernel = on_host(cuda::program_text(unit_for(step.kernel->units(step), problem, offset)));
  std::ostringstream text;
  text << "#include \"device_emulation.h\"\n"
       << "inline void wgmma_step(float (&sum)[" << definition(kernel, "RW_N")
       << " / 2], const unsigned (&rows)[4], unsigned long long columns) { emulated_wgmma(sum, rows, columns); }\n"
       << kernel << kNarrowing << sizes(problem, offset) << "#include \"ring_gemm_grad_weight_emulation.h\"\n";
  return text.str();
}

// The complete program of box_gemm_grad_weight_sm90: emulation, device source, copies, main.
std::string box_program(const Problem& problem, const Step& step, int offset) {
  const std::vector<Unit> units = step.kernel->units(step);
  const std::string kernel = on_host(cuda::program_text(units[0]));
  std::ostringstream text;
  text << "#include \"device_emulation.h\"\n"
       << "inline void wgmma_shared(float (&sum)[" << definition(kernel, "BW_N") << " * "
       << definition(kernel, "BW_COLUMNS") << " / 2], unsigned long long a, unsigned long long b, int accumulate) { "
       << "emulated_wgmma(sum, a, b, accumulate != 0, " << emulated_type(problem.dtype) << ", "
       << (definition(kernel, "BW_POSITIONS_INNER") == "1" ? "false" : "true") << "); }\n"
       << kernel << kNarrowing;
  const std::string finish = on_host(cuda::program_text(units[1]));
  const bool by_fragments = units[1].entry == "box_gemm_finish";
  text << "#define EMULATED_BY_FRAGMENTS " << by_fragments << "\n#define TG_BOXES 1\n#define TG_BLOCK_FLOATS "
       << definition(finish, "TG_BLOCK_FLOATS") << "\n#define BW_FINISH_THREADS "
       << definition(finish, "BW_FINISH_THREADS") << "\nnamespace finish {\n"
       << finish.substr(finish.find(by_fragments ? "constexpr int kTaps =" : "struct Weight")) << "}\n";
  const std::string sums = on_host(cuda::program_text(units[2]));
  text << "namespace bias {\n" << sums.substr(sums.find("constexpr int kThreads")) << "}\n";
  if (units.size() > 4) {
    const std::string packing = on_host(cuda::program_text(units[4]));
    for (const char* name : {"BW_CLASS", "BW_FOLD_OFFSET", "BP_TW", "BP_ROWS", "BP_LOW", "BP_REACH", "BP_INPUT_LOT",
                             "BP_GRAD_LOT", "BP_SHARED"})
      text << "#define " << name << ' ' << definition(packing, name) << '\n';
    text << "namespace pack {\n" << packing.substr(packing.find("struct PackSide")) << "}\n";
  }
  text << sizes(problem, offset) << "#include \"box_gemm_grad_weight_emulation.h\"\n";
  return text.str();
}

// The complete program of line_gemm_grad_weight_sm90: emulation, device source, the sums' finish, main.
std::string line_program(const Problem& problem, const Step& step, int offset) {
  const std::vector<Unit> units = step.kernel->units(step);
  const std::string kernel = on_host(cuda::program_text(units[0])), finish = on_host(cuda::program_text(units[1]));
  std::ostringstream text;
  text << "#include \"device_emulation.h\"\n"
       << "inline void wgmma_shared(float (&sum)[" << definition(kernel, "LG_N") << " / 2], unsigned long long a, "
       << "unsigned long long b, int accumulate) { emulated_wgmma(sum, a, b, accumulate != 0, "
       << emulated_type(problem.dtype) << ", true); }\n"
       << kernel << kNarrowing;
  for (const char* name : {"TG_LINES", "TG_SLICES", "TG_BN", "TG_BLOCKS_M", "TG_BLOCKS_N", "TG_BLOCK_FLOATS", "TG_SETS",
                           "TG_SET_PIECE", "TG_SET_TAP"})
    text << "#define " << name << ' ' << definition(finish, name) << '\n';
  text << "namespace finish {\n"
       << finish.substr(finish.find("#if TG_LINES")) << "}\n"
       << sizes(problem, offset) << "#include \"line_gemm_grad_weight_emulation.h\"\n";
  return text.str();
}

struct Case {
  const char* problem;
  const char* config;  // empty: the planner's
  int offset = 0;      // elements that tensors begin behind a 16-byte boundary
};

void PrintTo(const Case& given, std::ostream* out) { *out << given.config << " on " << given.problem; }

class Emulation : public testing::TestWithParam<Case> {};
class GradWeightEmulation : public testing::TestWithParam<Case> {};
class BoxEmulation : public testing::TestWithParam<Case> {};
class LineEmulation : public testing::TestWithParam<Case> {};

void run(const Case& given, const std::string& kernel, std::string (*make_program)(const Problem&, const Step&, int)) {
  const auto [problem, epilogue] = parse_problem_and_epilogue(given.problem);
  const std::string only = kernel + (*given.config != 0 ? ":" : "") + given.config;
  const auto chosen = plan(problem, epilogue, known_device("h200"), only);
  const std::string text =
      make_program(problem, chosen->steps[static_cast<std::size_t>(chosen->conv_step)], given.offset);

  char folder[] = "/tmp/tconv_emulation_XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  const fs::path path(folder);
  std::ofstream(path / "program.cpp") << text;
  const std::string build = std::string(TCONV_CXX) + " -std=c++20 -O1 -w -pthread -I" TCONV_TESTS_DIR " " +
                            (path / "program.cpp").string() + " -o " + (path / "program").string() + " 2>" +
                            (path / "errors").string();
  auto content = [&](const char* name) {
    std::ifstream file(path / name);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const bool built = std::system(build.c_str()) == 0;
  EXPECT_TRUE(built) << content("errors").substr(0, 3000);
  if (built) {
    const int status = std::system(((path / "program").string() + " >" + (path / "output").string()).c_str());
    EXPECT_EQ(status, 0) << only << " on " << given.problem << '\n' << content("output");
  }
  fs::remove_all(path);
}

TEST_P(Emulation, RingGemm) { run(GetParam(), "ring_gemm_sm90", program); }
TEST_P(GradWeightEmulation, RingGemm) { run(GetParam(), "ring_gemm_grad_weight_sm90", grad_weight_program); }
TEST_P(BoxEmulation, BoxGemm) { run(GetParam(), "box_gemm_grad_weight_sm90", box_program); }
TEST_P(LineEmulation, LineGemm) { run(GetParam(), "line_gemm_grad_weight_sm90", line_program); }

// Vector and gathered staging, both layouts, resident and reloaded chunks, folded widths, passes as items, empty passes,
// images as rows, runs side by side, three and seven warps that load, odd offsets.
INSTANTIATE_TEST_SUITE_P(
    Cases, Emulation,
    testing::Values(Case{"2d b2 c64>64 i19x44 t3x3 tf32 | bias", "64x184x16,s3,w16"},
                    Case{"2d c64>64 i18x44 t3x3 grad_input tf32", "64x120x16,s7,w20", 1},
                    Case{"2d c20>24 i15x41 t3x3 f16", "64x64x16,s3,w20", 3}, Case{"2d c64>72 i16x42 t3x3 f16", ""},
                    Case{"2d c64>64 i15x41 t3x3 f16 channels_last | bias", ""},
                    Case{"2d c64>40 i15x21 t3x3 tf32 channels_last", ""},
                    Case{"2d c48>21 i15x21 t3x3 bf16 channels_last grad_input", ""},
                    Case{"3d c32>32 i3x8x12 t3x3x3 s2 p1 tf32", "64x120x16,s3,w20"},
                    Case{"3d c64>64 i3x6x9 t3x3x3 s2 p1 f16 channels_last", "64x64x16,s3,w20"},
                    Case{"3d c32>32 i4x8x12 t3x3x3 s2 p1 op1 grad_input tf32", ""},
                    Case{"3d c32>64 i3x5x8 t3x3x3 s2 p1 d2 tf32", "64x32x16,s7,w20,k1"},
                    Case{"2d b2 c32>64 i8x12 t3x3 s5 p1 d2 tf32 | bias", ""},
                    Case{"1d b5 c64>32 i60 t16 s8 p4 tf32", ""}, Case{"1d c64>32 i200 t16 s8 p4 f16", ""},
                    Case{"2d c56>1 i12x16 t9x9 s4 p4 op3 tf32", "256x120x8,s7,w20"},
                    Case{"2d b2 g2 c32>16 i16x20 t3x3 tf32", ""},
                    // rows by the copy engine, turned by the warps
                    Case{"2d c64>72 i16x40 t3x3 f16", "64x120x32,s3,w20"},
                    Case{"2d b2 c24>40 i15x24 t3x3 s2 p1 op1 bf16 grad_input", "64x64x16,s7,w20"},
                    Case{"3d c32>32 i4x8x12 t3x3x3 s2 p1 op1 grad_input tf32", "64x32x8,s7,w20"},
                    Case{"2d b2 g2 c64>32 i16x20 t3x3 tf32 | bias", "64x64x32,s3,w20"},
                    Case{"1d b5 c64>64 i64 t5 d2 tf32", "64x120x32,s3,w20"},
                    Case{"1d b2 c64>64 i256 t3 tf32", "64x120x32,s7,w20"},
                    // rows of 1d layers so long that images are no rows of a tile
                    Case{"1d b2 c16>16 i4097 t3 f16 grad_input", "64x136x8,s1,w20"},
                    Case{"1d b2 c16>24 i4099 t3 p1 f16", "64x120x8,s7,w20", 1},
                    // results handed over as 16 bits, in both layouts and with two width phases; early epilogues
                    Case{"2d c24>40 i9x20 t4x4 s2 p1 f16 | bias", "64x64x16,s3,w20"},
                    Case{"2d c32>24 i9x21 t4x4 s2 p1 bf16 channels_last | bias add_channel", "64x120x16,s3,w20"},
                    Case{"2d b2 c32>40 i9x40 t3x3 f16 | bias add_channel", "64x120x16,s7,w20"},
                    Case{"2d c32>40 i9x21 t3x3 bf16 channels_last | bias add_channel", "64x120x16,s3,w20"},
                    Case{"2d c32>40 i9x21 t3x3 s2 tf32 | bias add_channel", "64x64x16,s3,w20"},
                    Case{"2d c32>40 i9x21 t3x3 s3 tf32 channels_last | bias add_channel", "64x64x16,s3,w20"},
                    Case{"2d c32>40 i9x21 t2x2 s3 f16 | bias add_channel", "64x64x16,s3,w20"},
                    // a tile that the config states
                    Case{"3d c32>32 i2x3x64 t3x3x3 s2 p1 tf32", "64x64x16,s7,w24,t2x64,b4"},
                    // blocks that walk along the depth, or the height; tensors that the copy engine cannot take
                    Case{"3d b2 c32>32 i5x3x64 t3x3x3 s2 p1 tf32", "64x128x16,s7,w20,k4,t2x64"},
                    Case{"3d c32>40 i6x3x32 t3x3x3 p1 tf32 | bias", "64x128x16,s3,w20,k4"},
                    Case{"3d b3 c32>24 i4x3x9 t5x3x3 s2x1x1 p1 d2x1x1 f16", "64x128x16,s7,w20,k4"},
                    Case{"3d c32>32 i6x5x12 t3x3x3 s2 p1 op1 grad_input tf32", "64x128x16,s7,w20,k4"},
                    Case{"2d b2 c64>64 i15x41 t3x3 f16 channels_last | bias", "64x136x32,s1,w20,k4"},
                    Case{"2d c64>64 i9x41 t3x3 f16 channels_last", "64x200x32,s1,w16,k4", 1},
                    Case{"2d b2 c24>72 i9x40 t3x3 tf32 | bias", "64x96x16,s1,w20,k6"},
                    Case{"2d b3 c64>72 i7x44 t3x3 tf32 | bias", "64x128x32,s7,w20,k6"},
                    Case{"2d c64>64 i7x43 t3x3 tf32", "64x128x32,s3,w20,k4", 1},
                    Case{"2d b3 c40>64 i7x44 t4x4 s2 p1 bf16 channels_last", "64x128x16,s3,w20,k4"},
                    // passes of the width phases that have the same shifts
                    Case{"1d b5 c64>32 i40 t16 s8 p4 tf32 | bias", "64x96x32,s1,w20,k9"},
                    Case{"1d c64>40 i60 t16 s8 p4 f16", "64x136x32,s1,w20,k10"},
                    // two row blocks at the same positions; the last one alone
                    Case{"2d c32>160 i9x20 t3x3 tf32 | bias", "64x120x16,s3,w20,k2"},
                    // the copy engine: as the tensor is, from a copy, gathered, stepped, in parts
                    Case{"2d b2 c64>64 i15x41 t3x3 f16 channels_last", "64x136x32,s1,w20"},
                    Case{"2d c40>24 i15x21 t3x3 bf16 channels_last | bias", "64x48x16,s1,w20"},
                    Case{"2d c64>64 i15x21 t3x3 f16 channels_last", "64x48x32,s1,w20", 1},
                    Case{"2d b2 c96>128 i9x13 t2x2 s2 tf32 | bias", "64x200x32,s1,w16,k2"},
                    Case{"2d b2 g2 c48>80 i9x13 t3x3 s2 p1 f16", "64x96x16,s1,w20,k3"},
                    Case{"1d b5 g2 c64>128 i40 t16 s8 p4 tf32", "64x136x32,s1,w20,k2"},
                    Case{"3d b2 c64>32 i4x9x10 t3x3x3 s2 p1 f16 channels_last grad_input", "64x96x16,s1,w20"},
                    Case{"2d c16>3 i20x30 t4x4 s2 p1 f16 channels_last", "256x200x8,s1,w16"}));

// Copies of 16, 8 and 4 bytes, rows of grad_output at every phase, strips and shares that end anywhere, taps of one row
// and of several residues, more taps than a block sums, groups, channels that do not fill their rows and columns.
INSTANTIATE_TEST_SUITE_P(Cases, GradWeightEmulation,
                         testing::Values(Case{"2d b2 c64>64 i9x72 t3x3 grad_weight tf32", "64x64x128,s2,w12"},
                                         Case{"2d c20>24 i7x22 t3x3 p1 grad_weight tf32", "", 1},
                                         Case{"2d c40>40 i7x125 t3x3 p1 grad_weight tf32", "64x48x128,s2,w12,k4", 1},
                                         Case{"2d c40>72 i5x37 t3x5 s2x3 p1x2 d2x1 grad_weight tf32",
                                              "128x64x128,s2,w8"},
                                         Case{"3d b2 c9>33 i3x4x12 t3x3x3 s2 p1 grad_weight tf32", "", 3},
                                         Case{"3d c12>8 i3x5x20 t2x2x2 s2 grad_weight tf32", ""},
                                         Case{"1d b5 c40>16 i60 t16 s8 p4 grad_weight tf32", ""},
                                         Case{"1d b3 c24>8 i65 t3 p2 d2 grad_weight tf32", "", 2},
                                         Case{"2d b2 g2 c32>16 i6x20 t4x4 s2 p1 grad_weight tf32", ""},
                                         Case{"2d c8>1 i6x16 t9x9 s4 p4 op3 grad_weight tf32", ""},
                                         Case{"2d c32>64 i8x12 t3x3 s5 p1 d2 grad_weight tf32", ""}));

// Tensors as they are, with steps and gathered; copies with channels or positions innermost; taps as rows and as columns,
// pieces of all widths, several classes of rows, more pieces than taps, groups, padded channels, several flushes.
INSTANTIATE_TEST_SUITE_P(
    Cases, BoxEmulation,
    testing::Values(Case{"2d b2 c64>64 i9x13 t3x3 f16 channels_last grad_weight", "64x256x64,s2,w4"},
                    Case{"2d b3 c72>40 i5x6 t2x2 s2 f16 channels_last grad_weight", "128x64x64,s2,w8"},
                    Case{"2d b2 c40>136 i7x6 t3x3 s2 p1 op1 bf16 channels_last grad_weight", "256x64x64,s2,w8,k1"},
                    Case{"2d c72>24 i7x6 t3x3 s5 p1 d2 f16 channels_last grad_weight", "64x128x64,s2,w4", 1},
                    Case{"3d b2 g2 c16>24 i3x4x5 t3x3x3 s2 p1 f16 channels_last grad_weight", "64x64x64,s2,w4"},
                    Case{"2d b2 c20>3 i6x9 t4x4 s2 p1 f16 channels_last grad_weight", "64x64x64,s2,w4"},
                    Case{"2d c24>1 i9x16 t9x9 s4 p4 op3 f16 channels_last grad_weight", "64x256x64,s2,w4"},
                    Case{"2d b2 g4 c32>32 i6x9 t3x3 s2 p1 f16 channels_last grad_weight", "64x32x64,s2,w4,k3"},
                    Case{"2d b2 c72>40 i5x6 t2x2 s2 f16 grad_weight", "128x128x64,s2,w8,k1"},
                    Case{"1d b5 c40>72 i30 t16 s8 p4 bf16 grad_weight", "64x256x64,s2,w4", 1},
                    Case{"1d b5 c80>40 i30 t16 s8 p4 grad_weight tf32", "192x144x64,s2,w12,k1"},
                    Case{"2d c24>1 i9x14 t9x9 s4 p4 op3 grad_weight tf32", "64x256x64,s2,w4"},
                    Case{"3d b2 c96>33 i3x4x7 t3x3x3 s2x1x2 p1 d1x2x1 grad_weight tf32", "128x64x64,s2,w8"},
                    Case{"2d b2 g2 c40>24 i5x9 t2x2 s2 channels_last grad_weight tf32", "64x64x64,s2,w4"},
                    Case{"2d b4 c64>64 i16x40 t2x2 s2 grad_weight tf32", "256x64x64,s2,w16,k1"}));

// Rows that end amid a stride, in a tile and in the overlap of two; pieces that hold parts of two positions; windows of one
// to three stages, with rows that no tap needs; slices of depths, blocks of channels, gathered tensors.
INSTANTIATE_TEST_SUITE_P(
    Cases, LineEmulation,
    testing::Values(Case{"3d b2 c32>32 i3x5x20 t3x3x3 s2 p1 f16 channels_last grad_weight", "64x32x64,s2,w12"},
                    Case{"3d c32>32 i3x4x17 t3x3x3 s2 p1 op1 bf16 channels_last grad_weight", "64x32x64,s2,w8", 1},
                    Case{"2d b2 c64>64 i7x40 t3x3 f16 channels_last grad_weight", "64x64x64,s2,w12"},
                    Case{"2d c72>64 i6x33 t3x3 s2 p1 f16 channels_last grad_weight", "64x32x64,s2,w8"},
                    Case{"2d b2 c16>40 i5x34 t4x4 s3x2 p1 f16 channels_last grad_weight", "64x16x64,s2,w8"},
                    Case{"2d c16>24 i5x37 t2x3 s3 p0x2 d1x2 bf16 channels_last grad_weight", "64x16x64,s2,w12"},
                    Case{"3d c32>64 i3x4x9 t3x3x3 s2 p1 d2 f16 channels_last grad_weight", "64x32x64,s2,w12"},
                    Case{"2d c64>64 i5x18 t4x4 s2 p1 f16 channels_last grad_weight", "64x64x64,s2,w12"},
                    Case{"1d b3 c40>8 i70 t5 s4 p2 f16 channels_last grad_weight", "64x64x128,s2,w12"},
                    Case{"2d c16>8 i3x5 t2x2 s2x16 p0x4 f16 channels_last grad_weight", "64x16x64,s2,w12"}));

}  // namespace
}  // namespace tconv
