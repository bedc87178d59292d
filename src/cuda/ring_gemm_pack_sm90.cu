// ring_gemm_pack_sm90 — weights rearranged into the blocks that ring_gemm_sm90 copies, rounded as they are used.
// Computes  packed[group][row block][pass][chunk][entry of the pass][16-byte unit of channels][row][4 words]
// Method    one thread a word; an entry (shift) has a tap for some of the width phases, zero for the others
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

__constant__ int rg_entry_begin[] = {RG_ENTRY_BEGIN};  // per pass
__constant__ int rg_entry_tap[] = {RG_ENTRY_TAP};      // [entry][live phase] -> packed tap, or -1

extern "C" __global__ void __launch_bounds__(256)
    ring_gemm_pack(const storage_t* weight, unsigned* packed, unsigned total) {
  constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;
  constexpr unsigned kBlock = RG_NUM_ENTRIES * RG_CHUNKS * RG_KC * 64;  // words of a row block
  for (unsigned word = blockIdx.x * 256 + threadIdx.x; word < total; word += gridDim.x * 256) {
    const unsigned block = word / kBlock;
    const int row_block = block % RG_ROW_BLOCKS, group = block / RG_ROW_BLOCKS;
    unsigned index = word % kBlock;
    const int r = index % 4;
    index /= 4;
    const int row = index % 64;
    index /= 64;
    const int unit = index % (RG_KC / 4);
    index /= RG_KC / 4;
    int pass = 0;
    while (index >= static_cast<unsigned>(rg_entry_begin[pass + 1]) * RG_CHUNKS) ++pass;
    const int first = rg_entry_begin[pass], count = rg_entry_begin[pass + 1] - first;
    index -= first * RG_CHUNKS;
    const int entry = first + index % count, chunk = index / count;
    const int k = (chunk * RG_KC + unit * 4 + r) * kPerWord;
    const int n = row_block * RG_CHANNELS + RG_ROW_CHANNEL(row);
    storage_t value[2] = {storage_t(), storage_t()};
    if (RG_ROW_CHANNEL(row) < RG_CHANNELS && n < RG_N_CHANNELS) {
      const int tap = rg_entry_tap[entry * RG_NUM_LIVE + RG_ROW_LIVE(row)];
      for (int e = 0; e < kPerWord; ++e)
        if (tap >= 0 && k + e < RG_K) {
          const long long ci = RG_FORWARD ? k + e : n, co = RG_FORWARD ? n : k + e;
          value[e] = weight[((group * (long long)TCONV_CI + ci) * TCONV_CO + co) * RG_NUM_TAPS + tap];
        }
    }
#if TCONV_DTYPE_f32
    packed[word] = to_tf32(widen(value[0]));
#else
    packed[word] = pack_words(value[0], value[1]);
#endif
  }
}
