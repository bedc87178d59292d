// parallel.h — items of a fixed partition, taken dynamically by the threads at hand.
//
// In a process that holds an OpenMP runtime, as PyTorch's do, its threads; never a second runtime. Elsewhere, and in the
// child of a fork, a small pool: workers spin shortly, then sleep; a caller that finds the pool busy runs its items alone.
// What an item computes must depend on its number only, so results never depend on the number of threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace tconv::cpu {

using ItemFunction = void (*)(void* context, std::int64_t item);

// Calls run(context, item) once for every item in [0, num_items), on at most num_threads threads, the caller among them.
// Returns when all are done; rethrows the first exception.
void parallel_run(std::int64_t num_items, int num_threads, ItemFunction run, void* context);

// Threads to use for Stream::num_threads: itself, or every core this process may run on when it is 0.
int resolve_threads(int requested);

template <class F>
void parallel_for(std::int64_t num_items, int num_threads, const F& body) {
  parallel_run(
      num_items, num_threads, [](void* context, std::int64_t item) { (*static_cast<const F*>(context))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Scratch memory of the calling thread, 64-byte aligned, at least `bytes` long; kept until the thread ends, so it must
// not be requested again while an earlier result is in use. Contents are undefined.
void* thread_scratch(std::int64_t bytes);

}  // namespace tconv::cpu
