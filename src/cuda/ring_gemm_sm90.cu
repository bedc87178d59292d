// ring_gemm_sm90 — transposed convolution and its input gradient on Hopper's warpgroup products, fed through rings.
// Computes  result[b, n, o] = epilogue( sum over taps, k of source[b, k, position(o, tap)] * weight[k, n, tap] )
//           with source, k, n as in phase_gemm_sm80
// Method    one block per multiprocessor walks over tiles; its warps have roles and meet only at the stages of three rings:
//             load      1 warp lets the copy engine stage positions (RG_TENSOR), or 3 or 7 warps do, rounding them
//             weights   1 warp copies packed rows by the copy engine
//             multiply  2 warpgroups, each 64 rows (result channel x width phase) times a run of RG_N positions; the
//                       runs are neighbours with the same rows, or one run with neighbouring rows (RG_ROW_GROUPS 2)
//             store     4 or 8 warps take the results through shared memory and write whole lines. The epilogue is theirs
//                       too, or, with RG_EARLY_EPILOGUE, of the multiplying warps, which have more registers; 16-bit
//                       results are then handed over as they are stored (RG_HALF_SUMS): half the bytes, a run in one piece
//           so loads, products and stores of neighbouring tiles overlap. Both operands lie in shared memory with k
//           contiguous: any position is a legal start address, one staged tile serves every tap. Where blocks walk along
//           the depth (RG_WINDOW), a stage is one depth of the source, and an item reads the RG_WINDOW of them that
//           follow each other; most of them are still there when the next item needs them.
// Refuses   fp32 accuracy (the tensor core truncates its sums), fp64 (see ring_gemm_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 4 epilogue · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "ring_sm90.cuh"

__constant__ int rg_entry_begin[] = {RG_ENTRY_BEGIN};  // per pass, into rg_entry_word
__constant__ int rg_entry_word[] = {RG_ENTRY_WORD};    // position offset in the stage; RG_WINDOW: | row of it << 24
__constant__ int rg_pass[] = {RG_PASS};                // depth phase, height phase, first width phase
__constant__ int rg_pass_row[] = {RG_PASS_ROW};        // the last row of the window that a pass reads
__constant__ int rg_planes_d[] = {RG_PLANES_D};        // source coordinate of each plane's first row or column
__constant__ int rg_planes_h[] = {RG_PLANES_H};
__constant__ int rg_planes_w[] = {RG_PLANES_W};
__constant__ int rg_live[] = {RG_LIVE};  // width phases with taps, in row order

// Warps 0-7 multiply, the next ones load, one copies weights; the last store: four for both warpgroups, or for each.
constexpr int kLoaders = 32 * RG_LOAD_WARPS;
constexpr int kStorers = 128;
constexpr int kWeightWarp = 8 + RG_LOAD_WARPS;
// Registers move between whole warpgroups, so with the copy engine two warps before the storing ones have nothing to do.
constexpr int kFirstStorer = RG_TENSOR ? 12 : kWeightWarp + 1;
constexpr int kThreads = 32 * kFirstStorer + kStorers * RG_STORE_GROUPS;
// Sums change hands by numbered barriers, which count a warp at a time, not thread by thread as mbarriers: 2_16 in fp16
// takes 10 % longer with those. compute-sanitizer's racecheck does not always see the order that bar.arrive makes, but that
// of mbarriers, so RG_RACECHECK takes those. Numbers 0 and 1 are the block's and the loaders'.
constexpr int kHandOver = 128 + kStorers, kFullSums = 2, kEmptySums = 4;
__device__ __forceinline__ void sums_arrive(Barrier* barriers, int number) {
  RG_RACECHECK ? barrier_arrive(barriers + number) : come<kHandOver>(number);
}
__device__ __forceinline__ void sums_wait(Barrier* barriers, int number, unsigned parity) {
  RG_RACECHECK ? barrier_wait(barriers + number, parity) : meet<kHandOver>(number);
}
constexpr int kPerUnit = 16 / sizeof(storage_t);  // channels in 16 bytes
constexpr int kUnits = RG_KC / 4;                 // planes per chunk; RG_KC counts 4-byte words
constexpr int kSteps = RG_KC / 8;
constexpr int kRowsD = RG_NPD * RG_JD, kRowsH = RG_NPH * RG_JH;
constexpr int kRows = kRowsD * kRowsH;
#if RG_TENSOR
// Positions as the copy engine lays them: channels of a chunk side by side, 16-byte units exchanged within 8 positions.
constexpr int kBoxes = RG_NPW * kRowsD * RG_NPH;  // of RG_BOX positions, a multiple of 8
constexpr int kStageUnits = ((kBoxes * RG_BOX + 8) * kUnits + 63) / 64 * 64;
constexpr int kPositionUnits = kUnits, kStepUnits = 2, kPlaneBytes = 16;
constexpr unsigned kColumnsLayout = (kUnits == 8 ? 1u : kUnits == 4 ? 2u : 3u) << 30 | 8 * kUnits;
#else
// Planes of one unit of channels at every position; no exchange.
constexpr int kPositions = RG_NPW * kRows * RG_JW;
constexpr int kPlane = RG_PLANE;  // positions of a plane, with room for the run's overhang; = 1 mod 8 (banks)
constexpr int kSlots = RG_SLOTS;  // pieces of 128 bytes that a loading thread has under way
constexpr int kStageUnits = kUnits * kPlane;
constexpr int kPositionUnits = 1, kStepUnits = 2 * kPlane, kPlaneBytes = kPlane * 16;
constexpr unsigned kColumnsLayout = 8;
#endif
constexpr int kSums = RG_N / 2;
constexpr int kParts = (RG_N + RG_PART - 1) / RG_PART;           // in which a run's sums are handed over
constexpr int kEntryWords = RG_KC * 64;                          // packed rows of one entry and chunk
constexpr int kGroupWords = RG_ENTRIES_PER_STAGE * kEntryWords;  // of one row block in a stage
constexpr int kWeightStageWords = RG_ROW_GROUPS * kGroupWords;

