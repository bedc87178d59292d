// finish_moments.cuh — what the kernels that finish a chain share: what a norm sees of an element, and moments of sets.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "epilogue.cuh"

// A constant as an argument: decltype(flag)::value.
template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// (count, mean, M2) of two disjoint sets as that of both.
template <typename T>
__device__ __forceinline__ void merge_moments(T& n, T& mean, T& m2, T other_n, T other_mean, T other_m2) {
  if (other_n == T(0)) return;
  const T total = n + other_n, share = other_n / total, distance = other_mean - mean;
  mean = mean + distance * share;
  m2 = m2 + other_m2 + distance * distance * n * share;
  n = total;
}

// What the norm, or the store, sees of an element.
__device__ __forceinline__ accum_t before(const void* bias, storage_t raw, int channel, long long element,
                                          const Operands& operands) {
  accum_t x = tconv_pre<accum_t>(widen(raw)) + tconv_bias(bias, channel);
  return tconv_epilogue<accum_t>(x, channel, element, operands);
}
