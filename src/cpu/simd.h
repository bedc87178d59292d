// simd.h — vectors, their mathematics, and rows of any dtype, for files that are compiled once per target.
//
// GCC/Clang vector extensions: one source for AVX-512, AVX2 and 16-byte portable vectors. Everything here has internal
// linkage, and nothing here instantiates inline functions of the standard library: the linker merges those across
// objects and might keep the copy that was compiled for a larger instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tconv/epilogue.h"

#define TCONV_INLINE inline __attribute__((always_inline))

namespace tconv::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
};
template <>
struct VecOf<double> {
  using type = VecD;
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(S));

template <class S>
TCONV_INLINE Vec<S> load(const S* p) {
  Vec<S> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
TCONV_INLINE void store(S* p, Vec<S> v) {
  memcpy(p, &v, sizeof v);
}
template <class S>
TCONV_INLINE Vec<S> splat(S x) {
  return x - Vec<S>{};
}
// A row operand: one value for the whole row (step 0) or one per element (step 1).
template <class S>
TCONV_INLINE Vec<S> fetch(const S* p, int step, int64_t i) {
  return step ? load(p + i) : splat(*p);
}

template <class To, class From>
TCONV_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Sum of the lanes, in a fixed tree.
template <class S>
TCONV_INLINE S reduce(Vec<S> v) {
  S lanes[kLanes<S>];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<S> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <int...>
struct LaneList {};
template <int Count, int... Lane>
struct CountLanes : CountLanes<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct CountLanes<0, Lane...> {
  using type = LaneList<Lane...>;
};
template <int Count>
using LaneNumbers = typename CountLanes<Count>::type;

// Lane l of the result is the sum of the lanes of v[l]: log2(lanes) rounds that add neighbours of two vectors at once,
// 3 instructions a vector where reduce() takes about 15.
template <class S, int Width, int... Lane>
TCONV_INLINE Vec<S> add_neighbours(Vec<S> a, Vec<S> b, LaneList<Lane...>) {
  return __builtin_shufflevector(a, b,
                                 (Lane / (2 * Width) * 2 * Width + Lane % Width + (Lane & Width ? kLanes<S> : 0))...) +
         __builtin_shufflevector(
             a, b, (Lane / (2 * Width) * 2 * Width + Lane % Width + Width + (Lane & Width ? kLanes<S> : 0))...);
}
template <class S, int Width, int... Lane>
TCONV_INLINE Vec<S> reduce_lanes(const Vec<S>* v, LaneList<Lane...> lanes) {
  if constexpr (Width == 0) {
    return v[0];
  } else {
    const Vec<S> a = reduce_lanes<S, Width / 2>(v, lanes), b = reduce_lanes<S, Width / 2>(v + Width, lanes);
    return add_neighbours<S, Width>(a, b, lanes);
  }
}
template <class S>
TCONV_INLINE Vec<S> reduce_all(const Vec<S>* v) {
  return reduce_lanes<S, kLanes<S> / 2>(v, LaneNumbers<kLanes<S>>{});
}

// ---- Elementary functions, fp32: polynomials fitted to a relative error below 1e-8, evaluated in fp32 -----------------

TCONV_INLINE VecF absolute(VecF x) { return bits_of<VecF>(bits_of<VecI>(x) & 0x7fffffff); }
TCONV_INLINE VecF with_sign_of(VecF magnitude, VecF sign) {
  return bits_of<VecF>(bits_of<VecI>(magnitude) | (bits_of<VecI>(sign) & static_cast<int32_t>(0x80000000u)));
}

// 2^k * e^r with |r| <= ln(2)/2. The power is applied in two halves, so that results overflow and underflow gradually.
TCONV_INLINE VecF tconv_exp(VecF x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  VecF n = x * 1.44269504f + magic;
  const VecI k = bits_of<VecI>(n) - bits_of<VecI>(magic);
  n -= magic;
  VecF r = x - n * 0.693359375f;  // 10 bits of ln(2): exact products
  r = r + n * 2.12194440e-4f;
  VecF q = splat(1.39411e-3f);
  q = q * r + 8.3632e-3f;
  q = q * r + 4.166637e-2f;
  q = q * r + 1.6666577e-1f;
  q = q * r + 0.5f;
  const VecF p = (q * r) * r + r + 1.0f;
  const VecI half = k >> 1;
  return p * bits_of<VecF>((half + 127) << 23) * bits_of<VecF>((k - half + 127) << 23);
}

// x * P(x^2) below 1; above it 1 - exp(Q(|x|)), with Q fitted to log(erfc).
TCONV_INLINE VecF tconv_erf(VecF x) {
  const VecF t0 = absolute(x);
  const VecF t = t0 > 4.0f ? splat(4.0f) : t0;  // erf(4) rounds to 1
  const VecF z = x * x;
  VecF p = splat(7.85385965e-05f);
  p = p * z - 8.01019311e-04f;
  p = p * z + 5.18832763e-03f;
  p = p * z - 2.68538119e-02f;
  p = p * z + 1.12835851e-01f;
  p = p * z - 3.76126258e-01f;
  p = p * z + 1.12837917f;
  VecF q = splat(-2.14455478e-05f);
  q = q * t + 4.38529726e-04f;
  q = q * t - 4.19085473e-03f;
  q = q * t + 2.51718060e-02f;
  q = q * t - 1.08361548e-01f;
  q = q * t - 6.33272418e-01f;
  q = q * t - 1.12955204f;
  q = q * t + 1.82459786e-04f;
  const VecF tail = with_sign_of(1.0f - tconv_exp(q), x);
  return t0 < 1.0f ? x * p : tail;
}

TCONV_INLINE VecF tconv_tanh(VecF x) {
  const VecF z = x * x;
  VecF p = splat(-0.0060622f);
  p = p * z + 0.02097499f;
  p = p * z - 0.05384669f;
  p = p * z + 0.13332746f;
  p = p * z - 0.33333329f;
  const VecF near = x + x * (z * p);
  const VecF far = with_sign_of(1.0f - 2.0f / (tconv_exp(2.0f * absolute(x)) + 1.0f), x);
  return z < 0.4f ? near : far;
}

// log(1 + x) = log(u) + (what u = 1 + x lost to rounding) / u; log by 2 atanh((m - 1) / (m + 1)).
TCONV_INLINE VecF tconv_log1p(VecF x) {
  const VecF u = 1.0f + x;
  const VecI shifted = bits_of<VecI>(u) - 0x3f3504f3;  // so that m lies in [sqrt(1/2), sqrt(2))
  const VecI k = shifted >> 23;
  const VecF m = bits_of<VecF>(bits_of<VecI>(u) - (k << 23));
  const VecF s = (m - 1.0f) / (m + 1.0f);
  const VecF z = s * s;
  VecF p = splat(2.0f / 9);
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  p = p * z + 2.0f;
  const VecF kf = __builtin_convertvector(k, VecF);
  const VecF log_u = kf * 0.693359375f + (s * p - kf * 2.12194440e-4f);
  const VecF result = log_u + (x - (u - 1.0f)) / u;
  return u < __builtin_inff() ? result : u;  // NaN and infinity as they are
}

#define TCONV_LANEWISE(name, function)                              \
  TCONV_INLINE VecD name(VecD x) {                                  \
    for (int i = 0; i < kLanes<double>; ++i) x[i] = function(x[i]); \
    return x;                                                       \
  }
TCONV_LANEWISE(tconv_exp, ::exp)
TCONV_LANEWISE(tconv_erf, ::erf)
TCONV_LANEWISE(tconv_tanh, ::tanh)
TCONV_LANEWISE(tconv_log1p, ::log1p)
#undef TCONV_LANEWISE

// tanh(softplus(x)) = n / (n + 2) with n = e (e + 2), e = exp(x); 1 beyond 20.
#define TCONV_COMPOSED(V, S)                                                        \
  TCONV_INLINE V tconv_normal_cdf(V x) {                                            \
    return (tconv_erf(x * static_cast<S>(0.70710678118654752440)) + S(1)) * S(0.5); \
  }                                                                                 \
  TCONV_INLINE V tconv_tanh_softplus(V x) {                                         \
    const V e = tconv_exp(x > splat(S(20)) ? splat(S(20)) : x), n = e * (e + S(2)); \
    return n / (n + S(2));                                                          \
  }
TCONV_COMPOSED(VecF, float)
TCONV_COMPOSED(VecD, double)
#undef TCONV_COMPOSED

// ---- Rows: n elements of a dtype to and from arithmetic type S --------------------------------------------------------

typedef uint16_t VecH __attribute__((vector_size(kVecBytes / 2)));

TCONV_INLINE VecF from_bfloat(VecH h) {
  typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
  return bits_of<VecF>(__builtin_convertvector(h, VecU) << 16);
}
// In the low half of every lane; the high half is zero.
TCONV_INLINE VecI round_to_bfloat(VecF x) {
  typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
  const VecU bits = bits_of<VecU>(x);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40;
  return bits_of<VecI>(x == x ? rounded : quiet);
}
TCONV_INLINE VecH to_bfloat(VecF x) {
#if defined(__AVX512BF16__)
  // Numbers below 2^-126 become zero, as they do in this target's products of pairs.
  return bits_of<VecH>(_mm512_cvtneps_pbh(bits_of<__m512>(x)));
#else
  return __builtin_convertvector(round_to_bfloat(x), VecH);
#endif
}
TCONV_INLINE VecF from_half(VecH h) {
#if defined(__AVX512F__)
  return bits_of<VecF>(_mm512_maskz_cvtph_ps(0xffff, bits_of<__m256i>(h)));
#elif defined(__AVX2__)
  return bits_of<VecF>(_mm256_cvtph_ps(bits_of<__m128i>(h)));
#else
  typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
  const VecI wide = bits_of<VecI>(__builtin_convertvector(h, VecU));
  const VecI magnitude = (wide & 0x7fff) << 13;
  const VecI scaled = bits_of<VecI>(bits_of<VecF>(magnitude) * 0x1p112f);  // moves the exponent; exact for subnormals
  const VecI special = magnitude | 0x7f800000;
  const VecI value = (wide & 0x7c00) == 0x7c00 ? special : scaled;
  return bits_of<VecF>(value | ((wide & 0x8000) << 16));
#endif
}
TCONV_INLINE VecH to_half(VecF x) {
#if defined(__AVX512F__)
  return bits_of<VecH>(_mm512_maskz_cvtps_ph(0xffff, bits_of<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return bits_of<VecH>(_mm256_cvtps_ph(bits_of<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecI bits = bits_of<VecI>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const VecI normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 puts units of 2^-24 at the end of the mantissa, where the addition itself rounds to nearest even.
  const VecI small = bits_of<VecI>(bits_of<VecF>(magnitude) + 0.5f) - 0x3f000000;
  VecI half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? VecI{} + 0x7c00 : half;  // 65520 and above
  half = magnitude > 0x7f800000 ? VecI{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, VecH);
#endif
}

// The first n <= lanes elements of a vector, zeros behind them. A masked move takes as long as a whole one; memcpy of a
// length that the compiler does not know is a call, which took most of the time of staging 1 to 8 channels. AVX2 has no
// moves of a part of 16-bit elements, and AMD's of wider ones take tens of cycles to store: halves, as n has bits.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int32_t kFirstLanes[2 * 8] = {-1, -1, -1, -1, -1, -1, -1, -1};
template <class S>
TCONV_INLINE __m256i first_lanes(int64_t n) {
  const int32_t* from = kFirstLanes + 8 - n * static_cast<int64_t>(sizeof(S) / sizeof(int32_t));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
#endif
template <class S>
TCONV_INLINE Vec<S> load_part(const S* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == sizeof(float))
    return bits_of<Vec<S>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
  else
    return bits_of<Vec<S>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == sizeof(float))
    return bits_of<Vec<S>>(_mm256_maskload_ps(p, first_lanes<S>(n)));
  else
    return bits_of<Vec<S>>(_mm256_maskload_pd(p, first_lanes<S>(n)));
#else
  Vec<S> v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(S));
  return v;
#endif
}
template <class S>
TCONV_INLINE void store_part(S* p, Vec<S> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == sizeof(float))
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), bits_of<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), bits_of<__m512d>(v));
#elif defined(__AVX2__)
  if (n >= kLanes<S>) return store(p, v);
  __m128i part = _mm256_castsi256_si128(bits_of<__m256i>(v));
  const int64_t bytes = n * static_cast<int64_t>(sizeof(S));
  char* to = reinterpret_cast<char*>(p);
  if (bytes & 16) {
    memcpy(to, &part, 16);
    to += 16, part = _mm256_extracti128_si256(bits_of<__m256i>(v), 1);
  }
  if (bytes & 8) {
    const int64_t low = _mm_cvtsi128_si64(part);
    memcpy(to, &low, 8);
    to += 8, part = _mm_unpackhi_epi64(part, part);
  }
  if (bytes & 4) {
    const int32_t low = _mm_cvtsi128_si32(part);
    memcpy(to, &low, 4);
  }
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(S));
#endif
}
TCONV_INLINE VecH load_part(const uint16_t* p, int64_t n) {
#if defined(__AVX512F__)
  return bits_of<VecH>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
#elif defined(__AVX2__)
  if (n >= 8) return bits_of<VecH>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  uint64_t whole = 0, last = 0;
  uint32_t pair = 0;
  uint16_t one = 0;
  if (n & 4) memcpy(&whole, p, 8);
  if (n & 2) memcpy(&pair, p + (n & 4), 4);
  if (n & 1) memcpy(&one, p + (n - 1), 2);
  last = pair | static_cast<uint64_t>(one) << (n & 2 ? 32 : 0);
  const int64_t low = static_cast<int64_t>(n & 4 ? whole : last), high = static_cast<int64_t>(n & 4 ? last : 0);
  return bits_of<VecH>(_mm_set_epi64x(high, low));
#else
  VecH h{};
  memcpy(&h, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return h;
#endif
}
TCONV_INLINE void store_part(uint16_t* p, VecH h, int64_t n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits_of<__m256i>(h));
#elif defined(__AVX2__)
  if (n >= 8) {
    memcpy(p, &h, sizeof h);
    return;
  }
  __m128i part = bits_of<__m128i>(h);
  uint64_t low = static_cast<uint64_t>(_mm_cvtsi128_si64(part));
  if (n & 4) {
    memcpy(p, &low, 8);
    p += 4, low = static_cast<uint64_t>(_mm_extract_epi64(part, 1));
  }
  if (n & 2) {
    memcpy(p, &low, 4);
    p += 2, low >>= 32;
  }
  if (n & 1) memcpy(p, &low, 2);
#else
  memcpy(p, &h, static_cast<size_t>(n) * sizeof(uint16_t));
#endif
}