struct RingGemmArgs {
  const storage_t* source;
  const unsigned* weights;  // packed rows, see ring_gemm_pack_sm90.cu
  const void* bias;
  output_t* result;
  // Elements between neighbours: images, depths, rows, and channels (contiguous) or positions (channels_last).
  long long source_image, source_slab, source_row, source_inner;
  long long result_image, result_slab, result_row, result_inner;
  int source_d, source_h, source_w;
  int result_d, result_h, result_w;
  int tiles_d, tiles_h, tiles_w;
  int segment, segments_d, segments_behind;  // RG_WINDOW: depths of a segment; segments; items of one depth
  unsigned items;                            // RG_WINDOW: segments
  int wide_stores;  // contiguous: 16-bit rows start on 4-byte boundaries; channels_last: 16 bytes of results are aligned
  Operands operands;
#if RG_TENSOR || RG_ROWS
  int tensor;  // RG_TENSOR: the map describes the source; otherwise its elements are gathered
  int tensor_channels, tensor_images, tensor_groups;  // coordinates: channel per group; image per image and per group
  TensorMap map;
#endif
};

// 1 locate
struct Item {
  int row_block, pass_begin, pass_end, q_d, q_h, q_w, group;
  long long b;
};

// The items of a block: every gridDim-th, or, where blocks walk along the depth, all of every gridDim-th segment of it.
struct Items {
  unsigned index, end;
  int at = 0, length = 1;  // in the segment
  __device__ __forceinline__ explicit Items(const RingGemmArgs& a) : index(blockIdx.x), end(a.items) { enter(a); }
  __device__ __forceinline__ void enter(const RingGemmArgs& a) {
#if RG_WINDOW
    const int first = index / a.segments_behind % a.segments_d * a.segment;
    at = 0, length = min(a.segment, a.tiles_d - first);
#endif
  }
  __device__ __forceinline__ bool any() const { return index < end; }
  __device__ __forceinline__ void advance(const RingGemmArgs& a) {
    if (RG_WINDOW && ++at < length) return;
    index += gridDim.x;
    enter(a);
  }
};

__device__ __forceinline__ Item locate(const RingGemmArgs& a, const Items& items) {
  unsigned index = items.index;
  Item item;
  constexpr int kRowItems = (RG_ROW_BLOCKS + RG_ROW_GROUPS - 1) / RG_ROW_GROUPS;
  item.row_block = index % kRowItems * RG_ROW_GROUPS;
  index /= kRowItems;
  item.pass_begin = 0, item.pass_end = RG_NUM_PASSES;
  if (RG_PASS_PER_ITEM) {
    item.pass_begin = index % RG_NUM_PASSES;
    item.pass_end = item.pass_begin + 1;
    index /= RG_NUM_PASSES;
  }
  item.q_w = index % a.tiles_w * RG_TILE_W;
  index /= a.tiles_w;
  item.q_h = index % a.tiles_h * RG_TILE_H;
  index /= a.tiles_h;
#if RG_WINDOW
  item.q_d = index % a.segments_d * a.segment + items.at;
  index /= a.segments_d;
#else
  item.q_d = index % a.tiles_d;
  index /= a.tiles_d;
#endif
  item.group = index % TCONV_GROUPS;
  item.b = index / TCONV_GROUPS;
  return item;
}

// How often an item's positions are staged: once per chunk, and again for every pass unless all chunks stay.
__device__ __forceinline__ int loads_of(const Item& item) {
  int passes = 0;
  for (int pass = item.pass_begin; pass < item.pass_end; ++pass)
    passes += rg_entry_begin[pass] < rg_entry_begin[pass + 1];
  return (RG_RESIDENT && passes > 1 ? 1 : passes) * RG_CHUNKS;
}

// ------------------------------------------------------------------------------------------------------------- 2 load
#if RG_TENSOR
#include "ring_gemm_tensor_sm90.cuh"
#else
__device__ __forceinline__ void loaders_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(kLoaders) : "memory"); }
#include "ring_gemm_load_sm90.cuh"
#if RG_ROWS
#include "ring_gemm_rows_sm90.cuh"
#endif
#endif

