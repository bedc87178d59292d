// phase_gemm_sm90 — transposed convolution and its input gradient on Hopper's warpgroup products.
// Computes  result[b, n, o] = epilogue( sum over taps, k of source[b, k, position(o, tap)] * weight[k, n, tap] )
//           with source, k, n as in phase_gemm_sm80
// Method    rows of a product are (result channel, width phase) pairs, 64 a warpgroup, straight from L1 into registers in
//           fragment order; columns are up to 256 lattice positions, a run of the staged tile (rows of the tile behind
//           each other, the halo columns between them computed and dropped). All width phases that read the same shift
//           share one product. While products of a chunk run, the next chunk is loaded, rounded and stored.
// Refuses   fp32 accuracy (the tensor core truncates its sums), fp64, groups of few channels (see phase_gemm_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 4 epilogue · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "wgmma_sm90.cuh"

__constant__ int p9_entry_begin[] = {P9_ENTRY_BEGIN};  // per pass, into p9_entry_word
__constant__ int p9_entry_word[] = {P9_ENTRY_WORD};    // position offset in the tile
__constant__ int p9_pass[] = {P9_PASS};                // depth phase, height phase, first width phase
__constant__ int p9_planes_d[] = {P9_PLANES_D};        // source coordinate of each plane's first row or column
__constant__ int p9_planes_h[] = {P9_PLANES_H};
__constant__ int p9_planes_w[] = {P9_PLANES_W};
__constant__ int p9_live[] = {P9_LIVE};  // width phases with taps, in row order

constexpr int kThreads = 128 * P9_WARPGROUPS;
constexpr int kPerUnit = 16 / sizeof(storage_t);  // channels in 16 bytes
constexpr int kUnits = P9_KC / 4;                 // planes per chunk; P9_KC counts 4-byte words
constexpr int kSteps = P9_KC / 8;
constexpr int kRowsD = P9_NPD * P9_JD, kRowsH = P9_NPH * P9_JH;
constexpr int kPositions = P9_NPW * kRowsD * kRowsH * P9_JW;
constexpr int kPlane = P9_PLANE;  // positions of a plane, with room for the run's overhang
constexpr int kBatches = (kPositions + kThreads - 1) / kThreads;
constexpr int kRaw = TCONV_CHANNELS_LAST ? 4 : kPerUnit;  // registers of a unit on its way
constexpr int kSums = P9_N / 2;

struct PhaseGemmArgs {
  const storage_t* source;
  const unsigned* weights;  // packed rows, see phase_gemm_pack_sm90.cu
  const void* bias;
  output_t* result;
  long long source_plane, result_plane;
  int source_d, source_h, source_w;
  int result_d, result_h, result_w;
  int tiles_d, tiles_h, tiles_w;
  int vector_loads;  // channels_last: 16-byte units are aligned
  int pair_stores;   // 16-bit results: rows start on 4-byte boundaries
  Operands operands;
};

struct Batch {
  unsigned raw[kUnits * kRaw];
};

// 2 load: all units of one position per thread.
__device__ __forceinline__ void load_batch(Batch& batch, const PhaseGemmArgs& a, const storage_t* source, int chunk,
                                           int p, int d0, int h0, int w0) {
  const int j = p % P9_JW, h_row = p / P9_JW % kRowsH, d_row = p / (P9_JW * kRowsH) % kRowsD,
            plane = p / (P9_JW * kRowsH * kRowsD);
  const int d = d0 + p9_planes_d[d_row / P9_JD] + d_row % P9_JD * P9_SRC_D;
  const int h = h0 + p9_planes_h[h_row / P9_JH] + h_row % P9_JH * P9_SRC_H;
  const int w = w0 + p9_planes_w[plane < P9_NPW ? plane : 0] + j * P9_SRC_W;
  const bool inside = p < kPositions && (unsigned)d < (unsigned)a.source_d && (unsigned)h < (unsigned)a.source_h &&
                      (unsigned)w < (unsigned)a.source_w;
  const int first = chunk * kUnits * kPerUnit;
#if TCONV_CHANNELS_LAST
  const storage_t* from =
      source + (inside ? (((long long)d * a.source_h + h) * a.source_w + w) * (P9_K * TCONV_GROUPS) : 0) + first;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    uint4 four = make_uint4(0, 0, 0, 0);
    if (inside && a.vector_loads && first + (u + 1) * kPerUnit <= P9_K) {
      four = __ldg(reinterpret_cast<const uint4*>(from + u * kPerUnit));
    } else if (inside) {
      unsigned* word = reinterpret_cast<unsigned*>(&four);
#pragma unroll
      for (int e = 0; e < kPerUnit; ++e)
        if (first + u * kPerUnit + e < P9_K)
          word[e * 4 / kPerUnit] |= word_of(from[u * kPerUnit + e]) << (kPerUnit == 8 ? e % 2 * 16 : 0);
    }
    batch.raw[u * 4] = four.x;
    batch.raw[u * 4 + 1] = four.y;
    batch.raw[u * 4 + 2] = four.z;
    batch.raw[u * 4 + 3] = four.w;
  }
