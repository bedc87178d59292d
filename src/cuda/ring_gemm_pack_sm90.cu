// ring_gemm_pack_sm90 — weights rearranged into the blocks that ring_gemm_sm90 copies, rounded as they are used; and, with
// RG_PACK_SOURCE, the source too, with the channels of a position side by side and zeros up to a whole chunk.
// Computes  packed[group][row block][pass][chunk][entry of the pass][16-byte unit of channels][row][4 words]
//           source_packed[image][group][position][channel]
// Method    the first blocks of the grid take the weights, the others 64 positions by a chunk of channels of the source,
//           through shared memory, so that both sides are read and written in whole sectors. Of the weights, a block takes one unit of channels of one row block through all entries, a thread one word of each: the taps
//           of a weight lie side by side and are all read while their sectors are in L1, and each entry is written as
//           whole lines. An entry (shift) has a tap for some of the width phases, zero for the others.
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

__constant__ int rg_entry_begin[] = {RG_ENTRY_BEGIN};  // per pass
__constant__ int rg_entry_tap[] = {RG_ENTRY_TAP};      // [entry][live phase] -> packed tap, or -1

#if RG_PACK_SOURCE
struct SourcePack {
  const storage_t* source;
  uint4* packed;
  long long image, inner, plane;  // elements between images, between channels or positions; positions of an image
  int tiles;                      // of 64 positions in an image
  unsigned blocks;                // images x groups x tiles x chunks
};

__device__ __forceinline__ void pack_source(const SourcePack& a, unsigned first, unsigned step) {
  constexpr int kUnits = RG_KC / 4, kPerUnit = 16 / sizeof(storage_t), kTile = 64;
  __shared__ uint4 turned[kTile][kUnits + 1];
  for (unsigned index = first; index < a.blocks; index += step) {
    unsigned rest = index;
    const int chunk = rest % RG_CHUNKS;
    rest /= RG_CHUNKS;
    const long long p0 = rest % a.tiles * kTile;
    rest /= a.tiles;
    const int group = rest % TCONV_GROUPS;
    const long long b = rest / TCONV_GROUPS;
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * kUnits; i += 256) {
      // Lanes along what is contiguous in the source.
      const int p = TCONV_CHANNELS_LAST ? i / kUnits : i % kTile, u = TCONV_CHANNELS_LAST ? i % kUnits : i / kTile;
      const int k = (chunk * kUnits + u) * kPerUnit;
      const storage_t* from =
          a.source + b * a.image +
          (TCONV_CHANNELS_LAST ? (p0 + p) * a.inner + group * RG_K + k : (group * RG_K + k) * a.inner + p0 + p);
      storage_t unit[kPerUnit];
#pragma unroll
      for (int e = 0; e < kPerUnit; ++e) {
        unit[e] = p0 + p < a.plane && k + e < RG_K ? from[e * (TCONV_CHANNELS_LAST ? 1 : a.inner)] : storage_t();
#if TCONV_DTYPE_f32
        unit[e] = __uint_as_float(to_tf32(unit[e]));
#endif
      }
      turned[p][u] = unit_of(unit);
    }
    __syncthreads();
    uint4* const to = a.packed + ((b * TCONV_GROUPS + group) * a.plane + p0) * (RG_CHUNKS * kUnits) + chunk * kUnits;
    for (int i = threadIdx.x; i < kTile * kUnits; i += 256)
      if (p0 + i / kUnits < a.plane)
        to[i / kUnits * (RG_CHUNKS * kUnits) + i % kUnits] = turned[i / kUnits][i % kUnits];
    __syncthreads();
  }
}
#endif

extern "C" __global__ void __launch_bounds__(256, 4)
    ring_gemm_pack(const storage_t* weight, unsigned* packed, unsigned blocks, int weight_last
#if RG_PACK_SOURCE
                   ,
                   unsigned weight_grid, const SourcePack source
#endif
    ) {
#if RG_PACK_SOURCE
  if (blockIdx.x >= weight_grid) {
    pack_source(source, blockIdx.x - weight_grid, gridDim.x - weight_grid);
    return;
  }
#else
  const unsigned weight_grid = gridDim.x;
#endif
  constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1, kUnits = RG_KC / 4;
  const int row = threadIdx.x / 4, channel = RG_ROW_CHANNEL(row), live = RG_ROW_LIVE(row);
  for (unsigned index = blockIdx.x; index < blocks; index += weight_grid) {
    const int unit = index % kUnits, chunk = index / kUnits % RG_CHUNKS;
    const unsigned block = index / (kUnits * RG_CHUNKS);
    const int row_block = block % RG_ROW_BLOCKS, group = block / RG_ROW_BLOCKS;
    const int n = row_block * RG_CHANNELS + channel;
    const int k = (chunk * RG_KC + unit * 4 + threadIdx.x % 4) * kPerWord;
    const bool exists = channel < RG_CHANNELS && n < RG_N_CHANNELS && k < RG_K;
    const bool pair = kPerWord == 2 && exists && k + 1 < RG_K;
    const long long ci = RG_FORWARD ? k : n, co = RG_FORWARD ? n : k;
    const storage_t* const first =
        weight +
        (exists ? weight_element<TCONV_CO, RG_NUM_TAPS>(weight_last, group * (long long)TCONV_CI + ci, co, 0) : 0);
    const storage_t* const second = first + (RG_FORWARD ? TCONV_CO * RG_NUM_TAPS : weight_last ? 1 : RG_NUM_TAPS);
    const int next_tap = weight_last ? TCONV_CO : 1;
    unsigned* const to =
        packed + (long long)block * (RG_NUM_ENTRIES * RG_CHUNKS * RG_KC * 64) + unit * 256 + threadIdx.x;
    for (int pass = 0; pass < RG_NUM_PASSES; ++pass) {
      const int begin = rg_entry_begin[pass], count = rg_entry_begin[pass + 1] - begin;
#pragma unroll 4
      for (int entry = 0; entry < count; ++entry) {
        const int tap = rg_entry_tap[(begin + entry) * RG_NUM_LIVE + live];
        const storage_t low = exists && tap >= 0 ? first[tap * next_tap] : storage_t();
#if TCONV_DTYPE_f32
        const unsigned word = to_tf32(widen(low));
#else
        const unsigned word = pack_words(low, pair && tap >= 0 ? second[tap * next_tap] : storage_t());
#endif
        to[(long long)(begin * RG_CHUNKS + chunk * count + entry) * (kUnits * 256)] = word;
      }
    }
  }
}
