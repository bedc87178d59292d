// device_emulation.h — CUDA and the instructions of Hopper that the kernels use, on the CPU: a thread of the device is a
// thread of the host, a block at a time. Made for checking what a kernel computes and that its roles never wait for each
// other in vain, on a machine without a GPU; it says nothing about time.
//
// Copies by cp.async are done when they are waited for, products of a warpgroup likewise, so that reading too early or
// giving back a stage too early shows. Not covered: memory ordering, and what only registers or banks decide.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __builtin_assume(condition)

using std::max;
using std::min;

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(std::uint64_t{x} * y >> 32); }

struct EmulatedIndex {
  unsigned x;
};
static thread_local EmulatedIndex threadIdx;
static EmulatedIndex blockIdx, gridDim;

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <typename T>
inline T __ldcs(const T* from) {
  return *from;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}

// Only for values that all lanes have.
inline unsigned __shfl_sync(unsigned, unsigned x, int) { return x; }

[[noreturn]] inline void emulated_failure(const char* what) {
  std::printf("thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, what);
  std::fflush(stdout);
  std::_Exit(3);
}

// Shared memory. Addresses are offsets in it, so that they fit a matrix descriptor.
alignas(1024) static unsigned char emulated_memory[232448 + 4096];
inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - emulated_memory);
}

