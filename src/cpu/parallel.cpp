// parallel.cpp — the threads behind parallel_for: PyTorch's team where there is one, else a pool.
// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <dlfcn.h>
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
#include <utility>

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

// Inside an item: a nested parallel_for runs its items in place.
thread_local bool inside_item = false;

// The items of one call, taken by whoever takes part.
struct Job {
  std::int64_t num_items;
  ItemFunction function;
  void* context;
  alignas(64) std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex error_lock{};
  std::exception_ptr error{};

  void work() {
    const bool outer = std::exchange(inside_item, true);
    for (;;) {
      const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items || failed.load(std::memory_order_relaxed)) break;
      try {
        function(context, item);
      } catch (...) {
        std::lock_guard lock(error_lock);
        if (!error) error = std::current_exception();
        failed.store(true, std::memory_order_relaxed);
      }
    }
    inside_item = outer;
  }
};

// One job at a time. `state` holds the job's number in the high bits, an open flag (bit 31) and, in the low bits, how
// many workers are inside. Workers enter by compare-and-swap while the flag is set; the owner clears it when no item is
// left and waits for those inside only, so a worker that wakes late costs nothing.
class Pool {
 public:
  void run(Job& job_items, int num_threads) {
    std::unique_lock entry(entry_, std::try_to_lock);
    if (!entry.owns_lock()) return job_items.work();
    const int workers =
        static_cast<int>(std::min<std::int64_t>({num_threads - 1, job_items.num_items - 1, kMaxWorkers}));
    grow(workers);
    job_ = &job_items;
    allowed_ = workers;
    const std::uint64_t job = ((state_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    state_.store(job | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard lock(sleep_);
      }
      wake_.notify_all();
    }
    job_items.work();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int polls = 0; (state_.load(std::memory_order_acquire) & kCount) != 0; ++polls) {
      if (polls < 4096)
        pause_briefly();
      else
        std::this_thread::yield();
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

  void serve(int index);

  std::mutex entry_;
  std::mutex sleep_;
  std::condition_variable wake_;
  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  Job* job_ = nullptr;
  int allowed_ = 0;
  int num_workers_ = 0;
};

void Pool::serve(int index) {
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
    if (index < allowed_) job_->work();
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

// The OpenMP runtime that the process already holds, PyTorch's: void GOMP_parallel(function, data, threads, flags), which
// LLVM's and Intel's runtimes offer as well. Its workers poll for milliseconds after each of PyTorch's operators, and a
// second pool shares the cores with them: a vocoder's layer took 8.2 ms in turns with PyTorch's and 5.6 ms alone (2 cores).
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<bool> is_child{false};  // after a fork the team's threads are gone

Team team() {
  static const Team found = [] {
    pthread_atfork(nullptr, nullptr, [] { is_child.store(true, std::memory_order_relaxed); });
    return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return is_child.load(std::memory_order_relaxed) ? nullptr : found;
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
  Job job{num_items, run, context};
  if (const Team together = team()) {
    together([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(num_threads), 0);
  } else {
    pool().run(job, num_threads);
  }
  if (job.error) std::rethrow_exception(job.error);
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
