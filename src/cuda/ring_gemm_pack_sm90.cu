// ring_gemm_pack_sm90 — weights rearranged into the blocks that ring_gemm_sm90 copies, rounded as they are used; and, with
// RG_PACK_SOURCE, the source too, with the channels of a position side by side and zeros up to a whole chunk.
// Computes  packed[group][row block][pass][chunk][entry of the pass][16-byte unit of channels][row][4 words]
//           source_packed[image][group][position][channel]
// Method    the first blocks of the grid take the weights, the others a run of positions by a chunk of channels of the
//           source, through shared memory, so that both sides are read and written in whole sectors. Of the weights, a block
//           takes up to four units of channels of one row block through all entries, a thread a word of each: the taps of a
//           weight lie side by side and are all read while their sectors are in L1, and each entry is written as whole
//           lines. An entry (shift) has a tap for some of the width phases, zero for the others. Both parts are bound by
//           what they have under way: 32 bytes a thread and more.
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

__constant__ int rg_entry_pass[] = {RG_ENTRY_PASS};    // [entry] -> the first entry of its pass
__constant__ int rg_entry_count[] = {RG_ENTRY_COUNT};  // [entry] -> how many its pass has
__constant__ int rg_entry_tap[] = {RG_ENTRY_TAP};      // [entry][live phase] -> packed tap, or -1

#if RG_PACK_SOURCE
struct SourcePack {
  const storage_t* source;
  uint4* packed;
  long long image, inner, plane;  // elements between images, between channels or positions; positions of an image
  int tiles;                      // of kTile positions in an image
  int pairs;                      // contiguous 16-bit: two neighbouring positions are one aligned word
  unsigned blocks;                // images x groups x tiles x chunks
};

// What is not read again makes room in L2 for the copy, which is.
__device__ __forceinline__ float read_once(const float* at) { return __ldcs(at); }
template <typename T>
__device__ __forceinline__ T read_once(const T* at) {
  return {__ldcs(&at->bits)};
}

constexpr int kSourceUnits = RG_KC / 4, kPerUnit = 16 / sizeof(storage_t);
constexpr int kTile = 512 / kSourceUnits;  // two units of channels a thread

// kWide: a thread reads so many neighbouring positions as one word.
template <int kWide>
__device__ __forceinline__ void turn_source(const SourcePack& a, const storage_t* from, int k0, long long left,
                                            uint4 (&turned)[kTile][kSourceUnits + 1]) {
  constexpr int kItems = kTile / kWide * kSourceUnits / 256, kChannelStep = TCONV_CHANNELS_LAST ? 1 : 0;
  storage_t item[kItems][kWide][kPerUnit];
  // Position and unit of an item: lanes along what is contiguous in the source.
  auto locate = [](int n, int& p, int& u) {
    const int i = n * 256 + threadIdx.x;
    p = (TCONV_CHANNELS_LAST ? i / kSourceUnits : i % (kTile / kWide)) * kWide;
    u = TCONV_CHANNELS_LAST ? i % kSourceUnits : i / (kTile / kWide);
  };
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    int p, u;
    locate(n, p, u);
#pragma unroll
    for (int e = 0; e < kPerUnit; ++e) {
      const int k = u * kPerUnit + e;
      const storage_t* at = from + (kChannelStep ? p * a.inner + k : k * a.inner + p);
      const bool exists = k0 + k < RG_K;
      if constexpr (kWide == 2) {
        const unsigned word = exists && p < left ? __ldcs(reinterpret_cast<const unsigned*>(at)) : 0u;
        item[n][0][e].bits = static_cast<unsigned short>(word);
        item[n][1][e].bits = static_cast<unsigned short>(word >> 16);
      } else {
        item[n][0][e] = exists && p < left ? read_once(at) : storage_t();
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kItems; ++n) {
    int p, u;
    locate(n, p, u);
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
#if TCONV_DTYPE_f32
#pragma unroll
      for (int e = 0; e < kPerUnit; ++e) item[n][w][e] = __uint_as_float(to_tf32(item[n][w][e]));
#endif
      turned[p + w][u] = unit_of(item[n][w]);
    }
  }
}

