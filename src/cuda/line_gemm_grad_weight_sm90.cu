// line_gemm_grad_weight_sm90 — weight gradient of 16-bit channels_last layers, every row of grad_output staged once (sm_90a).
// Computes  partial[set][row, ci] = sum over positions i of line(set)[row, i] * input[ci, i]
// Method    the stride's neighbouring positions times their channels are one long row in memory, here cut into pieces of 64
//           elements: a line of 128 bytes is one such piece of one input position. All width taps of a position lie in a few
//           pieces of its own and of neighbouring lines, so a set, 64 rows of a product, is a piece, a shift by whole lines
//           and a tap in depth and height; rows of it that are no tap are dropped in the end. A block walks along the
//           height: a stage holds the LG_ROWS rows of grad_output that one more row of the input needs, at all depths, and
//           that input row; the last LG_REACH stages before it are still there. One warp lets the copy engine stage; a
//           second one adds the line behind which a row of grad_output ends amid a stride. Both operands lie with the
//           channels innermost and are read from shared memory by warpgroups that divide the sets.
// Refuses   everything else (see line_gemm_grad_weight_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "partial_sums_sm90.cuh"
#include "ring_sm90.cuh"

__constant__ int lg_slice_depth[] = {LG_SLICE_DEPTH};  // of grad_output, where a slice of taps begins
__constant__ int lg_depths[] = {LG_DEPTHS};            // staged, relative to that
__constant__ int lg_rows[] = {LG_ROW};                 // of a stage, relative to stride * its row
__constant__ int lg_pieces[] = {LG_PIECES};            // [slice][LG_NUM_PIECES]: first element of each staged piece
__constant__ int lg_set_stage[] = {LG_SET_STAGE};      // [slice][set]: of the window
__constant__ int lg_set_unit[] = {LG_SET_UNIT};        // [slice][set]: in it

struct LineGemmArgs {
  TensorMap input_map, grad_map, tail_map;
  const storage_t* input;
  const storage_t* grad_output;
  float* partial;
  int input_size[3], grad_size[3];  // depth, height, width
  int tensor;                       // the copy engine can take both
  int tail;                         // the line with which a row ends amid a stride; -1: none
  int tiles_d, tiles_w;
  int segment, segments_h;  // rows of a segment; segments of the height
  int shares;
  unsigned segments;
};

constexpr int kConsumers = LG_WARPGROUPS;
constexpr int kThreads = 128 * (kConsumers + 1);  // two warps stage; their warpgroup's registers go to the others
constexpr int kSets = LG_SETS;                    // of a warpgroup
constexpr int kInputUnits = (LG_TD * LG_TW * LG_LINE / 16 + 63) / 64 * 64;
constexpr int kBoxUnits = LG_LINES * 8;  // of the lines of one row
constexpr int kNumDepths = LG_NUM_DEPTHS, kNumBoxes = LG_NUM_PIECES * LG_NUM_DEPTHS * LG_ROWS;
constexpr int kStageUnits = kInputUnits + (kNumBoxes * kBoxUnits + 63) / 64 * 64;
constexpr int kLineElements = TCONV_S2 * TCONV_CO;  // of the long row, an input position

// A block's segments lie as far apart as there are blocks, so that neighbours in depth and width are walked together.
struct Segment {
  int w, d, h, rows, b;  // first input position; rows of the input
  __device__ __forceinline__ Segment(const LineGemmArgs& a, unsigned index) {
    w = static_cast<int>(index % a.tiles_w) * LG_TW;
    index /= a.tiles_w;
    d = static_cast<int>(index % a.tiles_d) * LG_TD;
    index /= a.tiles_d;
    h = static_cast<int>(index % a.segments_h) * a.segment;
    rows = min(a.segment, a.input_size[1] - h);
    b = static_cast<int>(index / a.segments_h);
  }
  __device__ __forceinline__ int line() const { return w + LG_FIRST_LINE; }
  __device__ __forceinline__ bool has_tail(const LineGemmArgs& a) const {
    return a.tail >= 0 && (unsigned)(a.tail - line()) < (unsigned)LG_LINES;
  }
};

// What a box of a stage holds.
struct Box {
  int piece, depth, row;
  __device__ __forceinline__ Box(const Segment& at, int slice, int stage, int index) {
    piece = lg_pieces[slice * LG_NUM_PIECES + index / (kNumDepths * LG_ROWS)];
    depth = at.d * TCONV_S0 + lg_slice_depth[slice] + lg_depths[index / LG_ROWS % kNumDepths];
    row = (at.h + stage) * TCONV_S1 + lg_rows[index % LG_ROWS];
  }
};

