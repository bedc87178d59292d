// phase_gemm_sm80 — transposed convolution and its input gradient as tensor-core products over one staged tile.
// Computes  result[b, n, o] = epilogue( sum over taps, k of source[b, k, position(o, tap)] * weight[k, n, tap] )
//           forward: source = input, k = ci, n = co, o on the output grid (all phases of the tile)
//           grad_input: source = grad_output, k = co, n = ci, o on the input grid, source positions stride apart
// Method    a block stages the source rows of a tile of lattice positions once (planes of 4-byte words: one fp32 or two
//           16-bit channels); every tap of every phase is then a shift of the same tile, so there is no im2col. Lines of
//           16 positions are the rows of mma.sync, channels its columns; weights come packed in fragment order through
//           L1. All width phases of a row are computed together and interleaved in shared memory before the store.
// Refuses   fp64; pre-activations; tiles that do not fit (see phase_gemm_sm80.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 4 epilogue · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

// Tables of the layer, generated in the prelude. A pass covers PG_GROUPS (depth, height) phases and PG_PW width phases, each
// with a slot (accumulator set) of its own. An entry is a shift of the tile by rows, its mask the groups that it serves; the
// shifts along a row and their slots are the same for all of them and unrolled (PG_STATIC: half the instructions of a
// product are otherwise its test, addresses and moves). Where that is too much code, an entry is one shift in all
// dimensions, and its mask tells the slots.
__constant__ int pg_entry_begin[] = {PG_ENTRY_BEGIN};  // per pass
__constant__ int pg_entry_word[] = {PG_ENTRY_WORD};    // word offset in the tile
__constant__ int pg_entry_mask[] = {PG_ENTRY_MASK};
__constant__ int pg_item_begin[] = {PG_ITEM_BEGIN};  // per pass: (entry, slot) pairs, the order of the packed weights
__constant__ int pg_pass[] = {PG_PASS};              // per pass and group: depth, height and first width phase
__constant__ int pg_rows_d[] = {PG_ROWS_D};
__constant__ int pg_rows_h[] = {PG_ROWS_H};
__constant__ int pg_planes_w[] = {PG_PLANES_W};
// Slot of a width phase within its group, or -1 when no tap ever reaches it (its outputs are bias only).
__device__ constexpr int pg_slot[] = {PG_SLOT};
// Shifts along a row: words, and the slots of a group as bits.
__device__ constexpr int pg_shift_word[] = {PG_SHIFT_WORD};
__device__ constexpr int pg_shift_slots[] = {PG_SHIFT_SLOTS};

constexpr int kThreads = 32 * PG_WARPS_M * PG_WARPS_N;
constexpr int kRowWords = PG_NPW * PG_JW;              // one staged row: width planes side by side
constexpr int kPositions = PG_ND * PG_NH * kRowWords;  // words of one channel plane before padding
constexpr int kPitch = PG_PITCH;                       // = 8 mod 32: the 4 x 8 pattern of a fragment hits 32 banks
constexpr int kMTiles = PG_WM / 16;
constexpr int kNTiles = PG_WN / 8;
constexpr int kPerWord = sizeof(storage_t) == 2 ? 2 : 1;  // channels in a staged word
constexpr int kParts = PG_SPLIT3 ? 2 : 1;                 // fp32 accuracy: both operands as big + small
constexpr int kSlots = PG_GROUPS * PG_LIVE;
// fp32 accuracy: what an entry adds to a slot is summed from zero, and then added to the slot's sums in fp32.
constexpr bool kEntrySums = PG_ENTRY_SUMS;
constexpr int kFragment = PG_WN * 8 * kParts;  // packed words of one (tap, k8) for a warp's columns
constexpr int kOutPitch = PG_OUT_PITCH;
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
constexpr bool kWholeColumns = PG_NBLOCKS * PG_WARPS_N * PG_WN == PG_N;  // no column is beyond the channels

