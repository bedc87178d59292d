// driver.cpp — libcuda at run time: devices, primary contexts, modules, launches.
// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <future>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "jit.h"
#include "libcuda.h"

namespace tconv::cuda {
namespace {

// The oldest driver whose CUDA has all that the kernels use (sm_90, cuLaunchKernel with 227 KB of shared memory).
constexpr int kOldestDriver = 11080;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Libcuda open_libcuda() {
  Libcuda cuda;
  void* handle = nullptr;
  for (const char* name : {"libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "libcuda.so"}) {
    handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle) break;
  }
  if (!handle) {
    cuda.failure =
        "CUDA: the NVIDIA driver is not installed: libcuda.so.1 cannot be opened. Needed: a driver for CUDA " +
        version_text(kOldestDriver) + " or newer";
    return cuda;
  }
  std::string missing;
  auto find = [&](auto& pointer, const char* name) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(dlsym(handle, name));
    if (!pointer && missing.empty()) missing = name;
  };
#define TCONV_FIND(symbol, member) find(cuda.member, #symbol);
  TCONV_LIBCUDA(TCONV_FIND)
#undef TCONV_FIND
  cuda.tensor_map = reinterpret_cast<decltype(cuda.tensor_map)>(dlsym(handle, "cuTensorMapEncodeTiled"));
  cuda.active_clusters =
      reinterpret_cast<decltype(cuda.active_clusters)>(dlsym(handle, "cuOccupancyMaxActiveClusters"));
  cuda.launch_with = reinterpret_cast<decltype(cuda.launch_with)>(dlsym(handle, "cuLaunchKernelEx"));
  if (cuda.driver_version_of) cuda.driver_version_of(&cuda.driver_version);
  if (!missing.empty() || cuda.driver_version < kOldestDriver) {
    cuda.failure = "CUDA: the NVIDIA driver is too old: found one for CUDA " + version_text(cuda.driver_version) +
                   (missing.empty() ? "" : " without " + missing) + ", needed is CUDA " + version_text(kOldestDriver) +
                   " or newer";
    return cuda;
  }
  if (const int code = cuda.init(0)) {
    const char* text = nullptr;
    cuda.error_text(code, &text);
    cuda.failure = std::string("CUDA: the driver does not start: ") + (text ? text : "unknown error");
  }
  return cuda;
}

constexpr int kMaxDevices = 64;

// The primary context of a device, retained once and for the life of the process: PyTorch and the CUDA runtime use the
// same one, so their memory and streams are valid in it.
CUcontext primary_context(int device) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<CUcontext, kMaxDevices> contexts{};
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("CUDA: no device " + std::to_string(device));
  std::call_once(once[device], [&] {
    const Libcuda& cuda = libcuda();
    int handle = 0;
    check(cuda.device_get(&handle, device), "cuDeviceGet");
    check(cuda.primary_retain(&contexts[device], handle), "cuDevicePrimaryCtxRetain");
  });
  return contexts[device];
}

// Loaded code, kept for the life of the process. Never destroyed: at exit the driver may already be gone.
struct Module {
  CUmodule handle = nullptr;
  std::map<std::string, std::size_t> shared_limit;  // entry -> largest dynamic shared memory asked for
};

struct Registry {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_future<std::shared_ptr<const Function>>> functions;
  std::map<std::pair<int, std::string>, Module> modules;  // by device and machine code
};
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

std::shared_ptr<const Function> load_now(const Unit& unit, const Device& device) {
  const Libcuda& cuda = libcuda();
  const std::string code = compile(unit, arch_of(device));
  Current current(device.index);
  std::lock_guard lock(registry().mutex);
  Module& module = registry().modules[{device.index, code}];
  if (!module.handle) {
    if (const int error = cuda.module_load(&module.handle, code.data())) {
      registry().modules.erase({device.index, code});
      const char* text = nullptr;
      cuda.error_text(error, &text);
      throw std::runtime_error("CUDA: the driver (CUDA " + version_text(cuda.driver_version) + ") cannot load " +
                               unit.source + " compiled for " + arch_of(device) + ": " +
                               (text ? text : "unknown error"));
    }
  }
  auto function = std::make_shared<Function>();
  function->device = device.index;
  function->shared_bytes = unit.shared_bytes;
  function->threads = unit.threads;
  // Stream capture knows early starts since CUDA 12.3, devices since 9.0.
  function->starts_early = cuda.launch_with && cuda.driver_version >= 12030 && device.compute_capability >= 90;
  CUfunction handle = nullptr;
  check(cuda.module_function(&handle, module.handle, unit.entry.c_str()), "cuModuleGetFunction of " + unit.entry);
  function->handle = handle;
  std::size_t& limit = module.shared_limit[unit.entry];
  if (unit.shared_bytes > limit) {
    limit = unit.shared_bytes;
    // 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 9: the share of L1 preferred as shared memory, in percent.
    // Below 48 KB, what a kernel declares itself included, the driver's own choice leaves L1 to those that read through
    // it.
    if (limit > 47 * 1024) {
      check(cuda.function_attribute(handle, 8, static_cast<int>(limit)), "cuFuncSetAttribute");
      check(cuda.function_attribute(handle, 9, unit.shared_percent), "cuFuncSetAttribute");
    }
  }
  return function;
}

}  // namespace

