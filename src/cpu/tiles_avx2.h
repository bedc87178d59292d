// tiles_avx2.h — the innermost loops of AVX2's register tiles of 4 rows by 3 vectors, in assembly; for files that are
// compiled once per target.
//
// Twelve sums, three vectors and a broadcast are all 16 registers. Where taps are written out one after the other, GCC 12
// keeps some of the sums in memory or moves them between registers: two thirds of the FMA peak of a Zen 3 core on operands
// in the first cache level, where these loops reach 90 %.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__) && defined(__x86_64__)
#define TCONV_TILES_AVX2 1

namespace tconv::cpu {
namespace {

#define TCONV_SUMS                                                                                                    \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
// A row's three sums += a broadcast value times the vectors in ymm12 to ymm14.
#define TCONV_ROW(value, a, b, c)          \
  "vbroadcastss " value                    \
  ", %%ymm15\n"                            \
  "vfmadd231ps %%ymm12, %%ymm15, %%ymm" #a \
  "\n"                                     \
  "vfmadd231ps %%ymm13, %%ymm15, %%ymm" #b \
  "\n"                                     \
  "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #c "\n"
#define TCONV_ROWS(w0, w1, w2, w3) \
  TCONV_ROW(w0, 0, 1, 2) TCONV_ROW(w1, 3, 4, 5) TCONV_ROW(w2, 6, 7, 8) TCONV_ROW(w3, 9, 10, 11)
#define TCONV_VECTORS(at) \
  "vmovups (" at          \
  "), %%ymm12\n"          \
  "vmovups 32(" at        \
  "), %%ymm13\n"          \
  "vmovups 64(" at "), %%ymm14\n"
// The sums from, or to, rows `pitch` bytes apart at c and, two rows further, at d.
#define TCONV_MOVE_ROW(move, at, a, b, c) move(at, a) move("32" at, b) move("64" at, c)
#define TCONV_LOAD(at, n) "vmovups " at ", %%ymm" #n "\n"
#define TCONV_STORE(at, n) "vmovups %%ymm" #n ", " at "\n"
#define TCONV_MOVE_SUMS(move)                      \
  TCONV_MOVE_ROW(move, "(%[c])", 0, 1, 2)          \
  TCONV_MOVE_ROW(move, "(%[c],%[pitch])", 3, 4, 5) \
  TCONV_MOVE_ROW(move, "(%[d])", 6, 7, 8) TCONV_MOVE_ROW(move, "(%[d],%[pitch])", 9, 10, 11)

#define TCONV_START_ROW(m, a, b, c)         \
  "vbroadcastss " #m "(%[start]), %%ymm" #a \
  "\n"                                      \
  "vmovaps %%ymm" #a ", %%ymm" #b           \
  "\n"                                      \
  "vmovaps %%ymm" #a ", %%ymm" #c "\n"
#define TCONV_START \
  TCONV_START_ROW(0, 0, 1, 2) TCONV_START_ROW(4, 3, 4, 5) TCONV_START_ROW(8, 6, 7, 8) TCONV_START_ROW(12, 9, 10, 11)

// c[m][v] = start[m] + sum over k and Taps taps of w[k * w_step + 4 * tap + m] * x[offsets[tap] + k * k_pitch + v]; without
// start the sums go on from what is there. k_count > 0.
template <int Taps>
void add_taps(const float* x, int64_t k_pitch, const int64_t* offsets, int64_t k_count, const float* w, int64_t w_step,
              const float* start, float* c, int64_t c_pitch) {
  k_pitch *= 4, w_step *= 4, c_pitch *= 4;
  float* d = reinterpret_cast<float*>(reinterpret_cast<char*>(c) + 2 * c_pitch);
#define TCONV_TAP(o, w0, w1, w2, w3)                               \
  "movq " #o "(%[offsets]), %%rax\n" TCONV_VECTORS("%[x],%%rax,4") \
      TCONV_ROWS(#w0 "(%[w])", #w1 "(%[w])", #w2 "(%[w])", #w3 "(%[w])")
#define TCONV_TAPS_1 TCONV_TAP(0, 0, 4, 8, 12)
#define TCONV_TAPS_2 TCONV_TAPS_1 TCONV_TAP(8, 16, 20, 24, 28)
#define TCONV_TAPS_3 TCONV_TAPS_2 TCONV_TAP(16, 32, 36, 40, 44)
#define TCONV_TAPS_4 TCONV_TAPS_3 TCONV_TAP(24, 48, 52, 56, 60)
#define TCONV_TAPS_5 TCONV_TAPS_4 TCONV_TAP(32, 64, 68, 72, 76)
#define TCONV_TAPS_6 TCONV_TAPS_5 TCONV_TAP(40, 80, 84, 88, 92)
#define TCONV_TAPS_7 TCONV_TAPS_6 TCONV_TAP(48, 96, 100, 104, 108)
#define TCONV_TAPS_8 TCONV_TAPS_7 TCONV_TAP(56, 112, 116, 120, 124)
#define TCONV_TAPS_9 TCONV_TAPS_8 TCONV_TAP(64, 128, 132, 136, 140)
// Weights come in order, but not from page to page by themselves: a kilobyte ahead.
#define TCONV_AHEAD_1 "prefetcht0 1024(%[w])\n"
#define TCONV_AHEAD_2 TCONV_AHEAD_1 "prefetcht0 1088(%[w])\n"
#define TCONV_AHEAD_3 TCONV_AHEAD_2 "prefetcht0 1152(%[w])\n"
#define TCONV_LOOP(steps)                                                                             \
  asm volatile(                                                                                       \
      "testq %[start], %[start]\n"                                                                    \
      "jz 2f\n" TCONV_START                                                                           \
      "jmp 1f\n"                                                                                      \
      "2:\n" TCONV_MOVE_SUMS(TCONV_LOAD) ".p2align 5\n1:\n" steps                                     \
                                         "decq %[k]\n"                                                \
                                         "jnz 1b\n" TCONV_MOVE_SUMS(TCONV_STORE)                      \
      : [x] "+r"(x), [w] "+r"(w), [k] "+r"(k_count)                                                   \
      : [k_pitch] "r"(k_pitch), [w_step] "r"(w_step), [offsets] "r"(offsets), [c] "r"(c), [d] "r"(d), \
        [pitch] "r"(c_pitch), [start] "r"(start)                                                      \
      : "memory", "cc", "rax", TCONV_SUMS)
#define TCONV_STEP(taps, ahead) TCONV_LOOP(taps ahead "addq %[k_pitch], %[x]\naddq %[w_step], %[w]\n")
  if constexpr (Taps == 1) {
    x += offsets[0];
    if (k_count % 2 != 0) {
      const int64_t pairs = k_count / 2;
      k_count = 1;
      TCONV_LOOP(TCONV_VECTORS("%[x]") TCONV_ROWS("(%[w])", "4(%[w])", "8(%[w])",
                                                  "12(%[w])") "addq %[k_pitch], %[x]\naddq %[w_step], %[w]\n");
      start = nullptr;
      k_count = 2 * pairs;
    }
    k_count /= 2;
    if (k_count == 0) return;
    TCONV_LOOP(TCONV_VECTORS("%[x]") TCONV_ROWS("(%[w])", "4(%[w])", "8(%[w])", "12(%[w])")
                   TCONV_VECTORS("%[x],%[k_pitch]")
                       TCONV_ROWS("(%[w],%[w_step])", "4(%[w],%[w_step])", "8(%[w],%[w_step])", "12(%[w],%[w_step])")
                           TCONV_AHEAD_1 "leaq (%[x],%[k_pitch],2), %[x]\nleaq (%[w],%[w_step],2), %[w]\n");
  }
  if constexpr (Taps == 2) TCONV_STEP(TCONV_TAPS_2, TCONV_AHEAD_1);
  if constexpr (Taps == 3) TCONV_STEP(TCONV_TAPS_3, TCONV_AHEAD_1);
  if constexpr (Taps == 4) TCONV_STEP(TCONV_TAPS_4, TCONV_AHEAD_1);
  if constexpr (Taps == 5) TCONV_STEP(TCONV_TAPS_5, TCONV_AHEAD_2);
  if constexpr (Taps == 6) TCONV_STEP(TCONV_TAPS_6, TCONV_AHEAD_2);
  if constexpr (Taps == 7) TCONV_STEP(TCONV_TAPS_7, TCONV_AHEAD_2);
  if constexpr (Taps == 8) TCONV_STEP(TCONV_TAPS_8, TCONV_AHEAD_2);
  if constexpr (Taps == 9) TCONV_STEP(TCONV_TAPS_9, TCONV_AHEAD_3);
}

// sums[r][v] += sum over i < n of vector[i * v_step + v] * scalar[r][i * b_step]; sums: 4 rows of 3 vectors
TCONV_INLINE void add_positions(const float* vector, const float* const* scalar, int64_t n, int64_t v_step,
                                int64_t b_step, float* sums) {
  if (n == 0) return;
  v_step *= 4, b_step *= 4;
  int64_t at = 0;
  const int64_t pitch = 96;
  asm volatile(TCONV_MOVE_SUMS(TCONV_LOAD) ".p2align 5\n1:\n" TCONV_VECTORS("%[vector]")
               TCONV_ROWS("(%[s0],%[at])", "(%[s1],%[at])", "(%[s2],%[at])", "(%[s3],%[at])")
               "addq %[v_step], %[vector]\n"
               "addq %[b_step], %[at]\n"
               "decq %[n]\n"
               "jnz 1b\n" TCONV_MOVE_SUMS(TCONV_STORE)
               : [vector] "+r"(vector), [at] "+r"(at), [n] "+r"(n)
               : [s0] "r"(scalar[0]), [s1] "r"(scalar[1]), [s2] "r"(scalar[2]), [s3] "r"(scalar[3]),
                 [v_step] "r"(v_step), [b_step] "r"(b_step), [c] "r"(sums), [d] "r"(sums + 48), [pitch] "r"(pitch)
               : "memory", "cc", TCONV_SUMS);
}

}  // namespace
}  // namespace tconv::cpu

#endif
