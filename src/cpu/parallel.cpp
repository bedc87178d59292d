// parallel.cpp — the thread pool behind parallel_for.
// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "pages.h"

namespace tconv::cpu {
namespace {

// How long an idle worker polls before it sleeps. Back-to-back layers arrive within this time; waking a sleeper costs
// 20 to 60 us on a virtual machine.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kMaxWorkers = 255;

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `state` holds the job's number in the high bits, an open flag (bit 31) and, in the low bits, how
// many workers are inside. Workers enter by compare-and-swap while the flag is set; the owner clears it when no item is
// left and waits for those inside only, so a worker that wakes late costs nothing.
class Pool {
 public:
  void run(std::int64_t num_items, int num_threads, ItemFunction function, void* context) {
    std::unique_lock entry(entry_, std::try_to_lock);
    if (!entry.owns_lock()) {
      for (std::int64_t item = 0; item < num_items; ++item) function(context, item);
      return;
    }
    const int workers = static_cast<int>(std::min<std::int64_t>({num_threads - 1, num_items - 1, kMaxWorkers}));
    grow(workers);
    function_ = function;
    context_ = context;
    num_items_ = num_items;
    next_.store(0, std::memory_order_relaxed);
    allowed_ = workers;
    error_ = nullptr;
    failed_.store(false, std::memory_order_relaxed);
    const std::uint64_t job = ((state_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    state_.store(job | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard lock(sleep_);
      }
      wake_.notify_all();
    }
    work();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int polls = 0; (state_.load(std::memory_order_acquire) & kCount) != 0; ++polls) {
      if (polls < 4096)
        pause_briefly();
      else
        std::this_thread::yield();
    }
    if (error_) {
      std::exception_ptr error = std::move(error_);
      error_ = nullptr;
      std::rethrow_exception(error);
    }
  }

 private:
  static constexpr std::uint64_t kOpen = 1u << 31;
  static constexpr std::uint64_t kCount = kOpen - 1;

  void grow(int workers) {
    for (; num_workers_ < workers; ++num_workers_) {
      try {
        std::thread([this, index = num_workers_] { serve(index); }).detach();
      } catch (...) {
        return;  // no more threads to be had: fewer workers, same results
      }
    }
  }

  void work() {
    for (;;) {
      const std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items_ || failed_.load(std::memory_order_relaxed)) return;
      try {
        function_(context_, item);
      } catch (...) {
        std::lock_guard lock(error_lock_);
        if (!error_) error_ = std::current_exception();
        failed_.store(true, std::memory_order_relaxed);
      }
    }
  }

  void serve(int index);

  std::mutex entry_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::mutex error_lock_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  ItemFunction function_ = nullptr;
  void* context_ = nullptr;
  std::int64_t num_items_ = 0;
  int allowed_ = 0;
  int num_workers_ = 0;
};

// Inside an item: a nested parallel_for runs its items in place.
thread_local bool inside_item = false;

void Pool::serve(int index) {
  inside_item = true;
  std::uint64_t seen = 0;
  for (;;) {
    std::uint64_t state = state_.load(std::memory_order_acquire);
    if ((state >> 32) == seen || !(state & kOpen)) {
      const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
      bool found = false;
      for (int polls = 1; !found; ++polls) {
        pause_briefly();
        state = state_.load(std::memory_order_acquire);
        found = (state >> 32) != seen && (state & kOpen);
        if (polls % 64 == 0 && std::chrono::steady_clock::now() > deadline) break;
      }
      if (!found) {
        std::unique_lock lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] {
          state = state_.load(std::memory_order_seq_cst);
          return (state >> 32) != seen && (state & kOpen);
        });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    if (!(state & kOpen) || (state >> 32) == seen) continue;
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    seen = state >> 32;
    if (index < allowed_) work();
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

// Never destroyed: workers may outlive static destruction. Replaced in a forked child, whose copy has no threads.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool, std::memory_order_release);
    pthread_atfork(nullptr, nullptr, [] {
      the_pool.store(new Pool, std::memory_order_release);
      inside_item = false;
    });
  });
  return *the_pool.load(std::memory_order_acquire);
}

struct Scratch {
  void* data = nullptr;
  std::int64_t bytes = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

}  // namespace

void parallel_run(std::int64_t num_items, int num_threads, ItemFunction run, void* context) {
  if (num_items <= 1 || num_threads <= 1 || inside_item) {
    for (std::int64_t item = 0; item < num_items; ++item) run(context, item);
    return;
  }
  pool().run(num_items, num_threads, run, context);
}

int resolve_threads(int requested) {
  if (requested > 0) return requested;
  static const int cores = std::max(1u, std::thread::hardware_concurrency());
  return cores;
}

void* thread_scratch(std::int64_t bytes) {
  if (scratch.bytes < bytes) {
    std::free(scratch.data);
    scratch.bytes = 0;
    // Planes of half a megabyte and more in one huge page: their rows lie one or more 4 KB pages apart.
    const std::int64_t unit = bytes >= (512 << 10) ? 2 << 20 : 64;
    const std::size_t size = static_cast<std::size_t>((bytes + unit - 1) / unit * unit);
    scratch.data = std::aligned_alloc(static_cast<std::size_t>(unit), size);
    if (!scratch.data) throw std::bad_alloc();
    prefer_huge_pages(scratch.data, size);
    scratch.bytes = bytes;
  }
  return scratch.data;
}

}  // namespace tconv::cpu