Current::Current(int device) {
  const Libcuda& cuda = libcuda();
  CUcontext wanted = primary_context(device), now = nullptr;
  check(cuda.context_get(&now), "cuCtxGetCurrent");
  if (now == wanted) return;
  check(cuda.context_push(wanted), "cuCtxPushCurrent");
  pushed_ = true;
}
Current::~Current() {
  CUcontext popped;
  if (pushed_) libcuda().context_pop(&popped);
}

const Libcuda& libcuda_or_failure() noexcept {
  static const Libcuda* cuda = new Libcuda(open_libcuda());
  return *cuda;
}

const Libcuda& libcuda() {
  const Libcuda& cuda = libcuda_or_failure();
  if (!cuda.failure.empty()) throw std::runtime_error(cuda.failure);
  return cuda;
}

void check(int code, std::string_view call) {
  if (code == 0) return;
  const char* text = nullptr;
  libcuda().error_text(code, &text);
  throw std::runtime_error("CUDA: " + std::string(call) + ": " + (text ? text : "error " + std::to_string(code)));
}

std::shared_ptr<const Function> load(const Unit& unit, const Device& device) {
  std::string key = unit.source;
  key.append(1, '\0').append(unit.entry).append(1, '\0').append(unit.prelude).append(1, '\0');
  key.append(std::to_string(device.index)).append(1, ' ').append(std::to_string(unit.shared_bytes));
  key.append(1, ' ').append(std::to_string(unit.threads));
  std::promise<std::shared_ptr<const Function>> promise;
  std::shared_future<std::shared_ptr<const Function>> future;
  bool mine = false;
  {
    std::lock_guard lock(registry().mutex);
    auto [entry, inserted] = registry().functions.try_emplace(key);
    if (inserted) entry->second = promise.get_future().share();
    future = entry->second;
    mine = inserted;
  }
  if (mine) {
    try {
      promise.set_value(load_now(unit, device));
    } catch (...) {
      promise.set_exception(std::current_exception());
      std::lock_guard lock(registry().mutex);
      registry().functions.erase(key);  // the next call tries again
    }
  }
  return future.get();
}

void forget_functions() {
  forget_programs();
  std::lock_guard lock(registry().mutex);
  registry().functions.clear();
}

void load_all(std::span<Step* const> steps) {
  struct Program {
    Unit unit;
    const Device* device;
    std::size_t length;
  };
  std::vector<Program> programs;
  for (const Step* step : steps) {
    if (step->kernel->units == nullptr) continue;
    for (Unit& unit : step->kernel->units(*step)) {
      if (unit.on_demand) break;
      const std::size_t length = program_text(unit).size();
      programs.push_back({std::move(unit), &step->device, length});
    }
  }
  std::stable_sort(programs.begin(), programs.end(),
                   [](const Program& a, const Program& b) { return a.length > b.length; });
  std::vector<std::future<void>> others;
  for (std::size_t i = 1; i < programs.size(); ++i)
    others.push_back(std::async(std::launch::async, [&p = programs[i]] { load(p.unit, *p.device); }));
  if (!programs.empty()) load(programs[0].unit, *programs[0].device);
  for (std::future<void>& other : others) other.get();
}

Loaded load_units(const Step& step) {
  std::vector<Unit> units = step.kernel->units(step);
  Loaded loaded;
  const auto on_demand = std::find_if(units.begin(), units.end(), [](const Unit& unit) { return unit.on_demand; });
  for (auto unit = on_demand; unit != units.end(); ++unit)
    loaded.on_demand.push_back(std::make_shared<LateFunction>(std::move(*unit)));
  units.erase(on_demand, units.end());
  for (const Unit& unit : units) loaded.functions.push_back(load(unit, step.device));
  return loaded;
}

