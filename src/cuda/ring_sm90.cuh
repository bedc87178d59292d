// ring_sm90.cuh — rings of shared-memory stages between warps, and copies to them by the copy engine (sm_90a).
//
// A stage has two barriers. Writers wait on `empty`, fill, and arrive on `full`; readers wait on `full`, read, and arrive
// on `empty`. Both sides count the uses of the ring in a RingPlace; a fresh barrier lets the first wait on `empty` through.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "barrier_sm90.cuh"

using Barrier = unsigned long long;

// Makes initialised barriers visible to the copy engine; then a barrier of the block.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and lets the phase wait for so many bytes.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
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

// A tensor as the copy engine sees it: made by cuTensorMapEncodeTiled, passed as a kernel parameter.
struct alignas(64) TensorMap {
  unsigned long long word[16];
};
// The box at these coordinates, innermost first, to shared memory (aligned to 128 bytes, or 1024 for an exchange of
// units); zeros outside. x0 is a multiple of 16 bytes: with others an H100 reports an illegal instruction.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int x0, int x1, int x2, int x3, int x4,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(shared_address(barrier))
      : "memory");
}

// Four matrices of 8 x 8 16-bit elements to shared memory, of which a thread holds what a product's sums would be; a lane
// names a line of 16 bytes: a row of one of them, or, turned, a column.
template <bool kTurned>
__device__ __forceinline__ void store_matrices(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
  if (kTurned)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// The same four from shared memory, turned.
__device__ __forceinline__ void load_turned_matrices(const void* from, unsigned (&matrix)[4]) {
  load_turned_matrices(shared_address(from), matrix);
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