// 2 load: tensors that the copy engine cannot take (the first element is not on a 16-byte boundary, or rows are shorter
// than the stride), unit by unit, where the engine would put them. Slow, and rare.
__device__ __forceinline__ void gather_stage(const LineGemmArgs& a, uint4* stage, const Segment& at, int slice, int n,
                                             int first_channel, int lane) {
  auto unit_at = [](const storage_t* from, int count) {
    storage_t unit[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) unit[e] = e < count ? from[e] : storage_t();
    return unit_of(unit);
  };
  if (n >= LG_REACH) {
    constexpr int kUnits = LG_LINE / 16;
    for (int i = lane; i < LG_TD * LG_TW * kUnits; i += 32) {
      const int p = i / kUnits, u = i % kUnits, channel = first_channel + u * 8;
      const int w = at.w + p % LG_TW, d = at.d + p / LG_TW, h = at.h + n - LG_REACH;
      const bool inside = w < a.input_size[2] && d < a.input_size[0];
      const long long position =
          ((static_cast<long long>(at.b) * a.input_size[0] + d) * a.input_size[1] + h) * a.input_size[2] + w;
      stage[p * kUnits + (u ^ (p * kUnits / 8 & (kUnits - 1)))] =
          unit_at(a.input + position * TCONV_CI + channel, inside ? TCONV_CI - channel : 0);
    }
  }
  for (int i = lane; i < kNumBoxes * LG_LINES * 8; i += 32) {
    const int u = i % 8, line = i / 8 % LG_LINES, index = i / 8 / LG_LINES;
    const Box box(at, slice, n, index);
    const int element = box.piece + u * 8;
    const int w = (at.line() + line) * TCONV_S2 + element / TCONV_CO;
    const bool inside = element < kLineElements && (unsigned)w < (unsigned)a.grad_size[2] &&
                        (unsigned)box.row < (unsigned)a.grad_size[1] && (unsigned)box.depth < (unsigned)a.grad_size[0];
    const long long row =
        ((static_cast<long long>(at.b) * a.grad_size[0] + box.depth) * a.grad_size[1] + box.row) * a.grad_size[2];
    const int to = index * LG_LINES + line;
    stage[kInputUnits + to * 8 + (u ^ to % 8)] =
        unit_at(a.grad_output + (row + w) * TCONV_CO + element % TCONV_CO, inside ? 8 : 0);
  }
}

// 2 load
__device__ __forceinline__ void stage_rows(const LineGemmArgs& a, uint4* shared, Barrier* full, Barrier* empty,
                                           Barrier* landed, int slice, int block_n, int share, int lane) {
  RingPlace<LG_STAGES> at;
  for (unsigned index = share; index < a.segments; index += a.shares) {
    const Segment segment(a, index);
    const bool tail = segment.has_tail(a);
    for (int n = 0; n < segment.rows + LG_REACH; ++n, at.advance()) {
      barrier_wait(empty + at.stage, at.parity ^ 1);
      uint4* const stage = shared + at.stage * kStageUnits;
      if (!a.tensor) {
        gather_stage(a, stage, segment, slice, n, block_n * LG_N, lane);
        fence_shared_for_wgmma();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + at.stage);
        continue;
      }
      Barrier* const barrier = (tail ? landed : full) + at.stage;
      const bool with_input = n >= LG_REACH;
      if (lane == 0) barrier_expect(barrier, (with_input ? LG_TD * LG_TW * LG_LINE : 0) + kNumBoxes * LG_LINES * 128);
      __syncwarp();
      if (with_input && lane == 0)
        copy_box(stage, a.input_map, block_n * LG_N, segment.w, segment.h + n - LG_REACH, segment.d, segment.b,
                 barrier);
      for (int i = lane; i < kNumBoxes; i += 32) {
        const Box box(segment, slice, n, i);
        copy_box(stage + kInputUnits + i * kBoxUnits, a.grad_map, box.piece, segment.line(), box.row, box.depth,
                 segment.b, barrier);
      }
    }
  }
}

