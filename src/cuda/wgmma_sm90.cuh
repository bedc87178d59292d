// wgmma_sm90.cuh — warpgroup products with the rows in registers and the columns in shared memory (sm_90a).
//
// One 16-byte unit holds 4 fp32 or 8 16-bit channels of one position. A plane is one unit for every position of the tile,
// so a step (32 bytes of channels: k8 TF32, k16 16-bit) reads two neighbouring planes. That is the K-major layout without
// swizzle: core matrices of 8 positions x 16 bytes, 128 bytes apart along the positions, a plane apart along k. Any
// position is a legal start address, so one staged tile serves every tap. `wgmma_step` itself is generated in the prelude
// for the number of positions at hand.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "mma_sm80.cuh"

__device__ __forceinline__ unsigned long long columns_descriptor(const void* first, unsigned plane_bytes) {
  const unsigned long long address = (shared_address(first) >> 4) & 0x3fff;
  return address | (static_cast<unsigned long long>((plane_bytes >> 4) & 0x3fff) << 16) |
         (static_cast<unsigned long long>(128 >> 4) << 32);
}
// The same in halves: the low word holds the address in 16-byte units, so a neighbouring operand is an addition away. The
// high word is the distance of 8 rows or columns in such units, and in its top bits the exchange of units: 1, 2, 3 where
// the copy engine laid 128, 64 or 32 bytes of k side by side; plane_bytes then has no meaning. The exchange follows the
// bits of the address, so here too any row or column is a legal start.
__device__ __forceinline__ unsigned operand_word(const void* first, unsigned plane_bytes) {
  return shared_address(first) >> 4 | plane_bytes >> 4 << 16;
}
__device__ __forceinline__ unsigned long long operand_descriptor(unsigned low, unsigned high) {
  return static_cast<unsigned long long>(high) << 32 | low;
}
// Four matrices of 8 x 8 16-bit elements from shared memory, turned: a lane names a line of 16 bytes of one of them.
__device__ __forceinline__ void load_turned_matrices(unsigned address, unsigned (&matrix)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}
// Orders register writes (sums, row fragments) before the products that read them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Makes shared memory written by ordinary stores visible to wgmma; before the barrier, by every writing thread.
__device__ __forceinline__ void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// A barrier of one warpgroup; barrier 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}
