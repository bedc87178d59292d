// phase_gemm_pack_sm90 — weights rearranged into the row fragments of phase_gemm_sm90, rounded as they are used.
// Computes  packed[group][row block of 64][entry][chunk step][warp][lane][4], rows by P9_ROW_CHANNEL and P9_ROW_LIVE
// Method    one thread a word; an entry (shift) has a tap for some of the width phases, zero for the others
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

__constant__ int p9_entry_tap[] = {P9_ENTRY_TAP};  // [entry][live phase] -> packed tap, or -1

extern "C" __global__ void __launch_bounds__(256)
    phase_gemm_pack(const storage_t* weight, unsigned* packed, unsigned total, int weight_last) {
  constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;
  for (unsigned word = blockIdx.x * 256 + threadIdx.x; word < total; word += gridDim.x * 256) {
    unsigned index = word;
    const int r = index % 4;
    index /= 4;
    const int lane = index % 32;
    index /= 32;
    const int warp = index % 4;
    index /= 4;
    const int k8 = index % P9_K8;
    index /= P9_K8;
    const int entry = index % P9_NUM_ENTRIES;
    index /= P9_NUM_ENTRIES;
    const int block = index % P9_ROW_WARPGROUPS;
    const int group = index / P9_ROW_WARPGROUPS;
    const int row = warp * 16 + lane / 4 + r % 2 * 8;
    const int k = (k8 * 8 + lane % 4 + r / 2 * 4) * kPerWord;
    const int n = block * P9_CHANNELS + P9_ROW_CHANNEL(row);
    storage_t value[2] = {storage_t(), storage_t()};
    if (P9_ROW_CHANNEL(row) < P9_CHANNELS && n < P9_N_CHANNELS) {
      const int tap = p9_entry_tap[entry * P9_NUM_LIVE + P9_ROW_LIVE(row)];
      for (int e = 0; e < kPerWord; ++e)
        if (tap >= 0 && k + e < P9_K) {
          const long long ci = P9_FORWARD ? k + e : n, co = P9_FORWARD ? n : k + e;
          value[e] =
              weight[weight_element<TCONV_CO, P9_NUM_TAPS>(weight_last, group * (long long)TCONV_CI + ci, co, tap)];
        }
    }
#if TCONV_DTYPE_f32
    packed[word] = to_tf32(widen(value[0]));
#else
    packed[word] = pack_words(value[0], value[1]);
#endif
  }
}