// The line in which a row ends: the engine has filled it with zeros, what exists of it comes behind.
__device__ __forceinline__ void stage_tails(const LineGemmArgs& a, uint4* shared, Barrier* full, Barrier* landed,
                                            int slice, int share, int lane) {
  if (!a.tensor || a.tail < 0) return;
  RingPlace<LG_STAGES> at;
  unsigned parities = 0;  // of landed, a bit each
  for (unsigned index = share; index < a.segments; index += a.shares) {
    const Segment segment(a, index);
    const bool tail = segment.has_tail(a);
    for (int n = 0; n < segment.rows + LG_REACH; ++n, at.advance()) {
      if (!tail) continue;
      barrier_wait(landed + at.stage, parities >> at.stage & 1);
      parities ^= 1u << at.stage;
      if (lane == 0) barrier_expect(full + at.stage, kNumBoxes * 128);
      __syncwarp();
      uint4* const line = shared + at.stage * kStageUnits + kInputUnits + (a.tail - segment.line()) * 8;
      for (int i = lane; i < kNumBoxes; i += 32) {
        const Box box(segment, slice, n, i);
        copy_box(line + i * kBoxUnits, a.tail_map, box.piece, a.tail, box.row, box.depth, segment.b, full + at.stage);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    line_gemm_grad_weight(const __grid_constant__ LineGemmArgs a) {
  extern __shared__ __align__(1024) uint4 shared[];
  Barrier* const full = reinterpret_cast<Barrier*>(shared + LG_STAGES * kStageUnits);
  Barrier* const empty = full + LG_STAGES;
  Barrier* const landed = empty + LG_STAGES;  // all but the tail
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < LG_STAGES; ++s) {
      barrier_init(full + s, 1);
      barrier_init(landed + s, 1);
      barrier_init(empty + s, 4 * kConsumers);
    }
    barrier_init_done();
  }
  __syncthreads();

  // 1 locate: the blocks that share positions (slices, input channels) are neighbours and meet in L2.
  const int slice = blockIdx.x % LG_SLICES, block_n = blockIdx.x / LG_SLICES % LG_BLOCKS_N;
  const int share = blockIdx.x / (LG_SLICES * LG_BLOCKS_N);

  if (warp >= 4 * kConsumers) {
    give_registers<kConsumers == 3 ? 80 : 104>();
    if (warp == 4 * kConsumers)
      stage_rows(a, shared, full, empty, landed, slice, block_n, share, lane);
    else if (warp == 4 * kConsumers + 1)
      stage_tails(a, shared, full, landed, slice, share, lane);
  } else {
    take_registers<kConsumers == 3 ? 144 : 200>();
    RingPlace<LG_STAGES> at;
    const int warpgroup = warp / 4;
    float sum[kSets][LG_N / 2];
    // 5 store: the block's partial sum in fragment order: [block][share][set][8 columns][thread][4].
    float4* const partial =
        reinterpret_cast<float4*>(a.partial) +
        (((long long)(blockIdx.x % (LG_SLICES * LG_BLOCKS_N)) * a.shares + share) * kConsumers + warpgroup) *
            (kSets * (LG_N / 8) * 128) +
        threadIdx.x % 128;

    // Operands: 8 lines of 128 bytes repeat, of the input 8 lines of LG_LINE.
    constexpr unsigned kRowHigh = 64u | 1u << 30;
    constexpr unsigned kColumnHigh = LG_LINE / 2u | (LG_LINE == 128 ? 1u : LG_LINE == 64 ? 2u : 3u) << 30;
    const unsigned first_column = operand_word(shared, 1024), first_row = operand_word(shared + kInputUnits, 1024);
    bool first = true;
    int unflushed = 0, accumulate = 0;
    for (unsigned index = share; index < a.segments; index += a.shares) {
      const Segment segment(a, index);
      int behind = -1;  // the stage that the products under way are the last to read
      int window = at.stage;
      for (int n = 0; n < segment.rows + LG_REACH; ++n, at.advance()) {
        barrier_wait(full + at.stage, at.parity);
        if (n < LG_REACH) continue;
        // 3 multiply
        unsigned rows[kSets];
#pragma unroll
        for (int j = 0; j < kSets; ++j) {
          const int set = (slice * kConsumers + warpgroup) * kSets + j;
          int stage = window + lg_set_stage[set];
          if (stage >= LG_STAGES) stage -= LG_STAGES;
          rows[j] = first_row + stage * kStageUnits + lg_set_unit[set];
        }
        const unsigned columns = first_column + at.stage * kStageUnits;
        wgmma_fence();
#pragma unroll 1
        for (int d = 0; d < LG_TD; ++d)
#pragma unroll 1
          for (int w = 0; w < LG_TW; w += 16) {
            const unsigned row_at = d * (LG_STEP_D * LG_ROWS * kBoxUnits) + w * 8;
            const unsigned long long column =
                operand_descriptor(columns + (d * LG_TW + w) * (LG_LINE / 16), kColumnHigh);
#pragma unroll
            for (int j = 0; j < kSets; ++j)
              wgmma_shared(sum[j], operand_descriptor(rows[j] + row_at, kRowHigh), column, accumulate);
            accumulate = 1;
          }
        wgmma_commit();
        wgmma_wait<1>();
        if (behind >= 0 && lane == 0) barrier_arrive(empty + behind);
        behind = window;
        if (++window == LG_STAGES) window = 0;
        if (++unflushed == LG_FLUSH) {
          wgmma_wait<0>();
          flush_sums(partial, sum, first);
          first = false;
          unflushed = accumulate = 0;
        }
      }
      // The window has no next row: all of its stages are free.
      wgmma_wait<0>();
      if (lane == 0)
        for (int i = 0; i <= LG_REACH; ++i) {
          barrier_arrive(empty + behind);
          if (++behind == LG_STAGES) behind = 0;
        }
    }
    if (unflushed > 0 || first) {
      if (!accumulate)
#pragma unroll
        for (int j = 0; j < kSets; ++j)
#pragma unroll
          for (int r = 0; r < LG_N / 2; ++r) sum[j][r] = 0.f;
      flush_sums(partial, sum, first);
    }
  }
}