// -------------------------------------------------------------------------------------------------------- 3 multiply

// A thread has rows r and r + 8 of its warp; what belongs to them is theirs.
struct Rows {
  int channel[2];
  float bias[2];
};
__device__ __forceinline__ float result_of(const RingGemmArgs& a, const float (&sum)[kSums], const Rows& rows, int at) {
#if RG_EARLY_EPILOGUE
  const int half = at / 2 % 2;
  return tconv_epilogue<float>(TCONV_BIAS ? sum[at] + rows.bias[half] : sum[at], rows.channel[half], 0, a.operands);
#else
  return sum[at];
#endif
}

#if RG_HALF_SUMS
using stage_t = unsigned;  // two results
__device__ __forceinline__ void store_sums(const RingGemmArgs& a, stage_t* stage, const float (&sum)[kSums],
                                           const Rows& rows, int part, int warp, int lane) {
  auto result = [&](int at) { return result_of(a, sum, rows, at); };
  constexpr int kMatrices = RG_PART / 8;  // of 8 positions
#if !TCONV_CHANNELS_LAST && RG_NUM_LIVE == 2
  // The phases of a position are neighbours.
#pragma unroll
  for (int n8 = 0; n8 < kMatrices; ++n8) {
    const int at = (part * kMatrices + n8) * 4;
    if (at >= kSums) break;
    *reinterpret_cast<uint2*>(stage + (warp * 8 + lane / 4) * RG_STAGE_PITCH + n8 * 8 + lane % 4 * 2) = make_uint2(
        narrow_pair<output_t>(result(at), result(at + 2)), narrow_pair<output_t>(result(at + 1), result(at + 3)));
  }
#else
  // Two times two matrices: rows 0 to 7 and 8 to 15 of the warp at 8 positions, and at the next 8. A lane names a line.
  const int line = lane % 8, high = lane / 8 % 2, next = lane / 16;
#if !TCONV_CHANNELS_LAST
  stage_t* to = stage + (warp * 16 + high * 8 + line) * RG_STAGE_PITCH + next * 4;
  constexpr int kNext = 4;
#else
  stage_t* to = stage + ((next * 8 + line) * RG_PW + (RG_PW == 2 ? high : 0)) * RG_STAGE_PITCH +
                (RG_PW == 2 ? warp * 4 : warp * 8 + high * 4);
  constexpr int kNext = 8 * RG_PW * RG_STAGE_PITCH;
#endif
#pragma unroll
  for (int n8 = 0; n8 < kMatrices; n8 += 2) {
    const int at = (part * kMatrices + n8) * 4;
    if (at >= kSums) break;
    unsigned matrix[4];
    const bool both = n8 + 1 < kMatrices && at + 4 < kSums;
#pragma unroll
    for (int m = 0; m < 4; ++m)
      matrix[m] = m < 2 || both ? narrow_pair<output_t>(result(at + m * 2), result(at + m * 2 + 1)) : 0u;
    // An odd last one goes twice to the same place.
    store_matrices<TCONV_CHANNELS_LAST>(both ? to : to - next * kNext, matrix[0], matrix[1],
                                        both ? matrix[2] : matrix[0], both ? matrix[3] : matrix[1]);
    to += 2 * kNext;
  }
#endif
}
#else
using stage_t = float;
// Row of a product -> (channel, width phase). With two phases both are in one thread.
__device__ __forceinline__ void store_sums(const RingGemmArgs& a, stage_t* stage, const float (&sum)[kSums],
                                           const Rows& rows, int part, int warp, int lane) {
  auto result = [&](int at) { return result_of(a, sum, rows, at); };
  const int quad = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int n8 = 0; n8 < RG_PART / 8; ++n8) {
    const int at = (part * (RG_PART / 8) + n8) * 4, position = n8 * 8 + quarter * 2;
    if (at >= kSums) break;
#if !TCONV_CHANNELS_LAST && RG_NUM_LIVE == 1 && RG_PW == 1
    float2* to = reinterpret_cast<float2*>(stage + (warp * 16 + quad) * RG_STAGE_PITCH + position);
    to[0] = make_float2(result(at), result(at + 1));
    to[4 * RG_STAGE_PITCH] = make_float2(result(at + 2), result(at + 3));
#elif !TCONV_CHANNELS_LAST && RG_NUM_LIVE == 2 && RG_PW == 2
    *reinterpret_cast<float4*>(stage + (warp * 8 + quad) * RG_STAGE_PITCH + position * 2) =
        make_float4(result(at), result(at + 2), result(at + 1), result(at + 3));
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + quad + half * 8;
      const int channel = RG_ROW_CHANNEL(row), phase = rg_live[RG_ROW_LIVE(row)];
      if (channel >= RG_CHANNELS) continue;
#if TCONV_CHANNELS_LAST
      stage[(position * RG_PW + phase) * RG_STAGE_PITCH + channel] = result(at + half * 2);
      stage[((position + 1) * RG_PW + phase) * RG_STAGE_PITCH + channel] = result(at + half * 2 + 1);
#else
      stage[channel * RG_STAGE_PITCH + position * RG_PW + phase] = result(at + half * 2);
      stage[channel * RG_STAGE_PITCH + (position + 1) * RG_PW + phase] = result(at + half * 2 + 1);
#endif
    }