// mbarriers
struct EmulatedBarrier {
  std::mutex mutex;
  std::condition_variable flipped;
  int expected = 0, pending = 0;
  unsigned phase = 0;
  long bytes = 0;
  void check() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = expected;
    flipped.notify_all();
  }
};
static std::map<const void*, std::unique_ptr<EmulatedBarrier>> emulated_barriers;
inline void barrier_init(unsigned long long* barrier, int arrivals) {
  auto& made = emulated_barriers[barrier] = std::make_unique<EmulatedBarrier>();
  made->expected = made->pending = arrivals;
}
inline void barrier_init_done() {}
inline void emulated_arrive(unsigned long long* barrier, int arrivals, long bytes) {
  EmulatedBarrier& at = *emulated_barriers.at(barrier);
  std::lock_guard lock(at.mutex);
  if (at.pending < arrivals) emulated_failure("more arrivals than a barrier expects");
  at.pending -= arrivals;
  at.bytes += bytes;
  at.check();
}
inline void barrier_arrive(unsigned long long* barrier) { emulated_arrive(barrier, 1, 0); }
inline void barrier_expect(unsigned long long* barrier, unsigned bytes) { emulated_arrive(barrier, 1, bytes); }
inline void barrier_wait(unsigned long long* barrier, unsigned parity) {
  EmulatedBarrier& at = *emulated_barriers.at(barrier);
  std::unique_lock lock(at.mutex);
  if (!at.flipped.wait_for(lock, std::chrono::seconds(60), [&] { return at.phase != parity; }))
    emulated_failure("waits for a barrier in vain");
}
// Numbered barriers
struct EmulatedMeeting {
  std::mutex mutex;
  std::condition_variable over;
  int come = 0;
  unsigned meetings = 0;
};
static std::unique_ptr<EmulatedMeeting> emulated_meetings[16];
template <int kThreads, bool kWaits>
void emulated_meet(int barrier) {
  EmulatedMeeting& at = *emulated_meetings[barrier];
  std::unique_lock lock(at.mutex);
  const unsigned before = at.meetings;
  if (++at.come == kThreads) {
    at.come = 0;
    ++at.meetings;
    at.over.notify_all();
  }
  if (kWaits && !at.over.wait_for(lock, std::chrono::seconds(60), [&] { return at.meetings != before; }))
    emulated_failure("waits for a numbered barrier in vain");
}
template <int kThreads>
void meet(int barrier) {
  emulated_meet<kThreads, true>(barrier);
}
template <int kThreads>
void come(int barrier) {
  emulated_meet<kThreads, false>(barrier);
}
inline void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
  if (shared_address(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    emulated_failure("alignment of a bulk copy");
  std::memcpy(to, from, bytes);
  emulated_arrive(barrier, 0, -static_cast<long>(bytes));
}

// Boxes of a tensor; a map of the device holds the address of one of these.
struct EmulatedTensor {
  const unsigned char* first;
  int element_bytes, exchange_bytes;
  long long size[5], stride[4];  // elements; bytes from the second dimension on
  int box[5], step[5];           // box: elements copied along a side
};
inline void emulated_copy_box(void* to, const EmulatedTensor& from, const long long (&at)[5],
                              unsigned long long* barrier) {
  if (shared_address(to) % 128 != 0) emulated_failure("alignment of a box");
  if (at[0] * from.element_bytes % 16 != 0) emulated_failure("a box that does not start on 16 bytes");
  const int row_bytes = from.box[0] * from.element_bytes;
  const long long rows = static_cast<long long>(from.box[1]) * from.box[2] * from.box[3] * from.box[4];
  for (long long row = 0; row < rows; ++row)
    for (int c = 0; c < from.box[0]; ++c) {
      long long x[5] = {at[0] + c * from.step[0]}, rest = row;
      for (int dim = 1; dim < 5; rest /= from.box[dim++]) x[dim] = at[dim] + rest % from.box[dim] * from.step[dim];
      bool inside = true;
      long long offset = x[0] * from.element_bytes;
      for (int dim = 0; dim < 5; ++dim) {
        inside = inside && x[dim] >= 0 && x[dim] < from.size[dim];
        if (dim > 0) offset += x[dim] * from.stride[dim - 1];
      }
      const unsigned flat = shared_address(to) + static_cast<unsigned>(row * row_bytes + c * from.element_bytes);
      const unsigned address =
          from.exchange_bytes == 0 ? flat : flat ^ (flat >> 7 & (from.exchange_bytes / 16 - 1)) << 4;
      if (inside)
        std::memcpy(emulated_memory + address, from.first + offset, from.element_bytes);
      else
        std::memset(emulated_memory + address, 0, from.element_bytes);
    }
  emulated_arrive(barrier, 0, -rows * row_bytes);
}

template <typename Map>
void copy_box(void* to, const Map& map, int x0, int x1, int x2, int x3, int x4, unsigned long long* barrier) {
  emulated_copy_box(to, *reinterpret_cast<const EmulatedTensor*>(map.word[0]), {x0, x1, x2, x3, x4}, barrier);
}

// cp.async
struct EmulatedCopy {
  void* to;
  const void* from;
  int bytes, valid;  // the rest is filled with zeros
};
static thread_local std::vector<EmulatedCopy> emulated_group;
static thread_local std::deque<std::vector<EmulatedCopy>> emulated_groups;
template <int kBytes>
void copy_part(void* to, const void* from, int bytes) {
  if (shared_address(to) % kBytes != 0 || (bytes > 0 && reinterpret_cast<std::uintptr_t>(from) % kBytes != 0))
    emulated_failure("alignment of a copy");
  if (bytes < 0 || bytes > kBytes) emulated_failure("bytes of a copy");
  emulated_group.push_back({to, from, kBytes, bytes});
}
template <int kBytes>
void copy_async(void* to, const void* from, bool valid) {
  copy_part<kBytes>(to, from, valid ? kBytes : 0);
}
inline void copy_async_commit() { emulated_groups.push_back(std::exchange(emulated_group, {})); }
template <int kPending>
void copy_async_wait() {
  for (; static_cast<int>(emulated_groups.size()) > kPending; emulated_groups.pop_front())
    for (const EmulatedCopy& copy : emulated_groups.front()) {
      if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
}

// 16-bit types
inline float emulated_f16(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size =
      exponent != 0 ? std::ldexp(1 + fraction / 1024.f, exponent - 15) : std::ldexp(fraction / 1024.f, -14);
  return bits >> 15 ? -size : size;
}
inline unsigned short emulated_f16_of(float x) {  // of values that have one, as the tests use them
  if (x == 0) return 0;
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(x), &exponent);
  const auto low = static_cast<unsigned>(std::lround((fraction * 2 - 1) * 1024));
  return static_cast<unsigned short>((x < 0) << 15 | (exponent + 14) << 10 | low);
}
inline float emulated_bf16(unsigned short bits) { return emulated_bits<float>(static_cast<unsigned>(bits) << 16); }
inline unsigned short emulated_bf16_of(float x) {
  const unsigned bits = emulated_bits<unsigned>(x);
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline unsigned to_tf32(float x) { return emulated_bits<unsigned>(x); }
inline unsigned nearest(unsigned x) { return x; }
inline unsigned nearest_tf32(unsigned x) { return x; }

// Products of a warpgroup, both operands in shared memory, k contiguous; units exchanged as the copy engine does, or not.
enum class EmulatedType { tf32, f16, bf16 };
inline float emulated_element(unsigned address, EmulatedType type) {
  if (type == EmulatedType::tf32) {
    unsigned bits = 0;
    std::memcpy(&bits, emulated_memory + address, 4);
    return emulated_bits<float>(bits & ~0x1fffu);
  }
  unsigned short bits = 0;
  std::memcpy(&bits, emulated_memory + address, 2);
  return type == EmulatedType::f16 ? emulated_f16(bits) : emulated_bf16(bits);
}
struct EmulatedOperand {
  unsigned first, along_k, along_rows, exchange;
  bool channels_inner;  // 16-bit, units exchanged: a line holds the rows of one k
  explicit EmulatedOperand(unsigned long long descriptor, bool inner = false)
      : first((descriptor & 0x3fff) << 4),
        along_k((descriptor >> 16 & 0x3fff) << 4),
        along_rows((descriptor >> 32 & 0x3fff) << 4),
        exchange(static_cast<unsigned>(descriptor >> 62)),
        channels_inner(inner) {}
  float at(int row, int k, EmulatedType type) const {
    const int per_unit = type == EmulatedType::tf32 ? 4 : 8;
    const unsigned line = exchange == 1 ? 128 : exchange == 2 ? 64 : 32;
    auto exchanged = [line](unsigned flat) { return flat ^ (flat >> 7 & (line / 16 - 1)) << 4; };
    if (channels_inner) {
      const int per_line = static_cast<int>(line) / 2;  // along_k: lines of the next rows; along_rows: the next 8 k
      return emulated_element(
          exchanged(first + row / per_line * along_k + k / 8 * along_rows + k % 8 * line + row % per_line * 2), type);
    }
    if (exchange != 0)
      return emulated_element(
          exchanged(first + row / 8 * along_rows + row % 8 * line + k / per_unit * 16 + k % per_unit * (16 / per_unit)),
          type);
    return emulated_element(
        first + k / per_unit * along_k + row / 8 * along_rows + row % 8 * 16 + k % per_unit * (16 / per_unit), type);
  }
};
static thread_local std::vector<std::function<void()>> emulated_products;
static thread_local std::deque<std::vector<std::function<void()>>> emulated_product_groups;
static std::unique_ptr<std::barrier<>> emulated_block, emulated_loaders, emulated_warps[32];
template <int kSums>
void emulated_wgmma(float (&sum)[kSums], unsigned long long rows, unsigned long long columns, bool accumulate,
                    EmulatedType type, bool channels_inner = false) {
  float* const to = sum;
  const int warp = threadIdx.x % 128 / 32, quad = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  emulated_products.push_back([=] {
    const EmulatedOperand a(rows, channels_inner), b(columns, channels_inner);
    const int depth = type == EmulatedType::tf32 ? 8 : 16;
    for (int n = 0; n < kSums / 4; ++n)
      for (int r = 0; r < 4; ++r) {
        float value = accumulate ? to[4 * n + r] : 0;
        for (int k = 0; k < depth; ++k)
          value += a.at(warp * 16 + quad + r / 2 * 8, k, type) * b.at(n * 8 + quarter * 2 + r % 2, k, type);
        to[4 * n + r] = value;
      }
  });
}
// The rows in registers (TF32): a thread holds its part of them, and reads that of its row's other three when it waits.
static const unsigned* emulated_rows[1024][64];
static thread_local unsigned emulated_rows_count = 0;
template <int kSums>
void emulated_wgmma(float (&sum)[kSums], const unsigned (&rows)[4], unsigned long long columns) {
  float* const to = sum;
  const unsigned slot = emulated_rows_count++ % 64, first = threadIdx.x / 4 * 4, quarter = threadIdx.x % 4;
  emulated_rows[threadIdx.x][slot] = rows;
  emulated_products.push_back([=] {
    const EmulatedOperand b(columns);
    for (int n = 0; n < kSums / 4; ++n)
      for (int r = 0; r < 4; ++r)
        for (unsigned k = 0; k < 8; ++k) {
          const unsigned word = emulated_rows[first + k % 4][slot][k / 4 * 2 + r / 2] & ~0x1fffu;
          to[4 * n + r] += emulated_bits<float>(word) * b.at(n * 8 + quarter * 2 + r % 2, k, EmulatedType::tf32);
        }
  });
}
inline void wgmma_fence() {}
inline void fence_shared_for_wgmma() {}
inline void wgmma_commit() { emulated_product_groups.push_back(std::exchange(emulated_products, {})); }
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}
template <int kPending>
void wgmma_wait() {
  emulated_warps[threadIdx.x / 32]->arrive_and_wait();
  for (; static_cast<int>(emulated_product_groups.size()) > kPending; emulated_product_groups.pop_front())
    for (const auto& product : emulated_product_groups.front()) product();
  emulated_warps[threadIdx.x / 32]->arrive_and_wait();
}
// Four 8 x 8 matrices of 16-bit elements per warp; a lane names a line of one of them and holds, of each, two neighbours:
// of a row, or, turned, of a column.
static char* emulated_lines[32][32];
template <typename Move>
void emulated_matrices(const void* line, bool turned, const Move& move) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (shared_address(line) % 16 != 0) emulated_failure("alignment of a matrix");
  emulated_lines[warp][lane] = static_cast<char*>(const_cast<void*>(line));
  emulated_warps[warp]->arrive_and_wait();
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int i = 0; i < 2; ++i) {
      const int row = turned ? lane % 4 * 2 + i : lane / 4, column = turned ? lane / 4 : lane % 4 * 2 + i;
      move(matrix, i, emulated_lines[warp][matrix * 8 + row] + column * 2);
    }
  emulated_warps[warp]->arrive_and_wait();
}
inline void load_turned_matrices(const void* from, unsigned (&word)[4]) {
  emulated_matrices(from, true, [&](int matrix, int i, const char* element) {
    std::memcpy(reinterpret_cast<char*>(word + matrix) + i * 2, element, 2);
  });
}
template <bool kTurned>
void store_matrices(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  const unsigned word[4] = {a, b, c, d};
  emulated_matrices(to, kTurned, [&](int matrix, int i, char* element) {
    std::memcpy(element, reinterpret_cast<const char*>(word + matrix) + i * 2, 2);
  });
}
inline void store_16(void* to, uint4 x) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0) emulated_failure("alignment of a store");
  std::memcpy(to, &x, 16);
}
inline void __syncthreads() { emulated_block->arrive_and_wait(); }
inline void __syncwarp() { emulated_warps[threadIdx.x / 32]->arrive_and_wait(); }
inline void loaders_barrier() { emulated_loaders->arrive_and_wait(); }

static float emulated_shuffled[1024];
inline float __shfl_down_sync(unsigned, float x, int distance) {
  const unsigned warp = threadIdx.x / 32, from = threadIdx.x % 32 + static_cast<unsigned>(distance);
  emulated_shuffled[threadIdx.x] = x;
  emulated_warps[warp]->arrive_and_wait();
  const float other = from < 32 ? emulated_shuffled[warp * 32 + from] : x;
  emulated_warps[warp]->arrive_and_wait();
  return other;
}

// One block after the other, each with memory that holds NaN.
template <typename Kernel>
void emulated_launch(unsigned blocks, int threads, int loaders, const Kernel& kernel) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    emulated_barriers.clear();
    std::memset(emulated_memory, 0xff, sizeof emulated_memory);
    emulated_block = std::make_unique<std::barrier<>>(threads);
    emulated_loaders = std::make_unique<std::barrier<>>(loaders);
    for (auto& meeting : emulated_meetings) meeting = std::make_unique<EmulatedMeeting>();
    for (auto& warp : emulated_warps) warp = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
      running.emplace_back([&, thread] {
        threadIdx.x = static_cast<unsigned>(thread);
        kernel();
      });
    for (std::thread& thread : running) thread.join();
  }
}
