// ring_sm90.cuh — what a ring of shared-memory stages between warps is made of: mbarriers, bulk copies, and warpgroup
// products with both operands in shared memory (sm_90a).
//
// A stage has two barriers. Writers wait on `empty`, fill, and arrive on `full`; readers wait on `full`, read, and arrive
// on `empty`. Both sides count the uses of the ring in a RingPlace; a fresh barrier lets the first wait on `empty` through.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "wgmma_sm90.cuh"

using Barrier = unsigned long long;

__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; then a barrier of the block.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni through;\n"
      "bra.uni again;\n"
      "through:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Bytes (a multiple of 16, both addresses aligned to 16) from global to shared memory by the copy engine; `barrier` counts
// them down.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;  // of the uses that `full` completes; `empty` is one behind
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};