#endif
  }
}
#endif

// ------------------------------------------------------------------------------------------------ 4 epilogue, 5 store

// What is stored for a sum, or for a result that is finished.
template <bool kFinished>
__device__ __forceinline__ output_t stored_value(const RingGemmArgs& a, float x, float bias, int channel,
                                                 long long element) {
  return narrow<output_t>(kFinished ? x
                                    : tconv_epilogue<float>(TCONV_BIAS ? x + bias : x, channel, element, a.operands));
}

// A part of one warpgroup's run of one pass; without taps the stage is not read.
template <bool kTaps>
__device__ __forceinline__ void store_run(const RingGemmArgs& a, const Item& item, int pass, int part, int warpgroup,
                                          const stage_t* stage, int thread) {
  const int phase_d = rg_pass[3 * pass], phase_h = rg_pass[3 * pass + 1], phase_w = rg_pass[3 * pass + 2];
  const int od = item.q_d * RG_OUT_D + phase_d;
  if (od >= a.result_d) return;
  const int q_h = item.q_h + warpgroup * RG_GROUP_ROWS, q_w = item.q_w + warpgroup * RG_GROUP_COLUMNS;
  const int n_first = (item.row_block + (RG_ROW_GROUPS == 2 ? warpgroup : 0)) * RG_CHANNELS;
  constexpr int kPoints = RG_PART * RG_PW;
  const int p_first = kParts == 1 ? 0 : part * RG_PART;
  constexpr bool kFinished = RG_EARLY_EPILOGUE && kTaps;
#if TCONV_CHANNELS_LAST
  // Lanes along the channels, 16 bytes of results each; a thread keeps its channels while the positions go by.
  constexpr int kWide = 16 / sizeof(output_t);
  constexpr int kAcross = (RG_CHANNELS + kWide - 1) / kWide;
  constexpr int kLanes = kAcross > 8 ? 16 : kAcross > 4 ? 8 : kAcross > 2 ? 4 : kAcross > 1 ? 2 : 1;
  const int column = thread % kLanes * kWide, n = n_first + column, channel = item.group * RG_N_CHANNELS + n;
  const int count = min(kWide, min(RG_CHANNELS - column, RG_N_CHANNELS - n));
  if (count <= 0) return;
  const bool whole = count == kWide && a.wide_stores;
#if RG_HALF_SUMS
  output_t nothing[kWide] = {};  // what a sum of no products gives
  if (!kTaps)
#pragma unroll
    for (int e = 0; e < kWide; ++e)
      if (e < count) nothing[e] = stored_value<false>(a, 0.f, tconv_bias(a.bias, channel + e), channel + e, 0);
#else
  float bias[kWide];
#pragma unroll
  for (int e = 0; e < kWide; ++e) bias[e] = e < count ? tconv_bias(a.bias, channel + e) : 0.f;
#endif
  const long long first =
      item.b * a.result_image + od * a.result_slab + (long long)q_h * RG_OUT_H * a.result_row + channel;
  // A few points at once, so that the address, sums and store of one do not wait for those of another.
  constexpr int kStep = kStorers / kLanes, kAtOnce = RG_HALF_SUMS     ? (kThreads > 640 ? 3 : 6)
                                                     : kThreads > 640 ? 2
                                                     : kWide == 8     ? 3
                                                                      : 4;
#pragma unroll 1
  for (int point0 = thread / kLanes; point0 < kPoints; point0 += kAtOnce * kStep) {
    long long element[kAtOnce];
    bool stored[kAtOnce];
#if RG_HALF_SUMS
    uint4 unit[kAtOnce];
#else
    float x[kAtOnce][kWide];
#endif
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int point = point0 + i * kStep;
      const int p = p_first + point / RG_PW, col = p % RG_JW, row = p / RG_JW, within = phase_w + point % RG_PW;
      const int oh = row * RG_OUT_H + phase_h, ow = (q_w + col) * RG_OUT_W + within;
      stored[i] = point < kPoints && row < RG_TH && col < RG_TW && (RG_PW == RG_OUT_W || within < RG_OUT_W) &&
                  q_h * RG_OUT_H + oh < a.result_h && ow < a.result_w;
      element[i] = first + oh * a.result_row + ow * a.result_inner;
#if RG_HALF_SUMS
      unit[i] = !kTaps      ? unit_of(nothing)
                : stored[i] ? *reinterpret_cast<const uint4*>(stage + point * RG_STAGE_PITCH + column / 2)
                            : make_uint4(0, 0, 0, 0);
#else
      const float4* from = reinterpret_cast<const float4*>(stage + point * RG_STAGE_PITCH + column);
#pragma unroll
      for (int e4 = 0; e4 < kWide / 4; ++e4) {
        const float4 four = kTaps && stored[i] ? from[e4] : make_float4(0.f, 0.f, 0.f, 0.f);
        x[i][4 * e4] = four.x, x[i][4 * e4 + 1] = four.y, x[i][4 * e4 + 2] = four.z, x[i][4 * e4 + 3] = four.w;
      }
#endif
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!stored[i]) continue;
#if RG_HALF_SUMS
      if (whole) {
        store_16(a.result + element[i], unit[i]);
      } else {
        const unsigned word[4] = {unit[i].x, unit[i].y, unit[i].z, unit[i].w};
#pragma unroll
        for (int e = 0; e < kWide; ++e)
          if (e < count) a.result[element[i] + e] = low_half<output_t>(word[e / 2] >> e % 2 * 16);
      }
#else
      output_t results[kWide];
#pragma unroll
      for (int e = 0; e < kWide; ++e)
        results[e] = e < count ? stored_value<kFinished>(a, x[i][e], bias[e], channel + e, element[i] + e) : output_t();
      if (whole) {
        store_16(a.result + element[i], unit_of(results));
      } else {
#pragma unroll
        for (int e = 0; e < kWide; ++e)
          if (e < count) a.result[element[i] + e] = results[e];
      }
#endif
    }
  }
