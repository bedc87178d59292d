// barrier_sm90.cuh — hand-over of stages between warps that fill and warps that multiply (sm_90a).
//
// An mbarrier counts arrivals; each time all have come its phase flips. `barrier_wait(barrier, parity)` returns once
// the phase of that parity is complete; on a fresh barrier parity 1 returns at once.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "wgmma_sm90.cuh"

__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra complete;\n"
      "bra again;\n"
      "complete: }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Numbered barriers (0 is __syncthreads): kThreads of them meet, of which those that only come do not wait.
template <int kThreads>
__device__ __forceinline__ void meet(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void come(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
// Registers move from warps that fill to warps that multiply; each role is one branch of one if.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// 16 bytes to shared memory behind the thread's back; zeros when not valid (the source is then not read).
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