#else
  const storage_t* from =
      source + (inside ? ((long long)d * a.source_h + h) * a.source_w + w : 0) + first * a.source_plane;
#pragma unroll
  for (int c = 0; c < kUnits * kPerUnit; ++c) {
    batch.raw[c] = inside && (P9_K % (kUnits * kPerUnit) == 0 || first + c < P9_K) ? word_of(*from) : 0u;
    from += a.source_plane;
  }
#endif
}

__device__ __forceinline__ void store_batch(const Batch& batch, uint4* tile, int p) {
  if (p >= kPositions) return;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const unsigned* raw = batch.raw + u * kRaw;
    uint4 unit;
#if TCONV_DTYPE_f32
    unit = make_uint4(to_tf32(__uint_as_float(raw[0])), to_tf32(__uint_as_float(raw[1])),
                      to_tf32(__uint_as_float(raw[2])), to_tf32(__uint_as_float(raw[3])));
#elif TCONV_CHANNELS_LAST
    unit = make_uint4(raw[0], raw[1], raw[2], raw[3]);
#else
    unit = make_uint4(raw[0] | raw[1] << 16, raw[2] | raw[3] << 16, raw[4] | raw[5] << 16, raw[6] | raw[7] << 16);
#endif
    tile[u * kPlane + p] = unit;
  }
}

// Rows of one entry (tap shift) for a chunk.
struct RowFragments {
  unsigned word[kSteps][4];
  __device__ __forceinline__ void load(const uint4* from) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 four = __ldg(from + step * 128);
      word[step][0] = four.x;
      word[step][1] = four.y;
      word[step][2] = four.z;
      word[step][3] = four.w;
    }
  }
};

// Row of a product -> (channel, width phase). With two phases both are in one thread (rows r and r + 8).
__device__ __forceinline__ void store_sums(float* stage, const float (&sum)[kSums], int part, int warp, int quad,
                                           int quarter) {
  constexpr int kPart = P9_PART;
#pragma unroll
  for (int n8 = 0; n8 < kPart / 8; ++n8) {
    if (part * kPart + n8 * 8 >= P9_N) break;
    const int at = (part * (kPart / 8) + n8) * 4, position = n8 * 8 + quarter * 2;
#if !TCONV_CHANNELS_LAST && P9_NUM_LIVE == 1 && P9_PW == 1
    float2* to = reinterpret_cast<float2*>(stage + (warp * 16 + quad) * P9_STAGE_PITCH + position);
    to[0] = make_float2(sum[at], sum[at + 1]);
    to[4 * P9_STAGE_PITCH] = make_float2(sum[at + 2], sum[at + 3]);
#elif !TCONV_CHANNELS_LAST && P9_NUM_LIVE == 2 && P9_PW == 2
    *reinterpret_cast<float4*>(stage + (warp * 8 + quad) * P9_STAGE_PITCH + position * 2) =
        make_float4(sum[at], sum[at + 2], sum[at + 1], sum[at + 3]);
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + quad + half * 8;
      const int channel = P9_ROW_CHANNEL(row), phase = p9_live[P9_ROW_LIVE(row)];
      if (channel >= P9_CHANNELS) continue;
#if TCONV_CHANNELS_LAST
      stage[(position * P9_PW + phase) * P9_STAGE_PITCH + channel] = sum[at + half * 2];
      stage[((position + 1) * P9_PW + phase) * P9_STAGE_PITCH + channel] = sum[at + half * 2 + 1];
#else
      stage[channel * P9_STAGE_PITCH + position * P9_PW + phase] = sum[at + half * 2];
      stage[channel * P9_STAGE_PITCH + (position + 1) * P9_PW + phase] = sum[at + half * 2 + 1];
#endif
    }
#endif
  }
}