void launch(const Function& function, Grid grid, Stream stream, void* const* args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  Current current(function.device);
  check(libcuda().launch(static_cast<CUfunction>(function.handle), grid.x, grid.y, grid.z,
                         static_cast<unsigned>(function.threads), 1, 1, static_cast<unsigned>(function.shared_bytes),
                         static_cast<CUstream>(stream.handle), const_cast<void**>(args), nullptr),
        "cuLaunchKernel");
}

namespace {

LaunchConfig config_of(const Function& function, Grid grid) {
  LaunchConfig config;
  config.grid[0] = grid.x, config.grid[1] = grid.y, config.grid[2] = grid.z;
  config.block[0] = static_cast<unsigned>(function.threads);
  config.shared_bytes = static_cast<unsigned>(function.shared_bytes);
  return config;
}

}  // namespace

void launch_behind(const Function& function, Grid grid, Stream stream, void* const* args) {
  if (!function.starts_early) return launch(function, grid, stream, args);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  Current current(function.device);
  LaunchAttribute attribute;
  LaunchConfig config = config_of(function, grid);
  config.stream = static_cast<CUstream>(stream.handle);
  config.attributes = &attribute;
  config.num_attributes = 1;
  check(libcuda().launch_with(&config, static_cast<CUfunction>(function.handle), const_cast<void**>(args), nullptr),
        "cuLaunchKernelEx");
}

int active_clusters(const Function& function, int blocks) {
  Current current(function.device);
  const LaunchConfig config = config_of(function, {static_cast<unsigned>(blocks)});
  int clusters = 0;
  if (libcuda().active_clusters)
    check(libcuda().active_clusters(&clusters, static_cast<CUfunction>(function.handle), &config),
          "cuOccupancyMaxActiveClusters");
  return clusters;
}

void fill_zero(const Device& device, void* pointer, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  Current current(device.index);
  check(libcuda().memset(reinterpret_cast<CUdeviceptr>(pointer), 0, bytes, static_cast<CUstream>(stream.handle)),
        "cuMemsetD8Async");
}

void* allocate(const Device& device, std::size_t bytes) {
  Current current(device.index);
  CUdeviceptr pointer = 0;
  check(libcuda().allocate(&pointer, std::max<std::size_t>(bytes, 1)),
        "cuMemAlloc of " + std::to_string(bytes) + " bytes");
  return reinterpret_cast<void*>(pointer);
}

void release(const Device& device, void* pointer) noexcept {
  try {
    Current current(device.index);
    libcuda().release(reinterpret_cast<CUdeviceptr>(pointer));
  } catch (const std::exception&) {
    // The process is ending or the context is broken; an earlier call has reported it.
  }
}

void copy_to_device(const Device& device, void* to, const void* from, std::size_t bytes) {
  synchronize(device);
  Current current(device.index);
  if (bytes) check(libcuda().copy_in(reinterpret_cast<CUdeviceptr>(to), from, bytes), "cuMemcpyHtoD");
}

void copy_to_host(const Device& device, void* to, const void* from, std::size_t bytes) {
  synchronize(device);
  Current current(device.index);
  if (bytes) check(libcuda().copy_out(to, reinterpret_cast<CUdeviceptr>(from), bytes), "cuMemcpyDtoH");
}

void synchronize(const Device& device) {
  Current current(device.index);
  check(libcuda().synchronize(), "cuCtxSynchronize");
}

Stopwatch::Stopwatch(const Device& device) : device_(device.index) {
  Current current(device_);
  check(libcuda().event_create(&start_, 0), "cuEventCreate");
  check(libcuda().event_create(&stop_, 0), "cuEventCreate");
}
Stopwatch::~Stopwatch() {
  libcuda().event_destroy(start_);
  libcuda().event_destroy(stop_);
}
void Stopwatch::start(Stream stream) {
  Current current(device_);
  check(libcuda().event_record(start_, static_cast<CUstream>(stream.handle)), "cuEventRecord");
}
void Stopwatch::stop(Stream stream) {
  Current current(device_);
  check(libcuda().event_record(stop_, static_cast<CUstream>(stream.handle)), "cuEventRecord");
}
double Stopwatch::microseconds() {
  Current current(device_);
  check(libcuda().event_wait(stop_), "cuEventSynchronize");
  float milliseconds = 0;
  check(libcuda().event_elapsed(&milliseconds, start_, stop_), "cuEventElapsedTime");
  return 1000.0 * milliseconds;
}

}  // namespace tconv::cuda