struct PhaseGemmArgs {
  const storage_t* source;
  const unsigned* weights;  // packed, see phase_gemm_pack.cu
  const void* bias;
  output_t* result;
  long long source_plane;  // elements between channels (contiguous) or positions (channels_last: 1)
  long long result_plane;
  int source_d, source_h, source_w;
  int result_d, result_h, result_w;
  Divisor tiles_d, tiles_h, tiles_w;
  int pair_stores;  // 16-bit: rows start on 4-byte boundaries
  Operands operands;
};

__device__ __forceinline__ float with_bias(float sum, float bias) { return TCONV_BIAS ? sum + bias : sum; }

// 2 load: one chunk of PG_KC words per position. Positions outside the source are zero.
__device__ __forceinline__ void load_chunk(const PhaseGemmArgs& a, unsigned* tile, const storage_t* source, int chunk,
                                           int d0, int h0, int w0) {
#if TCONV_CHANNELS_LAST
  // Lanes run along the channels, which are contiguous in memory.
  const int k = threadIdx.x % PG_KC;
  const int channel = (chunk * PG_KC + k) * kPerWord;
#pragma unroll 4
  for (int p = threadIdx.x / PG_KC; p < kPositions; p += kThreads / PG_KC) {
    const int row = p / kRowWords, j = p % kRowWords;
    const int d = d0 + pg_rows_d[row / PG_NH], h = h0 + pg_rows_h[row % PG_NH];
    const int w = w0 + pg_planes_w[j / PG_JW] + (j % PG_JW) * PG_SRC_W;
    const bool inside = (unsigned)d < (unsigned)a.source_d && (unsigned)h < (unsigned)a.source_h &&
                        (unsigned)w < (unsigned)a.source_w && channel < PG_K;
    const storage_t* from =
        source + ((((long long)d * a.source_h + h) * a.source_w + w) * (PG_K * TCONV_GROUPS) + channel);
#if PG_ASYNC
    copy_async_4(tile + k * kPitch + p, from, inside);
#else
    unsigned word = 0;
    if (inside)
      word = kPerWord == 1 ? word_of(from[0]) : pack_words(from[0], channel + 1 < PG_K ? from[1] : storage_t());
    tile[k * kPitch + p] = word;
#endif
  }
#else
  // A thread owns a position and walks the channels, so bounds and addresses are worked out once per position.
  constexpr int kLines = (kPositions + 31) / 32 * 32;
  constexpr int kTeams = kThreads / kLines > 0 ? kThreads / kLines : 1;
  constexpr int kLanes = kTeams > 1 ? kLines : kThreads;
  const int team = kTeams > 1 ? threadIdx.x / kLines : 0;
  if (team >= kTeams) return;
  for (int p = kTeams > 1 ? threadIdx.x % kLines : threadIdx.x; p < kPositions; p += kLanes) {
    const int row = p / kRowWords, j = p % kRowWords;
    const int d = d0 + pg_rows_d[row / PG_NH], h = h0 + pg_rows_h[row % PG_NH];
    const int w = w0 + pg_planes_w[j / PG_JW] + (j % PG_JW) * PG_SRC_W;
    const bool inside =
        (unsigned)d < (unsigned)a.source_d && (unsigned)h < (unsigned)a.source_h && (unsigned)w < (unsigned)a.source_w;
    const storage_t* from = source + (inside ? (long long)(d * a.source_h + h) * a.source_w + w : 0) +
                            (long long)(chunk * PG_KC + team) * kPerWord * a.source_plane;
    unsigned* to = tile + team * kPitch + p;
    const long long step = a.source_plane * kPerWord * kTeams;
#if PG_ASYNC
#pragma unroll 8
    for (int k = team; k < PG_KC; k += kTeams) {
      copy_async_4(to, from, inside && (PG_K % PG_KC == 0 || chunk * PG_KC + k < PG_K));
      from += step;
      to += kPitch * kTeams;
    }
#else
#pragma unroll 8
    for (int k = team; k < PG_KC; k += kTeams) {
      const int channel = (chunk * PG_KC + k) * kPerWord;
      unsigned word = 0;
      if (inside && channel < PG_K) {
        word = kPerWord == 1 ? word_of(from[0])
                             : pack_words(from[0], channel + 1 < PG_K ? from[a.source_plane] : storage_t());
      }
      *to = word;
      from += step;
      to += kPitch * kTeams;
    }
#endif
  }
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, PG_MIN_BLOCKS) phase_gemm(const PhaseGemmArgs a) {
  extern __shared__ __align__(16) unsigned shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % PG_WARPS_M, warp_n = warp / PG_WARPS_M;
  const int quad = lane / 4, quarter = lane % 4;
  float* const out_stage = reinterpret_cast<float*>(shared + PG_STAGES * PG_KC * kPitch) + warp * PG_OUT_WORDS;

  wait_for_kernel_before();  // packs the weights

  // 1 locate: column blocks and passes of one tile are neighbours, so that they find its source in L2.
  unsigned index = blockIdx.x;
  const int column_block = index % PG_NBLOCKS;
  index /= PG_NBLOCKS;
  int pass_begin = 0, pass_end = PG_NUM_PASSES;
  if (PG_PASS_PER_BLOCK) {
    pass_begin = index % PG_NUM_PASSES;
    pass_end = pass_begin + 1;
    index /= PG_NUM_PASSES;
  }
  const int tile_w = a.tiles_w.take_remainder(index);
  const int tile_h = a.tiles_h.take_remainder(index);
  const int tile_d = a.tiles_d.take_remainder(index);
  const int group = index % TCONV_GROUPS;
  const long long b = index / TCONV_GROUPS;
  const int q_d = tile_d * PG_TD, q_h = tile_h * PG_TH, q_w = tile_w * PG_TW;  // first lattice position
  const long long source_volume = (long long)a.source_d * a.source_h * a.source_w;
  const storage_t* source = TCONV_CHANNELS_LAST ? a.source + b * source_volume * (PG_K * TCONV_GROUPS) + group * PG_K
                                                : a.source + (b * TCONV_GROUPS + group) * PG_K * source_volume;
  const unsigned* weights = a.weights + (long long)((group * PG_NBLOCKS + column_block) * PG_WARPS_N + warp_n) *
                                            (PG_NUM_ITEMS * PG_CHUNKS * (PG_KC / 8) * kFragment);

  // Word offset of the first position of each of the warp's lines of 16.
  int line[kMTiles];
#pragma unroll
  for (int mi = 0; mi < kMTiles; ++mi) {
    const int m = warp_m * PG_WM + mi * 16;
    const int row = m / PG_TW;
    line[mi] = (row / PG_TH) * (PG_STEP_D * PG_NH * kRowWords) + (row % PG_TH) * (PG_STEP_H * kRowWords) + m % PG_TW +
               quarter * kPitch + quad;
  }

  float acc[kSlots][kMTiles][kNTiles][4];
  const int num_passes = pass_end - pass_begin;
  const int num_loads = PG_CHUNKS == 1 ? 1 : num_passes * PG_CHUNKS;
#pragma unroll
  for (int stage = 0; stage < PG_STAGES - 1; ++stage) {
    if (stage < num_loads)
      load_chunk(a, shared + stage * (PG_KC * kPitch), source, stage % PG_CHUNKS, q_d * PG_SRC_D, q_h * PG_SRC_H,
                 q_w * PG_SRC_W);
    copy_async_commit();
  }
  if (PG_STAGES == 1) {
    load_chunk(a, shared, source, 0, q_d * PG_SRC_D, q_h * PG_SRC_H, q_w * PG_SRC_W);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  int load = 0;
  for (int pass = pass_begin; pass < pass_end; ++pass) {
    if (!kEntrySums || PG_EMPTY_PASSES) {  // the first entry of a pass is what its sums are
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
#pragma unroll
        for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
          for (int ni = 0; ni < kNTiles; ++ni)
#pragma unroll
            for (int r = 0; r < 4; ++r) acc[s][mi][ni][r] = 0.f;
    }

    // Fragments lie in the order of their use, so the next ones are always at the next address (behind the last lies one
    // spare fragment); they travel from L1 or L2 behind the products of the current ones.
    const unsigned* next_weights = weights + pg_item_begin[pass] * (PG_CHUNKS * (PG_KC / 8) * kFragment);
    WeightFragments<kNTiles, kParts> current;
    current.load(next_weights, lane);
    for (int chunk = 0; chunk < PG_CHUNKS; ++chunk) {
      const unsigned* tile = shared;
      if (PG_STAGES > 1) {
        copy_async_wait<(PG_STAGES > 1 ? PG_STAGES - 2 : 0)>();
        __syncthreads();  // the chunk is visible to all, and all have left the stage that is overwritten next
        const int next = load + PG_STAGES - 1;
        if (next < num_loads)
          load_chunk(a, shared + (next % PG_STAGES) * (PG_KC * kPitch), source, next % PG_CHUNKS, q_d * PG_SRC_D,
                     q_h * PG_SRC_H, q_w * PG_SRC_W);
        copy_async_commit();
        tile = shared + (load % PG_STAGES) * (PG_KC * kPitch);
        ++load;
      }

      // 3 multiply: a line's words are read and rounded once for all slots of the shift.
      const int entry_end = pg_entry_begin[pass + 1];
      const auto multiply_entry = [&](int entry, auto begins) {
        // What an entry adds to a slot, summed from zero; or the slot's sums themselves.
        constexpr bool kApart = kEntrySums && !decltype(begins)::value;
        const unsigned* x = tile + pg_entry_word[entry];
        const int mask = pg_entry_mask[entry];
        float sum[kApart ? kSlots : 1][kMTiles][kNTiles][4];
#pragma unroll PG_STEPS_AT_ONCE
        for (int k8 = 0; k8 < PG_KC / 8; ++k8) {
#pragma unroll
          for (int shift = 0; shift < PG_SHIFTS; ++shift) {
            LineFragments<kParts> lines[kMTiles];
#pragma unroll
            for (int mi = 0; mi < kMTiles; ++mi) {
              const unsigned* at = x + line[mi] + k8 * (8 * kPitch) + pg_shift_word[shift];
              lines[mi].set(at[0], at[PG_HALF], at[4 * kPitch], at[4 * kPitch + PG_HALF]);
            }
#pragma unroll
            for (int phase_group = 0; phase_group < PG_GROUPS; ++phase_group) {
              if (PG_STATIC && PG_GROUPS > 1 && !(mask >> phase_group & 1)) continue;
#pragma unroll
              for (int slot = 0; slot < PG_LIVE; ++slot) {
                const int s = phase_group * PG_LIVE + slot;
                if (!(pg_shift_slots[shift] >> slot & 1)) continue;
                if (!PG_STATIC && kSlots > 1 && !(mask >> s & 1)) continue;
                WeightFragments<kNTiles, kParts> following;
                next_weights += kFragment;
                following.load(next_weights, lane);
#if TCONV_DTYPE_f32
                if constexpr (kEntrySums) {
                  bool first = k8 == 0;
#pragma unroll
                  for (int before = 0; before < shift; ++before) first = first && !(pg_shift_slots[before] >> slot & 1);
#pragma unroll
                  for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
                    for (int ni = 0; ni < kNTiles; ++ni) {
                      float (&to)[4] = kApart ? sum[kApart ? s : 0][mi][ni] : acc[s][mi][ni];
                      if (first)
                        multiply_parts<true>(to, lines[mi], current, ni);
                      else
                        multiply_parts<false>(to, lines[mi], current, ni);
                    }
                } else
#endif
                {
#pragma unroll
                  for (int mi = 0; mi < kMTiles; ++mi) multiply_line<kNTiles, kParts>(acc[s][mi], lines[mi], current);
                }
                current = following;
              }
            }
          }
        }
        if (kApart) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s)
#pragma unroll
            for (int mi = 0; mi < kMTiles; ++mi)
#pragma unroll
              for (int ni = 0; ni < kNTiles; ++ni)
#pragma unroll
                for (int r = 0; r < 4; ++r) acc[s][mi][ni][r] += sum[kApart ? s : 0][mi][ni][r];
        }
      };
      int entry = pg_entry_begin[pass];
      if (kEntrySums && chunk == 0 && entry < entry_end) multiply_entry(entry++, True());
      for (; entry < entry_end; ++entry) multiply_entry(entry, False());
    }

    // 4 epilogue and 5 store: through the warp's own stage, so that a store instruction writes whole lines.
#pragma unroll
    for (int phase_group = 0; phase_group < PG_GROUPS; ++phase_group) {
      const int* phase = pg_pass + 3 * (pass * PG_GROUPS + phase_group);
      const int phase_d = phase[0], phase_h = phase[1], phase_w = phase[2];
      const int n_first = (column_block * PG_WARPS_N + warp_n) * PG_WN;
      // A sum with its bias; columns beyond the channels and slots without taps hold zeros.
      const auto value_of = [&](int rw, int mi, int ni, int r) {
        const int slot = pg_slot[rw];
        return slot < 0 ? 0.f : acc[phase_group * PG_LIVE + slot][mi][ni][r];
      };
      const auto bias_of = [&](int ni, int e) {
        const int n = n_first + ni * 8 + quarter * 2 + e;
        return kWholeColumns || n < PG_N ? tconv_bias(a.bias, group * PG_N + n) : 0.f;
      };
#if TCONV_CHANNELS_LAST
      float bias[kNTiles][2];
#pragma unroll
      for (int ni = 0; ni < kNTiles; ++ni) bias[ni][0] = bias_of(ni, 0), bias[ni][1] = bias_of(ni, 1);
#pragma unroll
      for (int mi = 0; mi < kMTiles; ++mi) {
        __syncwarp();
#pragma unroll
        for (int rw = 0; rw < PG_PW; ++rw) {
#pragma unroll
          for (int ni = 0; ni < kNTiles; ++ni) {
            float* to = out_stage + (quad * PG_PW + rw) * kOutPitch + ni * 8 + quarter * 2;
#pragma unroll
            for (int r = 0; r < 4; ++r)
              to[r / 2 * (8 * PG_PW * kOutPitch) + r % 2] = with_bias(value_of(rw, mi, ni, r), bias[ni][r % 2]);
          }
        }
        __syncwarp();
        constexpr int kPerStore = sizeof(output_t) == 2 ? 2 : 1;
#pragma unroll 2
        for (int e = lane * kPerStore; e < 16 * PG_PW * PG_WN; e += 32 * kPerStore) {
          const int column = e % PG_WN, position = e / PG_WN;
          const int m = warp_m * PG_WM + mi * 16 + position / PG_PW, row = m / PG_TW;
          const int od = (q_d + row / PG_TH) * PG_OUT_D + phase_d, oh = (q_h + row % PG_TH) * PG_OUT_H + phase_h;
          const int ow = (q_w + m % PG_TW) * PG_OUT_W + phase_w + position % PG_PW;
          const int n = n_first + column;
          if (od >= a.result_d || oh >= a.result_h || ow >= a.result_w || (!kWholeColumns && n >= PG_N)) continue;
          const int channel = group * PG_N + n;
          const long long element =
              (((b * a.result_d + od) * a.result_h + oh) * a.result_w + ow) * (PG_N * TCONV_GROUPS) + channel;
          const float* from = out_stage + position * kOutPitch + column;
          const output_t first = narrow<output_t>(tconv_epilogue<float>(from[0], channel, element, a.operands));
          if (kPerStore == 2 && (kWholeColumns || n + 1 < PG_N)) {
            const output_t second =
                narrow<output_t>(tconv_epilogue<float>(from[1], channel + 1, element + 1, a.operands));
            if (a.pair_stores) {
              *reinterpret_cast<unsigned*>(a.result + element) = pack_words(first, second);
            } else {
              a.result[element] = first;
              a.result[element + 1] = second;
            }
          } else {
            a.result[element] = first;
          }
        }
      }
#else
      constexpr int kSegment = PG_WM < PG_TW ? PG_WM : PG_TW;  // the warp's positions within one row
      constexpr int kSegments = PG_WM / kSegment;
      constexpr int kLength = kSegment * PG_PW;
      constexpr int kPerLane = sizeof(output_t) == 2 && PG_PW == PG_OUT_W && kLength % 2 == 0 ? 2 : 1;
      constexpr int kTogether = PG_PW % 4 == 0 ? 4 : PG_PW % 2 == 0 ? 2 : 1;
#pragma unroll
      for (int ni = 0; ni < kNTiles; ++ni) {
        if (!kWholeColumns && n_first + ni * 8 >= PG_N) break;
        const float bias[2] = {bias_of(ni, 0), bias_of(ni, 1)};
        __syncwarp();
        // Neighbouring phases together: 8- and 16-byte stores fill the banks where single words of a stride of 2, 4 or 8
        // would meet in them.
#pragma unroll
        for (int rw = 0; rw < PG_PW; rw += kTogether) {
#pragma unroll
          for (int mi = 0; mi < kMTiles; ++mi) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              Pack<float, kTogether> values;
#pragma unroll
              for (int i = 0; i < kTogether; ++i) values.item[i] = with_bias(value_of(rw + i, mi, ni, r), bias[r % 2]);
              *reinterpret_cast<Pack<float, kTogether>*>(out_stage + (quarter * 2 + r % 2) * kOutPitch +
                                                         (mi * 16 + quad + r / 2 * 8) * PG_PW + rw) = values;
            }
          }
        }
        __syncwarp();
#pragma unroll 1
        for (int segment = 0; segment < kSegments; ++segment) {
          const int m = warp_m * PG_WM + segment * kSegment, row = m / PG_TW;
          const int od = (q_d + row / PG_TH) * PG_OUT_D + phase_d, oh = (q_h + row % PG_TH) * PG_OUT_H + phase_h;
          if (od >= a.result_d || oh >= a.result_h) continue;
          const int ow_first = (q_w + m % PG_TW) * PG_OUT_W + phase_w, left = a.result_w - ow_first;
          const float* from = out_stage + segment * kLength;
          const int channel_first = group * PG_N + n_first + ni * 8;
          long long element_first = (b * (PG_N * TCONV_GROUPS) + channel_first) * a.result_plane +
                                    (long long)(od * a.result_h + oh) * a.result_w + ow_first;
          constexpr bool kSideBySide = PG_PW == PG_OUT_W;  // results of the staged row
          output_t* to = a.result + element_first + (kSideBySide ? lane * kPerLane : 0);
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            if (kWholeColumns || n_first + ni * 8 + c < PG_N) {
              const int channel = channel_first + c;
              to = opaque_global(to);
              // The result at a place of the staged row.
              const auto result_at = [&](int at, int place) {
                return narrow<output_t>(
                    tconv_epilogue<float>(from[c * kOutPitch + at], channel, element_first + place, a.operands));
              };
              if (kPerLane == 2 && a.pair_stores) {
#pragma unroll
                for (int x = 0; x < kLength; x += 64) {
                  const int at = x + lane * 2;
                  if ((kLength % 64 == 0 || at < kLength) && at < left)
                    *reinterpret_cast<unsigned*>(to + x) = pack_words(result_at(at, at), result_at(at + 1, at + 1));
                }
              } else {
#pragma unroll
                for (int x = 0; x < kLength; x += 32) {
                  const int at = x + lane;
                  const int place = kSideBySide ? at : at / PG_PW * PG_OUT_W + at % PG_PW;
                  if ((kLength % 32 == 0 || at < kLength) && place < left &&
                      (kSideBySide || phase_w + at % PG_PW < PG_OUT_W))
                    to[kSideBySide ? x - lane * (kPerLane - 1) : place] = result_at(at, place);
                }
              }
            }
            element_first += a.result_plane;
            to += a.result_plane;
          }
        }
      }
#endif
    }
  }
}