// May write up to one vector beyond dst[n - 1]; reads src exactly.
TCONV_INLINE void load_row(const void* src, DType dtype, int64_t index, int64_t n, float* dst) {
  if (dtype == DType::f32) {
    memcpy(dst, static_cast<const float*>(src) + index, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(src) + index;
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    VecH h;
    if (i + kLanes<float> <= n)
      memcpy(&h, from + i, sizeof h);
    else
      h = load_part(from + i, n - i);
    store(dst + i, dtype == DType::f16 ? from_half(h) : from_bfloat(h));
  }
}
TCONV_INLINE void load_row(const void* src, DType, int64_t index, int64_t n, double* dst) {
  memcpy(dst, static_cast<const double*>(src) + index, static_cast<size_t>(n) * sizeof(double));
}
// Two vectors as 16-bit elements that follow each other.
TCONV_INLINE void store_halves(uint16_t* to, DType dtype, VecF a, VecF b) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16) {
    const __m512bh both = _mm512_cvtne2ps_pbh(bits_of<__m512>(b), bits_of<__m512>(a));
    memcpy(to, &both, sizeof both);
    return;
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (dtype == DType::bf16) {  // one packing for both
    const __m256i both =
        _mm256_packus_epi32(bits_of<__m256i>(round_to_bfloat(a)), bits_of<__m256i>(round_to_bfloat(b)));
    const __m256i ordered = _mm256_permute4x64_epi64(both, 0xd8);
    memcpy(to, &ordered, sizeof ordered);
    return;
  }
#endif
  const VecH low = dtype == DType::f16 ? to_half(a) : to_bfloat(a),
             high = dtype == DType::f16 ? to_half(b) : to_bfloat(b);
  memcpy(to, &low, sizeof low);
  memcpy(to + kLanes<float>, &high, sizeof high);
}
// Writes dst exactly; may read up to one vector beyond src[n - 1].
TCONV_INLINE void store_row(const float* src, void* dst, DType dtype, int64_t index, int64_t n) {
  if (dtype == DType::f32) {
    memcpy(static_cast<float*>(dst) + index, src, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(dst) + index;
  int64_t i = 0;
  for (; i + 2 * kLanes<float> <= n; i += 2 * kLanes<float>)
    store_halves(to + i, dtype, load(src + i), load(src + i + kLanes<float>));
  for (; i < n; i += kLanes<float>) {
    const VecH h = dtype == DType::f16 ? to_half(load(src + i)) : to_bfloat(load(src + i));
    if (i + kLanes<float> <= n)
      memcpy(to + i, &h, sizeof h);
    else
      store_part(to + i, h, n - i);
  }
}
TCONV_INLINE void store_row(const double* src, void* dst, DType, int64_t index, int64_t n) {
  memcpy(static_cast<double*>(dst) + index, src, static_cast<size_t>(n) * sizeof(double));
}

// ---- Pointwise operations over rows; buffers are padded to whole vectors ----------------------------------------------

// x[i] = op(x[i], v).
template <class S>
void apply_pointwise(OpKind kind, S scalar_a, S scalar_b, const S* operand, int step, S* row, int64_t n) {
  const Vec<S> a = splat(scalar_a), b = splat(scalar_b);
  static_cast<void>(a), static_cast<void>(b);
#define T(...) splat(static_cast<S>(__VA_ARGS__))
  switch (kind) {
#define POINTWISE(name, operand_kind, scalars, value, d_x, d_v)                       \
  case OpKind::name:                                                                  \
    for (int64_t i = 0; i < n; i += kLanes<S>) {                                      \
      const Vec<S> x = load(row + i);                                                 \
      [[maybe_unused]] const Vec<S> v = operand ? fetch(operand, step, i) : Vec<S>{}; \
      store(row + i, value);                                                          \
    }                                                                                 \
    break;
#define NORM(name, ...) \
  case OpKind::name:    \
    break;
#include "tconv/epilogue.def"
  }
#undef T
}

// gradient[i] *= d_x; operand_gradient[i] = gradient[i] * d_v when it is wanted. row: the values before the operation.
template <class S>
void reverse_pointwise(OpKind kind, S scalar_a, S scalar_b, const S* operand, int step, const S* row, S* gradient,
                       S* operand_gradient, int64_t n) {
  const Vec<S> a = splat(scalar_a), b = splat(scalar_b);
  static_cast<void>(a), static_cast<void>(b);
#define T(...) splat(static_cast<S>(__VA_ARGS__))
  switch (kind) {
#define POINTWISE(name, operand_kind, scalars, value, d_x, d_v)                       \
  case OpKind::name:                                                                  \
    for (int64_t i = 0; i < n; i += kLanes<S>) {                                      \
      [[maybe_unused]] const Vec<S> x = load(row + i);                                \
      [[maybe_unused]] const Vec<S> v = operand ? fetch(operand, step, i) : Vec<S>{}; \
      const Vec<S> g = load(gradient + i);                                            \
      if (operand_gradient) store(operand_gradient + i, g * (d_v));                   \
      store(gradient + i, g * (d_x));                                                 \
    }                                                                                 \
    break;
#define NORM(name, ...) \
  case OpKind::name:    \
    break;
#include "tconv/epilogue.def"
  }
#undef T
}

}  // namespace
}  // namespace tconv::cpu
