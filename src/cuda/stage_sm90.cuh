// stage_sm90.cuh — filling a stage for the tensor core: partial copies, and rounding to TF32 where values lie (sm_90a).
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "barrier_sm90.cuh"

// kBytes to shared memory behind the thread's back: the first `bytes` from the source, the rest zeros. With 0 nothing is
// read.
template <int kBytes>
__device__ __forceinline__ void copy_part(void* to, const void* from, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
}
