// driver.h — libcuda and libnvrtc, opened at run time; the few types and calls that tconv uses, declared by hand so that
// building needs no CUDA toolkit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernel.h"

namespace tconv::cuda {

// A compiled device function, loaded into the primary context of one device.
struct Function {
  void* handle = nullptr;  // CUfunction
  int device = 0;
  std::size_t shared_bytes = 0;  // dynamic shared memory that every launch uses
  int threads = 0;
  bool starts_early = false;  // launch_behind() makes a difference
};

// What the compiler says of one unit.
struct BuildReport {
  int registers = 0;
  std::size_t static_shared_bytes = 0;
  std::size_t spill_bytes = 0;  // stores + loads; 0 is required in CI
  std::size_t stack_bytes = 0;
  double seconds = 0;
  bool from_cache = false;
};

// A folder to look in for libnvrtc before the system's: the wheels that PyTorch depends on keep it in nvidia/cu13/lib or
// nvidia/cuda_nvrtc/lib. Has an effect until libnvrtc is first needed. The variable TCONV_NVRTC_PATH goes first.
void add_search_path(std::string folder);
// Empty when libnvrtc can be used, otherwise why not: what was looked for and what was found.
std::string missing_compiler();

// Text of an embedded device source ("phase_gemm_sm80.cu", "epilogue.cuh"); throws when there is none of that name.
std::string_view embedded_source(std::string_view name);

// The complete text that the compiler sees: the prelude, then the source, every #include "name" of an embedded file
// replaced by its text where it first occurs. A source that contains TCONV_ENTRY_ is compiled once per entry, with
// TCONV_ENTRY_<entry> defined; any other once for all its entries.
std::string program_text(const Unit& unit);

// NVRTC to machine code, through the disk cache. Needs no GPU. `arch` is "sm_80", "sm_90a" ...
std::string compile(const Unit& unit, std::string_view arch, BuildReport* report = nullptr);
// The target for a device: 90 -> "sm_90a", otherwise "sm_<cc>".
std::string arch_of(const Device& device);

// Compiles (or finds) and loads; one shared instance per (unit, device) in the process.
std::shared_ptr<const Function> load(const Unit& unit, const Device& device);

// What is loaded from now on is compiled or read from the disk cache again, as in a new process; for measurements of that.
void forget_functions();

// Makes the device's primary context current for its own life; does nothing when it is already, which is the usual case. A
// thread that has used no CUDA yet (PyTorch's backward threads at first) has none, and tensor maps need one.
class Current {
 public:
  explicit Current(int device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  bool pushed_ = false;
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};
// Enqueues on the stream in the device's primary context. `args` point to the parameter values.
void launch(const Function& function, Grid grid, Stream stream, void* const* args);
// The same for a kernel that calls wait_for_kernel_before() (convert.cuh) before it touches memory: its start overlaps with
// the end of the kernel before it, where the device can do that.
void launch_behind(const Function& function, Grid grid, Stream stream, void* const* args);
// How many clusters of so many blocks, the size that the kernel states, run at a time; 0 where the driver cannot say.
int active_clusters(const Function& function, int blocks);
// cuMemsetD8Async on the stream.
void fill_zero(const Device& device, void* pointer, std::size_t bytes, Stream stream);

// Memory, copies and time for tools and tests; execute uses none of them. The copies wait for the whole device first.
void* allocate(const Device& device, std::size_t bytes);
void release(const Device& device, void* pointer) noexcept;
void copy_to_device(const Device& device, void* to, const void* from, std::size_t bytes);
void copy_to_host(const Device& device, void* to, const void* from, std::size_t bytes);
void synchronize(const Device& device);

// Time between two points of a stream, by events.
class Stopwatch {
 public:
  explicit Stopwatch(const Device& device);
  ~Stopwatch();
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  void start(Stream stream);
  void stop(Stream stream);
  double microseconds();  // waits for stop

 private:
  int device_;
  void* start_ = nullptr;
  void* stop_ = nullptr;
};

// A unit on demand, loaded by the first launch that needs it.
class LateFunction {
 public:
  explicit LateFunction(Unit unit) : unit_(std::move(unit)) {}
  const Function& get(const Device& device) {
    std::call_once(once_, [&] { function_ = load(unit_, device); });
    return *function_;
  }

 private:
  Unit unit_;
  std::once_flag once_;
  std::shared_ptr<const Function> function_;
};

// Step::state of CUDA kernels: the functions of units(step), in that order; units on demand are the last.
struct Loaded {
  std::vector<std::shared_ptr<const Function>> functions;
  std::vector<std::shared_ptr<LateFunction>> on_demand;
};
// For the prepare of every CUDA kernel.
Loaded load_units(const Step& step);
inline const Loaded& loaded_of(const Step& step) { return *static_cast<const Loaded*>(step.state.get()); }
inline const Function& function(const Step& step, std::size_t index = 0) { return *loaded_of(step).functions[index]; }
// The same with the kernel's geometry, worked out when the plan is made instead of in every launch.
template <class Geometry>
struct LoadedWith : Loaded {
  Geometry geometry;
};
template <class Geometry>
Geometry& prepare_with(Step& step, Geometry geometry) {
  auto state = std::make_shared<LoadedWith<Geometry>>(load_units(step), std::move(geometry));
  step.state = std::shared_ptr<Loaded>(state);
  return state->geometry;
}
template <class Geometry>
const Geometry& prepared(const Step& step) {
  return static_cast<const LoadedWith<Geometry>&>(loaded_of(step)).geometry;
}

// What a kernel knows of the problem alone, kept from one config to the next: the planner asks for all configs of a problem
// in a row, and the tables of phases and taps take longer than the rest of a price.
template <class Geometry>
const Geometry& of_last_problem(const Problem& problem, Geometry (&layer_geometry)(const Problem&)) {
  thread_local Problem last;
  thread_local std::optional<Geometry> geometry;
  if (!geometry || !(last == problem)) {
    geometry = layer_geometry(problem);
    last = problem;
  }
  return *geometry;
}

// The host's part of Divisor in convert.cuh.
struct Divisor {
  std::uint32_t divisor, multiplier, shift;
};
inline Divisor divisor_of(std::int64_t divisor) {
  std::uint32_t shift = 0;
  while ((std::int64_t{1} << shift) < divisor) ++shift;
  const std::uint64_t d = static_cast<std::uint64_t>(divisor);
  const std::uint64_t multiplier = (((std::uint64_t{1} << shift) - d) << 32) / d + 1;
  return {static_cast<std::uint32_t>(d), static_cast<std::uint32_t>(multiplier), shift};
}

// `#define` lines that all kernels share: dtype, layout, channels per group, taps, stride, padding, dilation, and the
// epilogue: a generated `__device__ T tconv_epilogue(T x, int channel, long long element, const Operands&)` for the
// pointwise operations of step.epilogue.ops (those before the norm, if there is one), and `tconv_pre(T x)` for pre.
// epilogue.cuh lists all that is defined.
std::string layer_prelude(const Step& step);

}  // namespace tconv::cuda
