// memory.h — buffers, copies and clocks on any device, for the tool and the tests.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "tconv/tconv.h"

namespace tconv::bench {

// Bytes on a device with guard zones of a known pattern on both sides; everything starts out as 0xff, which is a NaN in
// every floating-point type.
class Guarded {
 public:
  Guarded(const Device& device, std::size_t bytes);
  Guarded(Guarded&& other) noexcept;
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded();

  void* data() const { return static_cast<std::byte*>(base_) + kGuard; }
  std::size_t size() const { return bytes_; }
  void poison();
  void write(const void* from);
  std::vector<std::byte> read() const;
  bool guards_intact() const;

 private:
  static constexpr std::size_t kGuard = 4096;
  Device device_;
  void* base_ = nullptr;
  std::size_t bytes_ = 0;
};

void synchronize(const Device& device);

// Seconds of each of `count` runs; on CUDA by events, with the L2 cache overwritten before each run.
std::vector<double> time_runs(const Device& device, int count, const std::function<void(Stream)>& run);

}  // namespace tconv::bench
