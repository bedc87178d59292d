// epilogue.cuh — what the generated prelude of a layer is made of.
//
// The prelude (layer_prelude in jit.cpp) defines, for the step it is made for:
//   TCONV_RANK TCONV_GROUPS TCONV_CI TCONV_CO (per group) TCONV_K0..2 TCONV_S0..2 TCONV_P0..2 TCONV_D0..2
//   TCONV_DTYPE_f32 | _f64 | _f16 | _bf16    TCONV_CHANNELS_LAST TCONV_TF32 TCONV_BIAS TCONV_PRE (0 or 1)   TCONV_OPS
//   storage_t  elements of input, weight, bias, tensor operands     operand_t  channel operands
//   output_t   elements of the result                               accum_t    float, or double for f64
//   T tconv_pre<T>(x)                                     the pre-activation
//   T tconv_epilogue<T>(x, channel, element, operands)    the pointwise operations, up to the norm if there is one
//   T tconv_after<T>(x, channel, element, operands)       those behind the norm
//   accum_t tconv_bias(bias, channel)                     0 without a bias
// and, where the direction is grad_epilogue, tconv_epilogue_grad, tconv_after_grad and tconv_epilogue_operands,
// tconv_after_operands. `channel` counts over all groups; `element` is the offset in the output's memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convert.cuh"

struct Operands {
  const void* at[16];
};
// Gradients of the operands; null: not wanted.
struct GradOperands {
  void* at[16];
};

__device__ __forceinline__ float tconv_exp(float x) { return expf(x); }
__device__ __forceinline__ double tconv_exp(double x) { return exp(x); }
__device__ __forceinline__ float tconv_tanh(float x) { return tanhf(x); }
__device__ __forceinline__ double tconv_tanh(double x) { return tanh(x); }
__device__ __forceinline__ float tconv_log1p(float x) { return log1pf(x); }
__device__ __forceinline__ double tconv_log1p(double x) { return log1p(x); }
// exp(-x^2 / 2) times a polynomial of 1 / (1 + 0.28 |x|), fitted for |x| < 9 to an absolute 4e-8; rounding and the two
// approximate instructions add up to about ten times that. A gelu takes 16 instructions so and 31 with erff (sm_90a).
__device__ __forceinline__ float tconv_normal_cdf(float x) {
  const float magnitude = fabsf(x);
#ifdef __CUDA_ARCH__
  float t, decay;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(0.28f * magnitude + 1.f));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(decay) : "f"(x * x * -0.72134752f));
#else  // emulation
  const float t = 1.f / (0.28f * magnitude + 1.f), decay = expf(x * x * -0.5f);
#endif
  float sum = -0.10723614f;
  sum = sum * t + 0.39578143f;
  sum = sum * t - 0.24670516f;
  sum = sum * t + 0.27683825f;
  sum = sum * t + 0.06428388f;
  sum = sum * t + 0.11703771f;
  const float tail = sum * t * decay;
  return x > 0.f ? 1.f - tail : tail;
}
__device__ __forceinline__ double tconv_normal_cdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }
// n / (n + 2) with n = e (e + 2), e = exp(x); 1 beyond 20.
template <typename T>
__device__ __forceinline__ T tconv_tanh_softplus(T x) {
  const T e = tconv_exp(x > T(20) ? T(20) : x), n = e * (e + T(2));
  return n / (n + T(2));
}
__device__ __forceinline__ double tconv_infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
__device__ __forceinline__ double tconv_nan() { return __longlong_as_double(0x7ff8000000000000ll); }