__device__ __forceinline__ void clear_dead_phases(float* stage, int thread) {
  for (int e = thread; e < P9_CHANNELS * P9_PART * P9_PW; e += 128) {
    const int phase = e % P9_PW, position = e / P9_PW % P9_PART, channel = e / P9_PW / P9_PART;
    bool live = false;
#pragma unroll
    for (int l = 0; l < P9_NUM_LIVE; ++l) live |= p9_live[l] == phase;
    if (live) continue;
#if TCONV_CHANNELS_LAST
    stage[(position * P9_PW + phase) * P9_STAGE_PITCH + channel] = 0.f;
#else
    stage[channel * P9_STAGE_PITCH + position * P9_PW + phase] = 0.f;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, P9_MIN_BLOCKS) phase_gemm(const PhaseGemmArgs a) {
  extern __shared__ __align__(128) uint4 shared[];
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, quad = lane / 4, quarter = lane % 4;
  wait_for_kernel_before();  // packs the weights

  // 1 locate
  unsigned index = blockIdx.x;
  const int row_block = index % P9_ROW_BLOCKS * P9_WARPGROUPS + warpgroup;
  index /= P9_ROW_BLOCKS;
  int pass_begin = 0, pass_end = P9_NUM_PASSES;
  if (P9_PASS_PER_BLOCK) {
    pass_begin = index % P9_NUM_PASSES;
    pass_end = pass_begin + 1;
    index /= P9_NUM_PASSES;
  }
  const int tile_w = index % a.tiles_w;
  index /= a.tiles_w;
  const int tile_h = index % a.tiles_h;
  index /= a.tiles_h;
  const int tile_d = index % a.tiles_d;
  index /= a.tiles_d;
  const int group = index % TCONV_GROUPS;
  const long long b = index / TCONV_GROUPS;
  const int q_d = tile_d, q_h = tile_h * P9_TH, q_w = tile_w * P9_TW;
  const int d0 = q_d * P9_SRC_D, h0 = q_h * P9_SRC_H, w0 = q_w * P9_SRC_W;
  const long long source_volume = (long long)a.source_d * a.source_h * a.source_w;
  const storage_t* source = TCONV_CHANNELS_LAST ? a.source + b * source_volume * (P9_K * TCONV_GROUPS) + group * P9_K
                                                : a.source + (b * TCONV_GROUPS + group) * P9_K * source_volume;
  const uint4* rows =
      reinterpret_cast<const uint4*>(a.weights) +
      (long long)(group * P9_ROW_BLOCKS * P9_WARPGROUPS + row_block) * (P9_NUM_ENTRIES * P9_CHUNKS * kSteps * 128) +
      thread;

  const int num_chunks = P9_CHUNKS == 1 ? 1 : (pass_end - pass_begin) * P9_CHUNKS;
  Batch first_batch, second_batch;
  for (int j = 0; j < kBatches; j += 2) {
    load_batch(first_batch, a, source, 0, threadIdx.x + j * kThreads, d0, h0, w0);
    if (j + 1 < kBatches) load_batch(second_batch, a, source, 0, threadIdx.x + (j + 1) * kThreads, d0, h0, w0);
    store_batch(first_batch, shared, threadIdx.x + j * kThreads);
    if (j + 1 < kBatches) store_batch(second_batch, shared, threadIdx.x + (j + 1) * kThreads);
  }
  fence_shared_for_wgmma();
  __syncthreads();

  float sum[kSums];
  int loaded = 0;  // chunks so far
  for (int pass = pass_begin; pass < pass_end; ++pass) {
#pragma unroll
    for (int r = 0; r < kSums; ++r) sum[r] = 0.f;
    const int entry_begin = p9_entry_begin[pass], entry_end = p9_entry_begin[pass + 1];
    for (int chunk = 0; chunk < P9_CHUNKS; ++chunk, ++loaded) {
      const uint4* tile = shared + (P9_STAGES == 2 ? loaded % 2 : 0) * (kUnits * kPlane);
      uint4* next_tile = shared + (P9_STAGES == 2 ? (loaded + 1) % 2 : 0) * (kUnits * kPlane);
      const bool more = P9_CHUNKS > 1 && loaded + 1 < num_chunks;
      int batches = 0;  // turns of the next chunk's transfer; a batch is loaded in one turn and stored two turns later
      auto transfer = [&](Batch& batch) {
        if (batches >= 2) store_batch(batch, next_tile, threadIdx.x + (batches - 2) * kThreads);
        if (batches < kBatches)
          load_batch(batch, a, source, (loaded + 1) % P9_CHUNKS, threadIdx.x + batches * kThreads, d0, h0, w0);
        ++batches;
      };

      // 3 multiply: while entry e runs, a batch of the next chunk is loaded and the rows of entry e + 2 arrive; from L2
      // they take longer than the products of one entry. Four sets of rows, because those of e are being read.
      RowFragments set0, set1, set2, set3;
      const uint4* chunk_rows = rows + chunk * (kSteps * 128);
      if (entry_begin < entry_end) set0.load(chunk_rows + entry_begin * (P9_CHUNKS * kSteps * 128));
      if (entry_begin + 1 < entry_end) set1.load(chunk_rows + (entry_begin + 1) * (P9_CHUNKS * kSteps * 128));
      auto multiply = [&](int entry, RowFragments& current, RowFragments& ahead, Batch& batch) {
        if (entry >= entry_end) return;
        if (entry + 2 < entry_end) ahead.load(chunk_rows + (entry + 2) * (P9_CHUNKS * kSteps * 128));
        const uint4* first = tile + p9_entry_word[entry];
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          wgmma_step(sum, current.word[step], columns_descriptor(first + step * 2 * kPlane, kPlane * 16));
        wgmma_commit();
        if (more && batches < kBatches + 2) transfer(batch);
        wgmma_wait<1>();  // entry - 1 is done: the next but one may overwrite its rows
      };
      for (int entry = entry_begin; entry < entry_end; entry += 4) {
        multiply(entry, set0, set2, first_batch);
        multiply(entry + 1, set1, set3, second_batch);
        multiply(entry + 2, set2, set0, first_batch);
        multiply(entry + 3, set3, set1, second_batch);
      }
      if (more) {
        while (batches < kBatches + 2) {
          if (batches % 2 == 0)
            transfer(first_batch);
          else
            transfer(second_batch);
        }
        fence_shared_for_wgmma();
      }
      wgmma_wait<0>();
      if (P9_CHUNKS > 1) __syncthreads();  // the next chunk is complete, and all have left this one
    }

    // 4 epilogue and 5 store, a part of the positions at a time through the warpgroup's stage.
    const int phase_d = p9_pass[3 * pass], phase_h = p9_pass[3 * pass + 1], phase_w = p9_pass[3 * pass + 2];
    const int od = q_d * P9_OUT_D + phase_d;
    float* const stage = reinterpret_cast<float*>(shared + P9_STAGES * kUnits * kPlane) + warpgroup * P9_STAGE_WORDS;
    const int n_first = row_block * P9_CHANNELS;
    constexpr int kPart = P9_PART;  // positions, a multiple of 8
#pragma unroll
    for (int part = 0; part * kPart < P9_N; ++part) {
      warpgroup_barrier(warpgroup);  // the previous part has been read
      store_sums(stage, sum, part, warp, quad, quarter);
      // Phases without taps hold the bias alone; nothing else writes them.
      if (P9_NUM_LIVE < P9_PW && part == 0 && pass == pass_begin) clear_dead_phases(stage, thread);
      warpgroup_barrier(warpgroup);
      if (od >= a.result_d) continue;
#if TCONV_CHANNELS_LAST
      // Lanes along the channels; a thread keeps its channels (128 / kLanes positions go by at a time).
      constexpr int kPerStore = sizeof(output_t) == 2 ? 2 : 1;
      constexpr int kLanes = P9_CHANNELS >= 33 ? 64 / kPerStore : P9_CHANNELS >= 17 ? 32 / kPerStore : 16 / kPerStore;
      const int column = thread % kLanes * kPerStore, n = n_first + column, channel = group * P9_N_CHANNELS + n;
      if (column < P9_CHANNELS && n < P9_N_CHANNELS) {
        const bool pair = kPerStore == 2 && n + 1 < P9_N_CHANNELS && column + 1 < P9_CHANNELS;
        const float bias0 = tconv_bias(a.bias, channel), bias1 = pair ? tconv_bias(a.bias, channel + 1) : 0.f;
#pragma unroll 4
        for (int point = thread / kLanes; point < kPart * P9_PW; point += 128 / kLanes) {
          const int p = part * kPart + point / P9_PW, col = p % P9_JW, row = p / P9_JW;
          const int within = phase_w + point % P9_PW;
          const int oh = (q_h + row) * P9_OUT_H + phase_h, ow = (q_w + col) * P9_OUT_W + within;
          if (row < P9_TH && col < P9_TW && (P9_PW == P9_OUT_W || within < P9_OUT_W) && oh < a.result_h &&
              ow < a.result_w) {
            const long long element =
                (((b * a.result_d + od) * a.result_h + oh) * a.result_w + ow) * (P9_N_CHANNELS * TCONV_GROUPS) +
                channel;
            const float* from = stage + point * P9_STAGE_PITCH + column;
            const output_t first =
                narrow<output_t>(tconv_epilogue<float>(from[0] + bias0, channel, element, a.operands));
            if (pair) {
              const output_t second =
                  narrow<output_t>(tconv_epilogue<float>(from[1] + bias1, channel + 1, element + 1, a.operands));
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
      }
#else
      // A lane keeps its positions while the warp walks the channels, so where a result goes is worked out once per
      // position, and a channel costs one shared load, one add and one store per 32 results.
      constexpr int kPerLane = sizeof(output_t) == 2 ? 2 : 1;
      constexpr int kPoints = kPart * P9_PW;
      constexpr int kSpan = 32 * kPerLane;
      constexpr int kKept = (kPoints + kSpan - 1) / kSpan < 8 ? (kPoints + kSpan - 1) / kSpan : 8;
      for (int x0 = 0; x0 < kPoints; x0 += kKept * kSpan) {
        int to[kKept][kPerLane];  // offset in the plane, -1: not stored
#pragma unroll
        for (int i = 0; i < kKept; ++i)
#pragma unroll
          for (int e = 0; e < kPerLane; ++e) {
            const int x = x0 + i * kSpan + lane * kPerLane + e;
            const int p = part * kPart + x / P9_PW, col = p % P9_JW, row = p / P9_JW, within = phase_w + x % P9_PW;
            const int oh = (q_h + row) * P9_OUT_H + phase_h, ow = (q_w + col) * P9_OUT_W + within;
            const bool stored = x < kPoints && row < P9_TH && col < P9_TW && oh < a.result_h && ow < a.result_w &&
                                (P9_PW == P9_OUT_W || within < P9_OUT_W);
            to[i][e] = stored ? oh * a.result_w + ow : -1;
          }
        const long long plane_first = (long long)od * a.result_h * a.result_w;
#pragma unroll 2
        for (int column = warp; column < P9_CHANNELS; column += 4) {
          const int n = n_first + column;
          if (n >= P9_N_CHANNELS) break;
          const int channel = group * P9_N_CHANNELS + n;
          const float bias = tconv_bias(a.bias, channel);
          const long long element_first = (b * (P9_N_CHANNELS * TCONV_GROUPS) + channel) * a.result_plane + plane_first;
          output_t* result = a.result + element_first;
          const float* from = stage + column * P9_STAGE_PITCH + x0 + lane * kPerLane;
#pragma unroll
          for (int i = 0; i < kKept; ++i) {
#if P9_WIDE_PAIRS
            // 16-bit: neighbours of a row leave as one word where the row allows it.
            if (to[i][0] < 0 && to[i][kPerLane - 1] < 0) continue;
            const output_t first = narrow<output_t>(
                tconv_epilogue<float>(from[i * kSpan] + bias, channel, element_first + to[i][0], a.operands));
            const output_t second = narrow<output_t>(tconv_epilogue<float>(
                from[i * kSpan + 1] + bias, channel, element_first + to[i][kPerLane - 1], a.operands));
            if (a.pair_stores && to[i][0] >= 0 && to[i][kPerLane - 1] == to[i][0] + 1 && to[i][0] % 2 == 0) {
              *reinterpret_cast<unsigned*>(result + to[i][0]) = pack_words(first, second);
            } else {
              if (to[i][0] >= 0) result[to[i][0]] = first;
              if (to[i][kPerLane - 1] >= 0) result[to[i][kPerLane - 1]] = second;
            }
#else
#pragma unroll
            for (int e = 0; e < kPerLane; ++e)
              if (to[i][e] >= 0)
                result[to[i][e]] = narrow<output_t>(
                    tconv_epilogue<float>(from[i * kSpan + e] + bias, channel, element_first + to[i][e], a.operands));
#endif
          }
        }
      }
#endif
    }
  }
}
