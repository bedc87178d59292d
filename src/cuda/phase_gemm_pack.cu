// phase_gemm_pack — weights (ci, co / groups, taps) rearranged into mma.sync column fragments, rounded as they are used.
// Computes  packed[group][column block][pass][chunk][(entry, k8, product)][part][pair of tiles][lane][4], with one tile
//           [lane][part][2]; zero beyond n and k. The bracketed order is PG_ORDER: tap * (steps of a chunk) + step, the
//           order of use
// Method    one thread a word; 147 kB for 64 x 64 channels x 9 taps, so the time is the launch
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

__constant__ int pg_order[] = {PG_ORDER};            // one chunk: all passes behind each other
__constant__ int pg_item_begin[] = {PG_ITEM_BEGIN};  // per pass, in taps

extern "C" __global__ void __launch_bounds__(256)
    phase_gemm_pack(const storage_t* weight, unsigned* packed, unsigned total, int weight_last) {
  constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;
  constexpr int kRegisters = PG_WN == 8 ? 2 : 4;
  for (unsigned word = blockIdx.x * 256 + threadIdx.x; word < total; word += gridDim.x * 256) {
    unsigned index = word;
    const int r = index % kRegisters;
    index /= kRegisters;
    int part = 0;
    if (PG_WN == 8) part = index % PG_PARTS, index /= PG_PARTS;
    const int lane = index % 32;
    index /= 32;
    const int pair = index % (PG_WN / 4 / kRegisters);
    index /= PG_WN / 4 / kRegisters;
    if (PG_WN > 8) part = index % PG_PARTS, index /= PG_PARTS;
    const int use = index % (PG_NUM_ITEMS * PG_CHUNKS * PG_STEPS);
    index /= PG_NUM_ITEMS * PG_CHUNKS * PG_STEPS;
    int pass = 0;
    while (pg_item_begin[pass + 1] * (PG_CHUNKS * PG_STEPS) <= use) ++pass;
    const int per_chunk = (pg_item_begin[pass + 1] - pg_item_begin[pass]) * PG_STEPS;
    const int in_pass = use - pg_item_begin[pass] * (PG_CHUNKS * PG_STEPS);
    const int chunk = in_pass / per_chunk;
    const int order = pg_order[pg_item_begin[pass] * PG_STEPS + in_pass % per_chunk];
    const int tap = order / PG_STEPS, k8 = chunk * PG_STEPS + order % PG_STEPS;
    const int block = index % PG_COLUMN_WARPS;
    const int group = index / PG_COLUMN_WARPS;
    const int n = block * PG_WN + pair * 16 + r / 2 * 8 + lane / 4;
    const int k = (k8 * 8 + r % 2 * 4 + lane % 4) * kPerWord;
    storage_t value[2] = {storage_t(), storage_t()};
    for (int e = 0; e < kPerWord; ++e) {
      if (n < PG_N && k + e < PG_K) {
        // forward: k = ci, n = co; grad_input: k = co, n = ci
        const long long ci = PG_FORWARD ? k + e : n, co = PG_FORWARD ? n : k + e;
        value[e] =
            weight[weight_element<TCONV_CO, PG_NUM_TAPS>(weight_last, group * (long long)TCONV_CI + ci, co, tap)];
      }
    }
#if TCONV_DTYPE_f32
    const float x = widen(value[0]);
    const unsigned big = to_tf32(x);
    packed[word] = part == 0 ? big : to_tf32(x - __uint_as_float(big));
#else
    packed[word] = pack_words(value[0], value[1]);
#endif
  }
}