#else
  // A lane keeps its positions while the warp walks the channels, so where a result goes is worked out once per
  // position, and a channel costs one shared load, one address and one store per 32 results; where the run is one row and
  // holds all width phases, one address for all of them.
  const int warp = thread / 32, lane = thread % 32;
  constexpr int kPerLane = sizeof(output_t) == 2 ? 2 : 1, kPerStage = RG_HALF_SUMS ? 2 : 1;
  constexpr int kSpan = 32 * kPerLane;
  constexpr bool kOneRow = RG_TH == 1 && RG_PW == RG_OUT_W;
  // 640 threads have 96 registers each, 768 have 80.
  // Where blocks walk, a warp stores whole rows in one go: what it stores then shares no sectors with what comes later.
  constexpr bool kAhead = RG_WINDOW > 0 || RG_PW < RG_OUT_W;
  constexpr int kMost =
      kThreads > 640 && kPerLane == 2 ? 1 : (kThreads <= (kAhead && kOneRow ? 640 : 512) ? 8 : 4) / kPerLane;
  constexpr int kKept = (kPoints + kSpan - 1) / kSpan < kMost ? (kPoints + kSpan - 1) / kSpan : kMost;
  constexpr int kTurns = (kPoints + kKept * kSpan - 1) / (kKept * kSpan);
#pragma unroll(kTurns <= 2 ? kTurns : 1)
  for (int x0 = 0; x0 < kPoints; x0 += kKept * kSpan) {
    unsigned to[kKept][kPerLane];  // offset in the plane
    bool stored[kKept][kPerLane], paired[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll
      for (int e = 0; e < kPerLane; ++e) {
        const int x = x0 + i * kSpan + lane * kPerLane + e;
        const int p = p_first + x / RG_PW, col = p % RG_JW, row = p / RG_JW, within = phase_w + x % RG_PW;
        const int oh = (q_h + row) * RG_OUT_H + phase_h, ow = (q_w + col) * RG_OUT_W + within;
        stored[i][e] = x < kPoints && row < RG_TH && col < RG_TW && oh < a.result_h && ow < a.result_w &&
                       (RG_PW == RG_OUT_W || within < RG_OUT_W);
        to[i][e] = kOneRow || stored[i][e] ? oh * static_cast<unsigned>(a.result_row) + ow : 0u;
        if (kOneRow && i + e > 0) to[i][e] = to[0][0] + i * kSpan + e;
      }
      // 16-bit: neighbours of a row leave as one word where the row allows it.
      paired[i] = RG_WIDE_PAIRS && a.wide_stores && stored[i][0] && stored[i][kPerLane - 1] &&
                  to[i][kPerLane - 1] == to[i][0] + 1 && to[i][0] % 2 == 0;
    }
    const int last = min(RG_CHANNELS, RG_N_CHANNELS - n_first);
    int channel = item.group * RG_N_CHANNELS + n_first + warp;
    long long first = item.b * a.result_image + od * a.result_slab + channel * a.result_inner;
    output_t* result = a.result + first + (kOneRow ? to[0][0] : 0u);
    const stage_t* from = stage + warp * RG_STAGE_PITCH + (x0 + lane * kPerLane) / kPerStage;
    // Two channels at once: the sums of the second come while those of the first leave. Or (kAhead) one, and those of the
    // next are on their way before it leaves, since a shared load stands behind the stores that its warp issued before;
    // where a channel is few stores, that is too little at once (nnunet3d_64_32 in fp16: 0.190 instead of 0.145 ms).
    constexpr int kStep = kStorers / 32;
    stage_t x[2][kKept][kPerLane / kPerStage];
    auto take = [&](int c, int column) {
#pragma unroll
      for (int i = 0; i < kKept; ++i)
        if (kTurns > 2 || x0 + i * kSpan < kPoints)
#pragma unroll
          for (int e = 0; e < kPerLane / kPerStage; ++e)
            // Behind the last channel's points lie sums of the other warpgroup.
            x[c][i][e] =
                kTaps && column < last && (kPoints % kSpan == 0 || x0 + i * kSpan + lane * kPerLane + e < kPoints)
                    ? from[i * kSpan / kPerStage + e]
                    : stage_t();
      from += kStep * RG_STAGE_PITCH;
    };
    if (kAhead) take(0, warp);
#pragma unroll 1
    for (int column = warp; column < last; column += 2 * kStep) {
      if (!kAhead) {
        take(0, column);
        take(1, column + kStep);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (c == 1 && column + kStep >= last) break;
        if (kAhead) take(1 - c, column + (c + 1) * kStep);
        const float bias = tconv_bias(a.bias, channel);
        result = opaque_global(result);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          if (kTurns <= 2 && x0 + i * kSpan >= kPoints) continue;
          output_t value[kPerLane];
#pragma unroll
          for (int e = 0; e < kPerLane; ++e)
            value[e] = RG_HALF_SUMS && kTaps
                           ? low_half<output_t>(static_cast<unsigned>(x[c][i][0]) >> e * 16)
                           : stored_value<kFinished>(a, x[c][i][e / kPerStage], bias, channel, first + to[i][e]);
          output_t* const there = result + (kOneRow ? i * kSpan : to[i][0]);
          if (paired[i]) {
            *reinterpret_cast<unsigned*>(there) = pack_words(value[0], value[kPerLane - 1]);
            continue;
          }
          if (stored[i][0]) *there = value[0];
          if (kPerLane == 2 && stored[i][kPerLane - 1])
            result[kOneRow ? i * kSpan + 1 : to[i][kPerLane - 1]] = value[kPerLane - 1];
        }
        channel += kStep;
        first += kStep * a.result_inner;
        result += kStep * a.result_inner;
      }
    }
  }
