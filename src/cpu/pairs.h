// pairs.h — products of pairs of bf16 for avx512_bf16, of single values elsewhere; for files that are compiled once per
// target. A pair is a word that passes through registers as fp32 but is never computed with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd.h"

namespace tconv::cpu {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// sum += a * b; for pairs of bf16 two products each, exact and added in fp32.
template <class S>
TCONV_INLINE Vec<S> multiply_add(Vec<S> sum, Vec<S> a, Vec<S> b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == sizeof(float))
    return bits_of<VecF>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
#endif
  return sum + a * b;
}
template <class S>
TCONV_INLINE Vec<S> broadcast(const S* p) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(S) == sizeof(float)) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return bits_of<VecF>(VecI{} + word);
  }
#endif
  return splat(*p);
}

// to[i] = the pair (from[i], second[i]), or (from[i], 0) without a second; both hold bf16 as fp32. May be in place.
TCONV_INLINE void pack_pairs(const float* from, const float* second, int64_t n, float* to) {
  typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) {
    VecU word = bits_of<VecU>(load(from + i)) >> 16;
    if (second) word |= bits_of<VecU>(load(second + i));
    store(to + i, bits_of<VecF>(word));
  }
  for (; i < n; ++i) {
    const uint32_t high = second ? bits_of<uint32_t>(second[i]) : 0, word = bits_of<uint32_t>(from[i]) >> 16 | high;
    to[i] = bits_of<float>(word);
  }
}

}  // namespace
}  // namespace tconv::cpu
