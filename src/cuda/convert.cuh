// convert.cuh — storage types and their conversions, without any CUDA header: half and bfloat16 by PTX.
// SPDX-License-Identifier: Apache-2.0
#pragma once

struct alignas(2) f16_t {
  unsigned short bits;
};
struct alignas(2) bf16_t {
  unsigned short bits;
};

// For kernels that launch_behind() enqueues: they start while the kernel before them still ends, and wait here until that has
// ended and what it wrote is visible. Before it they may touch neither what that reads nor what it writes.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where the weight of input channel ci (of all groups), output channel co (of its group) and a tap lies: contiguous, or as
// PyTorch keeps the weights of a channels_last layer.
template <int kOutputChannels, int kTaps>
__device__ __forceinline__ long long weight_element(int channels_last, long long ci, long long co, long long tap) {
  return channels_last ? (ci * kTaps + tap) * kOutputChannels + co : (ci * kOutputChannels + co) * kTaps + tap;
}

// A place in global memory that the compiler knows nothing else about. Where it knows how one was worked out, it may do that
// again from the kernel's parameters for every store instead of keeping it.
template <typename T>
__device__ __forceinline__ T* opaque_global(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Division by a number that the host knows at launch: three instructions instead of some twenty and a reciprocal.
// Dividends are below 2^31. The host's part is divisor_of() in driver.h.
struct Divisor {
  unsigned divisor, multiplier, shift;
  // Leaves the quotient in `index` and gives the remainder.
  __device__ __forceinline__ int take_remainder(unsigned& index) const {
    const unsigned quotient = (__umulhi(index, multiplier) + index) >> shift;
    const unsigned remainder = index - quotient * divisor;
    index = quotient;
    return static_cast<int>(remainder);
  }
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
  static __device__ __forceinline__ unsigned pair(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
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
  static __device__ __forceinline__ unsigned pair(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};
template <typename S, typename A>
__device__ __forceinline__ S narrow(A x) {
  return Narrow<S>::of(x);
}

// Two 16-bit values as a word, the first in the low half: one instruction.
template <typename S>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  return Narrow<S>::pair(low, high);
}

// count elements of S moved together, in pieces of at most 16 bytes to which the address must be aligned.
template <typename S, int count>
struct alignas(sizeof(S) * count < 16 ? sizeof(S) * count : 16) Pack {
  S item[count];
};
// 16 bytes to global memory as one access. Where the same elements are also stored one by one on another path, the
// compiler takes a vector apart to share stores between the paths; assembly it leaves whole.
__device__ __forceinline__ void store_16(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
template <typename S, int count>
__device__ __forceinline__ void words_of(unsigned* word, const S (&item)[count]) {
#pragma unroll
  for (int i = 0; i < count * static_cast<int>(sizeof(S)) / 4; ++i) {
    if constexpr (sizeof(S) == 2)
      word[i] = item[2 * i].bits | static_cast<unsigned>(item[2 * i + 1].bits) << 16;
    else
      word[i] = __float_as_uint(item[i]);
  }
}
// 16 bytes of 16-bit or fp32 elements.
template <typename S, int count>
__device__ __forceinline__ uint4 unit_of(const S (&item)[count]) {
  static_assert(sizeof(S) * count == 16 && sizeof(S) <= 4);
  unsigned word[4];
  words_of(word, item);
  return make_uint4(word[0], word[1], word[2], word[3]);
}
// As few accesses as the size allows. A Pack of 16-bit types that is assigned as a whole becomes one per element, so these
// go by words.
template <typename S, int count>
__device__ __forceinline__ void store_pack(S* to, const S (&item)[count]) {
  if constexpr (sizeof(S) == 2 && count == 2) {
    words_of(reinterpret_cast<unsigned*>(to), item);
  } else if constexpr (sizeof(S) == 2 && count == 4) {
    unsigned word[2];
    words_of(word, item);
    *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  } else if constexpr (sizeof(S) == 2 && count == 8) {
    store_16(to, unit_of(item));
  } else {
    Pack<S, count> pack;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.item[i] = item[i];
    *reinterpret_cast<Pack<S, count>*>(to) = pack;
  }
}
template <typename S, int count>
__device__ __forceinline__ void load_pack(S (&item)[count], const S* from) {
  if constexpr (sizeof(S) == 2 && (count == 2 || count == 4 || count == 8)) {
    const auto words = *reinterpret_cast<const Pack<unsigned, count / 2>*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) item[i].bits = static_cast<unsigned short>(words.item[i / 2] >> (i % 2 * 16));
  } else {
    const auto pack = *reinterpret_cast<const Pack<S, count>*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) item[i] = pack.item[i];
  }
}
