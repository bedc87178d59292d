// memory.cpp — host memory by the C++ allocator, CUDA memory by the driver.
// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "cuda/libcuda.h"

namespace tconv::bench {
namespace {

using cuda::check;
using cuda::libcuda;

constexpr std::byte kPoison{0xff};
constexpr std::byte kPattern{0xc5};

// Makes the device's primary context, which the kernels use as well, current on this thread.
void use(const Device& device) {
  int handle = 0;
  cuda::CUcontext context = nullptr, current = nullptr;
  check(libcuda().context_get(&current), "cuCtxGetCurrent");
  if (current != nullptr) return;
  check(libcuda().device_get(&handle, device.index), "cuDeviceGet");
  check(libcuda().primary_retain(&context, handle), "cuDevicePrimaryCtxRetain");
  check(libcuda().context_push(context), "cuCtxPushCurrent");
}

cuda::CUdeviceptr address(const void* pointer) { return reinterpret_cast<cuda::CUdeviceptr>(pointer); }

bool on_host(const Device& device) { return device.backend == Backend::cpu; }

void copy_in(const Device& device, void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  if (on_host(device)) {
    std::memcpy(to, from, bytes);
  } else {
    check(libcuda().copy_in(address(to), from, bytes), "cuMemcpyHtoD");
  }
}

void copy_out(const Device& device, void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  if (on_host(device)) {
    std::memcpy(to, from, bytes);
  } else {
    check(libcuda().copy_out(to, address(from), bytes), "cuMemcpyDtoH");
  }
}

}  // namespace

Guarded::Guarded(const Device& device, std::size_t bytes) : device_(device), bytes_(bytes) {
  const std::size_t total = bytes + 2 * kGuard;
  if (on_host(device)) {
    base_ = std::aligned_alloc(kGuard, (total + kGuard - 1) / kGuard * kGuard);
    if (base_ == nullptr) throw std::bad_alloc();
  } else {
    use(device);
    cuda::CUdeviceptr pointer = 0;
    check(libcuda().allocate(&pointer, total), "cuMemAlloc");
    base_ = reinterpret_cast<void*>(pointer);
  }
  const std::vector<std::byte> guard(kGuard, kPattern);
  copy_in(device_, base_, guard.data(), kGuard);
  copy_in(device_, static_cast<std::byte*>(data()) + bytes_, guard.data(), kGuard);
  poison();
}

Guarded::Guarded(Guarded&& other) noexcept
    : device_(other.device_), base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}

Guarded::~Guarded() {
  if (base_ == nullptr) return;
  if (on_host(device_)) {
    std::free(base_);
  } else {
    libcuda().release(address(base_));
  }
}

void Guarded::poison() {
  const std::vector<std::byte> bytes(bytes_, kPoison);
  copy_in(device_, data(), bytes.data(), bytes_);
}

void Guarded::write(const void* from) { copy_in(device_, data(), from, bytes_); }

std::vector<std::byte> Guarded::read() const {
  std::vector<std::byte> bytes(bytes_);
  copy_out(device_, bytes.data(), data(), bytes_);
  return bytes;
}

bool Guarded::guards_intact() const {
  std::vector<std::byte> guard(kGuard);
  for (const std::byte* zone : {static_cast<const std::byte*>(base_), static_cast<const std::byte*>(data()) + bytes_}) {
    copy_out(device_, guard.data(), zone, kGuard);
    if (!std::all_of(guard.begin(), guard.end(), [](std::byte b) { return b == kPattern; })) return false;
  }
  return true;
}

void synchronize(const Device& device) {
  if (on_host(device)) return;
  use(device);
  check(libcuda().synchronize(), "cuCtxSynchronize");
}

std::vector<double> time_runs(const Device& device, int count, const std::function<void(Stream)>& run) {
  std::vector<double> seconds;
  if (on_host(device)) {
    for (int i = 0; i < count; ++i) {
      const auto start = std::chrono::steady_clock::now();
      run({});
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return seconds;
  }
  use(device);
  const Guarded flush(device, 4 * device.l2_bytes);
  void *before = nullptr, *after = nullptr;
  check(libcuda().event_create(&before, 0), "cuEventCreate");
  check(libcuda().event_create(&after, 0), "cuEventCreate");
  for (int i = 0; i < count; ++i) {
    check(libcuda().memset(address(flush.data()), static_cast<unsigned char>(i), flush.size(), nullptr), "cuMemsetD8");
    check(libcuda().event_record(before, nullptr), "cuEventRecord");
    run({});
    check(libcuda().event_record(after, nullptr), "cuEventRecord");
    check(libcuda().event_wait(after), "cuEventSynchronize");
    float milliseconds = 0;
    check(libcuda().event_elapsed(&milliseconds, before, after), "cuEventElapsedTime");
    seconds.push_back(milliseconds * 1e-3);
  }
  libcuda().event_destroy(before);
  libcuda().event_destroy(after);
  return seconds;
}

}  // namespace tconv::bench
