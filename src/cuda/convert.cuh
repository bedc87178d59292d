// convert.cuh — storage types and their conversions, without any CUDA header: half and bfloat16 by PTX.
// SPDX-License-Identifier: Apache-2.0
#pragma once

struct alignas(2) f16_t {
  unsigned short bits;
};
struct alignas(2) bf16_t {
  unsigned short bits;
};

// widen: a stored element as the type it is computed in.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(f16_t x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
__device__ __forceinline__ float widen(bf16_t x) { return __int_as_float(static_cast<int>(x.bits) << 16); }

// narrow<S>: a computed value as it is stored, rounded once to nearest even; too large becomes infinity, as in PyTorch.
template <typename S>
struct Narrow;
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float of(float x) { return x; }
  static __device__ __forceinline__ float of(double x) { return static_cast<float>(x); }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double of(double x) { return x; }
};
template <>
struct Narrow<f16_t> {
  static __device__ __forceinline__ f16_t of(float x) {
    f16_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
  }
  static __device__ __forceinline__ f16_t of(double x) {
    f16_t result;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(result.bits) : "d"(x));
    return result;
  }
};
template <>
struct Narrow<bf16_t> {
  static __device__ __forceinline__ bf16_t of(float x) {
    bf16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
  }
  static __device__ __forceinline__ bf16_t of(double x) { return of(static_cast<float>(x)); }
};
template <typename S, typename A>
__device__ __forceinline__ S narrow(A x) {
  return Narrow<S>::of(x);
}

// count elements of S moved together, in pieces of at most 16 bytes to which the address must be aligned.
template <typename S, int count>
struct alignas(sizeof(S) * count < 16 ? sizeof(S) * count : 16) Pack {
  S item[count];
};
