// device.cpp — the CPU at hand, and hand-written devices for planning without them.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/device.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <thread>

#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tconv {
namespace {

#if defined(__x86_64__)
// Products of bf16 on the matrix unit. Linux gives its registers to a process that has asked for them.
bool has_amx() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect_isa() {
#if defined(__x86_64__)
  // The compiler's check includes the operating system's: whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx() ? Isa::avx512_amx : Isa::avx512_bf16;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// The cores that this process may run on, which in a container is fewer than the machine has.
int detect_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::string detect_name() {
#ifdef __linux__
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) {
      const std::size_t colon = line.find(": ");
      if (colon != std::string::npos) return line.substr(colon + 2);
    }
  }
#endif
  return "cpu";
}

// What a core sustains on a blocked matrix product, below its peak: clock 2.5 GHz, two FMA units, two thirds of peak.
double fp32_tflops_per_core(Isa isa) {
  switch (isa) {
    case Isa::avx512:
    case Isa::avx512_bf16:
    case Isa::avx512_amx:
      return 0.1;
    case Isa::avx2:
      return 0.05;
    default:
      return 0.012;
  }
}

Device make_cpu(std::string name, Isa isa, int cores) {
  Device device;
  device.backend = Backend::cpu;
  device.name = std::move(name);
  device.isa = isa;
  device.cores = cores;
  device.fp32_tflops = fp32_tflops_per_core(isa) * cores;
  device.fp64_tflops = device.fp32_tflops / 2;
  // One core moves about 10 GB/s; a socket saturates at a few cores.
  device.bandwidth_tbs = std::min(0.010 * cores, 0.15);
  device.l2_bytes = 1 << 20;
  return device;
}

}  // namespace

Device cpu_device() {
  static const Device detected = [] {
    Device device = make_cpu(detect_name(), detect_isa(), detect_cores());
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) device.l2_bytes = static_cast<std::size_t>(bytes);
#endif
    return device;
  }();
  return detected;
}

Device known_device(const std::string& name) {
  if (name == "cpu_avx512_amx") return make_cpu(name, Isa::avx512_amx, 8);
  if (name == "cpu_avx512_bf16") return make_cpu(name, Isa::avx512_bf16, 8);
  if (name == "cpu_avx512") return make_cpu(name, Isa::avx512, 8);
  if (name == "cpu_avx2") return make_cpu(name, Isa::avx2, 8);
  if (name == "cpu_portable") return make_cpu(name, Isa::portable, 8);
  Device device;
  device.backend = Backend::cuda;
  device.index = -1;  // nothing to run on: plans for it are made, not prepared
  device.name = name;
  if (name == "h200") {
    device.bandwidth_tbs = 4.26;  // measured: copy, read and write together
    device.fp32_tflops = 51;      // measured
    device.fp64_tflops = 25;
    device.tf32_tflops = 404;  // measured, wgmma
    device.f16_tflops = 775;   // measured, wgmma
    device.l2_bytes = 50u << 20;
    device.compute_capability = 90;
    device.multiprocessors = 132;
    device.shared_memory_per_block = 227 << 10;
    device.shared_memory_per_multiprocessor = 228 << 10;
    return device;
  }
  if (name == "a100") {
    // Data sheet (1.555 TB/s, 19.5, 9.7, 156, 312) at the fractions of it that the H200 reaches.
    device.bandwidth_tbs = 1.35;
    device.fp32_tflops = 15;
    device.fp64_tflops = 7;
    device.tf32_tflops = 125;
    device.f16_tflops = 245;
    device.l2_bytes = 40u << 20;
    device.compute_capability = 80;
    device.multiprocessors = 108;
    device.shared_memory_per_block = 163 << 10;
    device.shared_memory_per_multiprocessor = 164 << 10;
    return device;
  }
  throw std::invalid_argument(
      "device must be one of h200 a100 cpu_avx512_amx cpu_avx512_bf16 cpu_avx512 cpu_avx2 cpu_portable, got `" + name +
      "`");
}

}  // namespace tconv
