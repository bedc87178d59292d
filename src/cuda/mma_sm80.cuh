// mma_sm80.cuh — mma.sync and cp.async in the shapes that the tap products use (sm_80 and later).
//
// One "word" is 4 bytes along k: one fp32 channel (m16n8k8, TF32) or two 16-bit channels (m16n8k16); both instructions
// then have the same fragment layout in words: with lane = 4 * quad + quarter
//   rows (16 x 8 words)  a0 (quad, quarter)  a1 (quad + 8, quarter)  a2 (quad, quarter + 4)  a3 (quad + 8, quarter + 4)
//   columns (8 words x 8) b0 (quarter, quad)  b1 (quarter + 4, quad)
//   sums (16 x 8)        c0, c1 (quad, 2 * quarter + 0, 1)  c2, c3 (quad + 8, ...)
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "convert.cuh"

// Words: one fp32 element, or two 16-bit elements with the first in the low half.
__device__ __forceinline__ unsigned word_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned word_of(f16_t x) { return x.bits; }
__device__ __forceinline__ unsigned word_of(bf16_t x) { return x.bits; }
template <typename S>
__device__ __forceinline__ unsigned pack_words(S low, S high) {
  return word_of(low) | (word_of(high) << 16);
}

// The first element of a word, and whether a word may be read at an address.
template <typename S>
__device__ __forceinline__ S low_half(unsigned word) {
  if constexpr (sizeof(S) == 2)
    return S{static_cast<unsigned short>(word)};
  else
    return __uint_as_float(word);
}
__device__ __forceinline__ bool a_pair_is_aligned(const void* pointer) {
  return (reinterpret_cast<unsigned long long>(pointer) & 3) == 0;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 4 bytes to shared memory behind the thread's back; zero when not valid (the source is then not read).
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Round to nearest, ties away: what cuDNN's TF32 does; truncation is 8e-4 off (docs/numerics.md).
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// The same for the tensor core, which drops the bits below the tenth of the mantissa: half a unit of that is added.
// cvt.rna costs three instructions a value, this two; infinities and NaN are left as they are.
__device__ __forceinline__ unsigned nearest_tf32(unsigned x) {
  asm("{ .reg .pred finite; .reg .f32 size; abs.f32 size, %1; setp.lt.f32 finite, size, 0f7f800000;\n"
      "@finite add.u32 %0, %0, 0x1000; }"
      : "+r"(x)
      : "f"(__uint_as_float(x)));
  return x;
}

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same onto zero, which costs no register moves.
__device__ __forceinline__ void multiply_tf32_from_zero(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                        unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Packed columns of one (tap, k8) in 16-byte loads of a lane: {b0, b1} of two tiles, for each part; with a single tile, of
// both parts.
template <int kNTiles, int kParts>
struct WeightFragments {
  unsigned word[kParts][kNTiles * 2];
  __device__ __forceinline__ void load(const unsigned* from, int lane) {
    if constexpr (kNTiles == 1 && kParts == 1) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from) + lane);
      word[0][0] = two.x, word[0][1] = two.y;
    } else if constexpr (kNTiles == 1) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + lane);
      word[0][0] = four.x, word[0][1] = four.y, word[1][0] = four.z, word[1][1] = four.w;
    } else {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int v = 0; v < kNTiles / 2; ++v) {
          const uint4 four = __ldg(reinterpret_cast<const uint4*>(from + part * (kNTiles * 64)) + v * 32 + lane);
          word[part][4 * v] = four.x;
          word[part][4 * v + 1] = four.y;
          word[part][4 * v + 2] = four.z;
          word[part][4 * v + 3] = four.w;
        }
    }
  }
};

// 16 positions over 8 words as the tensor core takes them: once per shift, for all products that use it. Of two parts the big
// one is the value itself, of which the tensor core takes the upper 11 bits, and the small one the other 13, of which it takes
// 11 from the first that is set: at most 3 units in the last place are lost. Two instructions; three would round the big part
// to nearest, seven both (cvt.rna). A value that is not finite leaves NaN.
template <int kParts>
struct LineFragments {
  unsigned word[kParts][4];
  __device__ __forceinline__ void set(unsigned w0, unsigned w1, unsigned w2, unsigned w3) {
    const unsigned raw[4] = {w0, w1, w2, w3};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#if TCONV_DTYPE_f32
      word[0][r] = kParts == 1 ? nearest_tf32(raw[r]) : raw[r];
      if (kParts == 2)
        word[kParts - 1][r] = __float_as_uint(__uint_as_float(raw[r]) - __uint_as_float(raw[r] & 0xffffe000));
#else
      word[0][r] = raw[r];
#endif
    }
  }
};

#if TCONV_DTYPE_f32
// fp32 accuracy: x = big + small on both sides; small * small, below 2^-21, is left out. kZero: the sum before was zero.
template <bool kZero, int kNTiles, int kParts>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const LineFragments<kParts>& line,
                                               const WeightFragments<kNTiles, kParts>& weights, int ni) {
  constexpr int kSmall = kParts - 1;
  const unsigned b0 = weights.word[0][2 * ni], b1 = weights.word[0][2 * ni + 1];
  if (kZero)
    multiply_tf32_from_zero(sum, line.word[kSmall], b0, b1);
  else
    multiply_tf32(sum, line.word[kSmall], b0, b1);
  multiply_tf32(sum, line.word[0], weights.word[kSmall][2 * ni], weights.word[kSmall][2 * ni + 1]);
  multiply_tf32(sum, line.word[0], b0, b1);
}
#endif

// 16 positions times 8 * kNTiles channels over 8 words.
template <int kNTiles, int kParts>
__device__ __forceinline__ void multiply_line(float (&c)[kNTiles][4], const LineFragments<kParts>& line,
                                              const WeightFragments<kNTiles, kParts>& weights) {
#pragma unroll
  for (int ni = 0; ni < kNTiles; ++ni) {
    const unsigned b0 = weights.word[0][2 * ni], b1 = weights.word[0][2 * ni + 1];
#if TCONV_DTYPE_f16
    multiply_f16(c[ni], line.word[0], b0, b1);
#elif TCONV_DTYPE_bf16
    multiply_bf16(c[ni], line.word[0], b0, b1);
#else
    if constexpr (kParts == 1) {
      multiply_tf32(c[ni], line.word[0], b0, b1);
    } else {
      // The tensor core truncates when it adds to a large sum, so groups of words are summed from zero and added in fp32.
      float sum[4];
      multiply_parts<true>(sum, line, weights, ni);
#pragma unroll
      for (int r = 0; r < 4; ++r) c[ni][r] += sum[r];
    }
#endif
  }
}