#endif
}

// --------------------------------------------------------------------------------------------------------- the block

extern "C" __global__ void __launch_bounds__(kThreads, 1) ring_gemm(const __grid_constant__ RingGemmArgs a) {
  extern __shared__ __align__(1024) uint4 shared[];
  __shared__ Barrier full[RG_STAGES], empty[RG_STAGES];  // positions
  __shared__ Barrier weights_full[RG_WEIGHT_STAGES], weights_empty[RG_WEIGHT_STAGES];
  __shared__ Barrier hand_over[RG_RACECHECK ? kEmptySums + 2 : 1];
  uint4* const tiles = shared;
  unsigned* const weights = reinterpret_cast<unsigned*>(shared + RG_STAGES * kStageUnits);
  stage_t* const sums = reinterpret_cast<stage_t*>(weights + RG_WEIGHT_STAGES * kWeightStageWords);
#if RG_ROWS
  __shared__ Barrier arrived[RG_LOAD_WARPS * RG_RAW_SLOTS];  // boxes
#endif
#if !RG_TENSOR
  __shared__ int reaches[kRows];
  // On a 128-byte boundary, for boxes; pieces and their places, or boxes.
  uint4* const raw =
      shared +
      (RG_STAGES * kStageUnits + (RG_WEIGHT_STAGES * kWeightStageWords + 2 * RG_SUM_WORDS + 3) / 4 + 7) / 8 * 8;
  Place* const places = reinterpret_cast<Place*>(raw + kSlots * 8 * kLoaders + (kSlots * kLoaders + 3) / 4);
#endif
  // Uniform for the compiler too: what follows from it is worked out once per warp.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int s = 0; s < RG_STAGES; ++s) {
      barrier_init(full + s, RG_TENSOR ? 1 : kLoaders);
      barrier_init(empty + s, 8);
    }
    for (int s = 0; s < RG_WEIGHT_STAGES; ++s) {
      barrier_init(weights_full + s, 1);
      barrier_init(weights_empty + s, 8);
    }
#if RG_ROWS
    for (int s = 0; s < RG_LOAD_WARPS * RG_RAW_SLOTS; ++s) barrier_init(arrived + s, 1);
