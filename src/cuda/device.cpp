// device.cpp — the CUDA devices of this machine as Device structs.
// SPDX-License-Identifier: Apache-2.0
#include "tconv/device.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "libcuda.h"

namespace tconv {
namespace {

// Operations (a multiply-add is two) per clock and multiprocessor, from NVIDIA's architecture papers: dense tensor-core
// rates with fp32 accumulation.
struct Rates {
  int compute_capability;
  double fp32, fp64, tf32, f16;
};
constexpr Rates kRates[] = {
    {80, 128, 64, 1024, 2048},  {86, 256, 4, 256, 512},      {87, 256, 4, 256, 512},    {89, 256, 4, 256, 512},
    {90, 256, 128, 2048, 4096}, {100, 256, 128, 4096, 8192}, {103, 256, 4, 4096, 8192}, {120, 256, 4, 256, 512},
};
// What a kernel reaches of the rates above and of the memory's nominal bandwidth: on the H200 copy reaches 4.26 of 4.8
// TB/s, fp32 51 of 67 TFLOP/s, TF32 404 of 495.
constexpr double kReached = 0.8;
constexpr double kReachedBandwidth = 0.88;

Device read_device(int index) {
  const cuda::Libcuda& driver = cuda::libcuda();
  int handle = 0;
  cuda::check(driver.device_get(&handle, index), "cuDeviceGet");
  auto attribute = [&](int which) {
    int value = 0;
    cuda::check(driver.device_attribute(&value, which, handle), "cuDeviceGetAttribute");
    return value;
  };
  char name[256] = {};
  cuda::check(driver.device_name(name, sizeof name, handle), "cuDeviceGetName");

  Device device;
  device.backend = Backend::cuda;
  device.index = index;
  device.name = name;
  device.compute_capability = 10 * attribute(75) + attribute(76);
  device.multiprocessors = attribute(16);
  device.cores = device.multiprocessors;
  device.l2_bytes = static_cast<std::size_t>(attribute(38));
  device.shared_memory_per_block = static_cast<std::size_t>(attribute(97));
  device.shared_memory_per_multiprocessor = static_cast<std::size_t>(attribute(81));
  if (device.compute_capability < 80) {
    throw std::runtime_error("CUDA: device " + std::to_string(index) + " (" + device.name +
                             ") has compute capability " + std::to_string(device.compute_capability / 10) + "." +
                             std::to_string(device.compute_capability % 10) + ", needed is 8.0 or newer");
  }

  const double clock_thz = 1e-9 * attribute(13);  // kHz
  const Rates* rates = &kRates[0];
  for (const Rates& row : kRates) {
    if (row.compute_capability <= device.compute_capability) rates = &row;
  }
  const double scale = kReached * device.multiprocessors * clock_thz;
  device.fp32_tflops = scale * rates->fp32;
  device.fp64_tflops = scale * rates->fp64;
  device.tf32_tflops = scale * rates->tf32;
  device.f16_tflops = scale * rates->f16;
  // Double data rate; 36 memory clock in kHz, 37 bus width in bits. Integrated memory may report no clock.
  device.bandwidth_tbs = kReachedBandwidth * 2.0 * attribute(36) * 1e3 * attribute(37) / 8 * 1e-12;
  if (device.bandwidth_tbs <= 0) device.bandwidth_tbs = 0.2;
  if (device.name.find("H200") != std::string::npos && device.multiprocessors == 132) {
    // Measured: a copy kernel, an FMA loop, and wgmma loops.
    device.bandwidth_tbs = 4.26;
    device.fp32_tflops = 51;
    device.fp64_tflops = 25;
    device.tf32_tflops = 404;
    device.f16_tflops = 775;
  }
  return device;
}

}  // namespace

int cuda_device_count() noexcept {
  static const int count = [] {
    const cuda::Libcuda& driver = cuda::libcuda_or_failure();
    int found = 0;
    if (!driver.failure.empty() || driver.device_count(&found) != 0) return 0;
    return found;
  }();
  return count;
}

Device cuda_device(int index) {
  cuda::libcuda();  // says why when there is no driver
  const int count = cuda_device_count();
  if (index < 0 || index >= count) {
    throw std::runtime_error("CUDA: no device " + std::to_string(index) + ": found " + std::to_string(count) +
                             (count == 1 ? " device" : " devices"));
  }
  struct Entry {
    Device device;
    std::string failure;
  };
  static const auto* devices = [] {
    auto* list = new std::vector<Entry>;
    for (int i = 0; i < cuda_device_count(); ++i) {
      Entry entry;
      try {
        entry.device = read_device(i);
      } catch (const std::runtime_error& error) {
        entry.failure = error.what();
      }
      list->push_back(std::move(entry));
    }
    return list;
  }();
  const Entry& entry = (*devices)[static_cast<std::size_t>(index)];
  if (!entry.failure.empty()) throw std::runtime_error(entry.failure);
  return entry.device;
}

}  // namespace tconv