__device__ __forceinline__ void pack_source(const SourcePack& a, unsigned first, unsigned step) {
  __shared__ uint4 turned[kTile][kSourceUnits + 1];
  for (unsigned index = first; index < a.blocks; index += step) {
    unsigned rest = index;
    const int chunk = rest % RG_CHUNKS;
    rest /= RG_CHUNKS;
    const long long p0 = rest % a.tiles * (long long)kTile;
    rest /= a.tiles;
    const int group = rest % TCONV_GROUPS;
    const long long b = rest / TCONV_GROUPS;
    const int k0 = chunk * (kSourceUnits * kPerUnit);
    const storage_t* from =
        a.source + b * a.image +
        (TCONV_CHANNELS_LAST ? p0 * a.inner + group * RG_K + k0 : (group * RG_K + k0) * a.inner + p0);
#if !TCONV_CHANNELS_LAST && !TCONV_DTYPE_f32
    if (a.pairs)
      turn_source<2>(a, from, k0, a.plane - p0, turned);
    else
#endif
      turn_source<1>(a, from, k0, a.plane - p0, turned);
    __syncthreads();
    uint4* const to =
        a.packed + ((b * TCONV_GROUPS + group) * a.plane + p0) * (RG_CHUNKS * kSourceUnits) + chunk * kSourceUnits;
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kSourceUnits; i += 256)
      if (p0 + i / kSourceUnits < a.plane)
        to[i / kSourceUnits * (RG_CHUNKS * kSourceUnits) + i % kSourceUnits] =
            turned[i / kSourceUnits][i % kSourceUnits];
    __syncthreads();
  }
}
#endif

// fp32: 40 registers, so that six blocks fit; 16-bit threads have twice as many elements under way and spill there.
extern "C" __global__ void __launch_bounds__(256, sizeof(storage_t) == 4 ? 6 : 4)
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
  constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1, kUnits = RG_KC / 4, kAtOnce = kUnits < 4 ? kUnits : 4;
  constexpr int kEntries = RG_NUM_ENTRIES < 4 ? RG_NUM_ENTRIES : 4;  // read before any is written
  const int row = threadIdx.x / 4, channel = RG_ROW_CHANNEL(row), live = RG_ROW_LIVE(row);
  for (unsigned index = blockIdx.x; index < blocks; index += weight_grid) {
    const int unit0 = index % (kUnits / kAtOnce) * kAtOnce, chunk = index / (kUnits / kAtOnce) % RG_CHUNKS;
    const unsigned block = index / (kUnits / kAtOnce * RG_CHUNKS);
    const int row_block = block % RG_ROW_BLOCKS, group = block / RG_ROW_BLOCKS;
    const int n = row_block * RG_CHANNELS + channel;
    const int k0 = (chunk * RG_KC + unit0 * 4 + threadIdx.x % 4) * kPerWord;
    const bool exists = channel < RG_CHANNELS && n < RG_N_CHANNELS;
    const long long ci = RG_FORWARD ? k0 : n, co = RG_FORWARD ? n : k0;
    const long long next_k = RG_FORWARD ? TCONV_CO * RG_NUM_TAPS : weight_last ? 1 : RG_NUM_TAPS;
    const storage_t* const first =
        weight + weight_element<TCONV_CO, RG_NUM_TAPS>(weight_last, group * (long long)TCONV_CI + ci, co, 0);
    const int next_tap = weight_last ? TCONV_CO : 1;
    unsigned* const to =
        packed + (long long)block * (RG_NUM_ENTRIES * RG_CHUNKS * RG_KC * 64) + unit0 * 256 + threadIdx.x;
#pragma unroll 1
    for (int entry0 = 0; entry0 < RG_NUM_ENTRIES; entry0 += kEntries) {
      storage_t element[kEntries][kAtOnce][kPerWord];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int entry = entry0 + e;
        const int tap =
            RG_NUM_ENTRIES % kEntries == 0 || entry < RG_NUM_ENTRIES ? rg_entry_tap[entry * RG_NUM_LIVE + live] : -1;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
          for (int w = 0; w < kPerWord; ++w) {
            const int past = u * 4 * kPerWord + w;
            element[e][u][w] =
                exists && tap >= 0 && k0 + past < RG_K ? first[past * next_k + tap * next_tap] : storage_t();
          }
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int entry = entry0 + e;
        if (RG_NUM_ENTRIES % kEntries != 0 && entry >= RG_NUM_ENTRIES) break;
        const int begin = rg_entry_pass[entry];
        unsigned* const at =
            to + (long long)(begin * (RG_CHUNKS - 1) + chunk * rg_entry_count[entry] + entry) * (kUnits * 256);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
#if TCONV_DTYPE_f32
          at[u * 256] = to_tf32(widen(element[e][u][0]));
#else
          at[u * 256] = pack_words(element[e][u][0], element[e][u][1]);
#endif
        }
      }
    }
  }
}
