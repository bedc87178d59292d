// device.h — the machine as a plain struct, so that planning is a pure function and runs without the machine.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#pragma GCC visibility push(default)
namespace tconv {

enum class Backend : std::uint8_t { cpu, cuda };
// Each includes those before it.
enum class Isa : std::uint8_t { portable, avx2, avx512, avx512_bf16, avx512_amx };

struct Device {
  Backend backend = Backend::cpu;
  int index = 0;  // CUDA ordinal; -1: hand-written, plans can be made for it but not run
  std::string name;
  // Rates measured or conservative: what one kernel can reach, in units of 1e12 operations or bytes a second.
  double bandwidth_tbs = 0.02;
  double fp32_tflops = 0.1;
  double fp64_tflops = 0.05;
  double tf32_tflops = 0;  // tensor cores, mma.sync or wgmma; 0: none
  double f16_tflops = 0;
  // CPU
  Isa isa = Isa::portable;
  int cores = 1;
  std::size_t l2_bytes = 1 << 20;  // per core on a CPU, whole device on a GPU
  // CUDA
  int compute_capability = 0;  // 80, 86, 89, 90, 100 ...
  int multiprocessors = 0;
  std::size_t shared_memory_per_block = 0;  // largest opt-in size
  std::size_t shared_memory_per_multiprocessor = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

Device cpu_device();               // this machine, detected once
Device cuda_device(int index);     // throws std::runtime_error: no driver, no such device, driver too old
int cuda_device_count() noexcept;  // 0 without a driver

// Hand-written devices, for planning without them: h200 a100 cpu_avx512_amx cpu_avx512_bf16 cpu_avx512 cpu_avx2 cpu_portable.
Device known_device(const std::string& name);

}  // namespace tconv
#pragma GCC visibility pop