#endif
    for (int i = 0; i < 2 && RG_RACECHECK; ++i) {
      barrier_init(hand_over + kFullSums + i, 128);
      barrier_init(hand_over + kEmptySums + i, kStorers);
    }
    barrier_init_done();
  }
  // Phases without taps hold zero, and nothing else writes them.
  if (RG_NUM_LIVE < RG_PW)
    for (int i = threadIdx.x; i < 2 * RG_SUM_WORDS; i += kThreads) sums[i] = stage_t();
  __syncthreads();
  wait_for_kernel_before();  // packs

  if (warp < 8) {  // multiply
    if (RG_TENSOR) take_registers<RG_STORE_GROUPS == 1 ? 160 : 120>();
    const int warpgroup = warp / 4;
    const bool leader = lane == 0;  // of its warp: a warp knows of its own products only
    stage_t* const stage = sums + warpgroup * RG_SUM_WORDS;
    unsigned handed_over = 0;  // parity of the next use of the sums
    const unsigned first_row = operand_word(weights + (RG_ROW_GROUPS == 2 ? warpgroup * kGroupWords : 0), 1024);
    const unsigned first_column =
        operand_word(tiles + warpgroup * (RG_GROUP_ROWS * RG_JW + RG_GROUP_COLUMNS) * kPositionUnits, kPlaneBytes);
    RingPlace<RG_STAGES> at;  // RG_WINDOW: of the next stage that is not known to be full
    RingPlace<RG_WEIGHT_STAGES> rows_at;
#if RG_WINDOW
    int window_at = 0, known = 0;  // the stage of the window's first row; how many from there on are full
    auto stage_of = [&](int row, int chunk) {
      const int stage = window_at + row * RG_CHUNKS + chunk;
      return stage < RG_STAGES ? stage : stage - RG_STAGES;
    };
#endif
#if RG_TENSOR
    const bool by_engine = a.tensor;
#else
    constexpr bool by_engine = false;
#endif
    for (Items items(a); items.any(); items.advance(a)) {
      const Item item = locate(a, items);
      int last_pass = -1;
      for (int pass = item.pass_begin; pass < item.pass_end; ++pass)
        if (rg_entry_begin[pass] < rg_entry_begin[pass + 1]) last_pass = pass;
      bool first_pass = true;
      RingPlace<RG_STAGES> item_at = at;
#if RG_WINDOW
      const int behind = items.at + 1 < items.length ? RG_SRC_D : RG_WINDOW;  // rows that no later item reads
#endif
      for (int pass = item.pass_begin; pass <= last_pass; ++pass) {
        const int entry_begin = rg_entry_begin[pass], entry_end = rg_entry_begin[pass + 1];
        if (entry_begin == entry_end) continue;
        float sum[kSums];
        int accumulate = 0;
        int rows_behind = -1, tile_behind = -1;  // stages (RG_WINDOW: chunk) that the products under way read last
        auto leave_tile = [&]() {
#if RG_WINDOW
          for (int row = 0; row < behind; ++row) barrier_arrive(empty + stage_of(row, tile_behind));
#else
          barrier_arrive(empty + tile_behind);
#endif
        };
        if (RG_RESIDENT) at = item_at;
        for (int chunk = 0; chunk < RG_CHUNKS; ++chunk) {
#if RG_WINDOW
          const int last_row = pass == last_pass ? max(rg_pass_row[pass], behind - 1) : rg_pass_row[pass];
          for (const int needed = last_row * RG_CHUNKS + chunk + 1; known < needed; ++known) {
            barrier_wait(full + at.stage, at.parity);
            if (!by_engine) fence_shared_for_wgmma();
            at.advance();
          }
#else
          if (!RG_RESIDENT || first_pass) {
            barrier_wait(full + at.stage, at.parity);
            // The tensor core reads what other threads stored in the ordinary way. The fence stands here and not with the
            // writers, where it would also wait for the copies that they have under way.
            if (!by_engine) fence_shared_for_wgmma();
          }
          const unsigned tile = first_column + at.stage * kStageUnits;
#endif
          for (int entry = entry_begin; entry < entry_end; entry += RG_ENTRIES_PER_STAGE) {
            barrier_wait(weights_full + rows_at.stage, RG_WEIGHTS_STAY ? 0 : rows_at.parity);
            const unsigned rows = first_row + rows_at.stage * (kWeightStageWords / 4);
            wgmma_fence();
#pragma unroll
            for (int e = 0; e < RG_ENTRIES_PER_STAGE; ++e) {
              if (entry + e < entry_end) {
#if RG_WINDOW
                const int word = rg_entry_word[entry + e];
                const unsigned columns = first_column + stage_of(word >> 24, chunk) * kStageUnits + (word & 0xffffff);
#else
                const unsigned columns = tile + rg_entry_word[entry + e];
#endif
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                  wgmma_shared(sum, operand_descriptor(rows + (e * kEntryWords + step * 512) / 4, 8),
                               operand_descriptor(columns + step * kStepUnits, kColumnsLayout), accumulate);
                  accumulate = 1;
                }
              }
            }
            wgmma_commit();
            wgmma_wait<1>();  // the products before these have left their stages
            if (!RG_WEIGHTS_STAY && leader && rows_behind >= 0) barrier_arrive(weights_empty + rows_behind);
            if (leader && tile_behind >= 0) leave_tile();
            tile_behind = -1;
            rows_behind = rows_at.stage;
            rows_at.advance();
          }
#if RG_WINDOW
          if (pass == last_pass) tile_behind = chunk;
#else
          if (!RG_RESIDENT || pass == last_pass) tile_behind = at.stage;
          at.advance();
#endif
        }
        first_pass = false;
        wgmma_wait<0>();
        if (leader) {
          if (!RG_WEIGHTS_STAY) barrier_arrive(weights_empty + rows_behind);
          if (tile_behind >= 0) leave_tile();
        }
        Rows own;
#if RG_EARLY_EPILOGUE
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int n = (item.row_block + (RG_ROW_GROUPS == 2 ? warpgroup : 0)) * RG_CHANNELS +
                        RG_ROW_CHANNEL(warp % 4 * 16 + lane / 4 + half * 8);
          own.channel[half] = item.group * RG_N_CHANNELS + min(n, RG_N_CHANNELS - 1);
          own.bias[half] = tconv_bias(a.bias, own.channel[half]);
        }
#endif
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sums_wait(hand_over, kEmptySums + warpgroup, handed_over);
          store_sums(a, stage, sum, own, part, warp % 4, lane);
          sums_arrive(hand_over, kFullSums + warpgroup);
          handed_over ^= 1;
        }
      }
#if RG_WINDOW
      const int stages_behind = behind * RG_CHUNKS;
      known -= stages_behind;
      window_at += stages_behind;
      if (window_at >= RG_STAGES) window_at -= RG_STAGES;
#endif
    }
    sums_wait(hand_over, kEmptySums + warpgroup, handed_over);
    return;
  }
  if (RG_TENSOR) give_registers<RG_STORE_GROUPS == 1 ? 96 : 80>();
  if (warp < kWeightWarp) {  // load
#if RG_TENSOR
    load_tiles(a, tiles, full, empty, lane);
#else
    const int thread = threadIdx.x - 256;
#if RG_ROWS
    load_rows(a, raw, tiles, arrived, full, empty, thread);
#else
    for (int row = thread; row < kRows; row += kLoaders) reaches[row] = row_reach(row);
#if RG_VECTOR && !TCONV_CHANNELS_LAST
    for (int i = thread; i < kVectorPieces / kUnits; i += kLoaders) places[i] = vector_place(a, i);
#else
    for (int p = thread; p < kPositions; p += kLoaders) places[p] = position_place(a, p);
#endif
    loaders_barrier();
#if RG_VECTOR && TCONV_CHANNELS_LAST && !TCONV_DTYPE_f32
    copy_tiles(a, places, reaches, tiles, full, empty, thread);
#else
    load_tiles<RG_VECTOR>(a, places, reaches, raw, tiles, full, empty, thread);
#endif
#endif
#endif
  } else if (warp >= kFirstStorer) {  // store
    const int storer = (threadIdx.x - 32 * kFirstStorer) % kStorers;
    const int first_warpgroup = RG_STORE_GROUPS == 2 ? (warp - kFirstStorer) / 4 : 0;
    unsigned handed_over = 0;
    sums_arrive(hand_over, kEmptySums + first_warpgroup);
    if (RG_STORE_GROUPS == 1) sums_arrive(hand_over, kEmptySums + 1);
    for (Items items(a); items.any(); items.advance(a)) {
      const Item item = locate(a, items);
      for (int pass = item.pass_begin; pass < item.pass_end; ++pass) {
        const bool taps = rg_entry_begin[pass] < rg_entry_begin[pass + 1];
        for (int part = 0; part < kParts; ++part) {
          for (int warpgroup = first_warpgroup; warpgroup < 2; warpgroup += RG_STORE_GROUPS) {
            if (taps) {
              sums_wait(hand_over, kFullSums + warpgroup, handed_over);
              store_run<true>(a, item, pass, part, warpgroup, sums + warpgroup * RG_SUM_WORDS, storer);
              sums_arrive(hand_over, kEmptySums + warpgroup);
            } else if (RG_EMPTY_PASSES) {
              store_run<false>(a, item, pass, part, warpgroup, nullptr, storer);
            }
          }
          if (taps) handed_over ^= 1;
        }
      }
    }
  } else if (warp == kWeightWarp && lane == 0) {  // weights
    RingPlace<RG_WEIGHT_STAGES> at;
    for (Items items(a); items.any(); items.advance(a)) {
      const Item item = locate(a, items);
      constexpr long long kBlockWords = RG_NUM_ENTRIES * RG_CHUNKS * kEntryWords;
      const unsigned* rows = a.weights + (item.group * RG_ROW_BLOCKS + item.row_block) * kBlockWords;
      // A missing last block is a copy of the one before, whose results are dropped.
      const long long next = item.row_block + 1 < RG_ROW_BLOCKS ? kBlockWords : 0;
      for (int pass = item.pass_begin; pass < item.pass_end; ++pass) {
        const int entry_begin = rg_entry_begin[pass], count = rg_entry_begin[pass + 1] - entry_begin;
        for (int chunk = 0; chunk < RG_CHUNKS; ++chunk)
          for (int entry = 0; entry < count; entry += RG_ENTRIES_PER_STAGE) {
            const int entries = min(RG_ENTRIES_PER_STAGE, count - entry);
            barrier_wait(weights_empty + at.stage, at.parity ^ 1);
            barrier_expect(weights_full + at.stage, RG_ROW_GROUPS * entries * kEntryWords * 4);
#pragma unroll
            for (int r = 0; r < RG_ROW_GROUPS; ++r)
              copy_bulk(weights + at.stage * kWeightStageWords + r * kGroupWords,
                        rows + r * next + (long long)(entry_begin * RG_CHUNKS + chunk * count + entry) * kEntryWords,
                        entries * kEntryWords * 4, weights_full + at.stage);
            at.advance();
          }
      }
      if (RG_WEIGHTS_STAY) break;  // every item uses the same ones
    }
  }
}
