// box_gemm_grad_weight_sm90 — weight gradient as one product of boxes that the copy engine stages (sm_90a).
// Computes  partial[ci, (t, co)] = sum over positions i of input[ci, i] * grad_output[co, s i + d t - p]
// Method    one side of the product has the input channels as pieces of 64, the other the taps times output channels. A
//           warp copies, tile of positions by tile, one box per piece into a ring of stages; warpgroups multiply
//           BW_ROWS row pieces with BW_COLUMNS column pieces, both read from shared memory. 16-bit channels_last tensors
//           are read as they are, channels innermost, with boxes that step over positions where there is a stride; all
//           others from copies that box_gemm_pack_sm90 makes, in which a tap is a shift. Positions are shared out over
//           blocks; tap_gemm_finish or box_gemm_finish_sm90 adds the partial sums.
// Refuses   fp64, fp32 without TF32, copies of more than 256 MiB (see box_gemm_grad_weight_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "partial_sums_sm90.cuh"
#include "ring_sm90.cuh"

struct BoxGemmArgs {
  TensorMap input_map, grad_map;
  const storage_t* input;
  const storage_t* grad_output;
  void* partial;
  int input_size[3], grad_size[3];  // depth, height, width
  int batch, tensor;                // tensor: the copy engine can take both
  int tiles[3];
  int shares;
  long long num_tiles;
};

// One warp loads. Where two warpgroups multiply it has a warpgroup to itself, of which they take the registers: sums of 64
// x 256 need 128 a thread, and nine warps count as twelve, so 168 is all there is without.
constexpr int kWarpgroups = BW_WARPGROUPS, kThreads = BW_THREADS;
constexpr int kOwn = BW_ROWS / kWarpgroups;  // row pieces of a warpgroup
constexpr int kColumns = BW_N * BW_COLUMNS;  // of a product
constexpr int kPositions = BW_POSITIONS;  // of a tile: four steps of 32 bytes (positions innermost) or of 16 positions
constexpr int kRowUnits = 512;            // of 16 bytes, of a row piece
constexpr int kColumnUnits = BW_POSITIONS_INNER ? BW_N * 8 : kPositions * (BW_LINE / 16);
constexpr int kStageUnits = BW_ROWS * kRowUnits + BW_COLUMNS * kColumnUnits;
constexpr int kInputPieces = BW_INPUT_ROWS ? BW_ROWS : BW_COLUMNS, kGradPieces = BW_INPUT_ROWS ? BW_COLUMNS : BW_ROWS;
constexpr int kInputChannels = BW_INPUT_ROWS ? 64 : BW_N, kGradChannels = BW_INPUT_ROWS ? BW_N : 64;  // of a piece
constexpr int kInputUnits = BW_INPUT_ROWS ? kRowUnits : kColumnUnits;
constexpr int kGradUnits = BW_INPUT_ROWS ? kColumnUnits : kRowUnits;

// Per outer tap. From tensors: its offsets in width, height, depth; from copies: first channel and shift.
__constant__ int bw_outer[] = {BW_OUTER};

struct Place {
  int w, h, d, b;
  __device__ __forceinline__ Place(const BoxGemmArgs& a, long long tile) {
    w = static_cast<int>(tile % a.tiles[2]) * BW_TW;
    tile /= a.tiles[2];
    h = static_cast<int>(tile % a.tiles[1]) * BW_TH;
    tile /= a.tiles[1];
    d = static_cast<int>(tile % a.tiles[0]) * BW_TD;
    b = static_cast<int>(tile / a.tiles[0]) * BW_TB;
  }
};

#if !BW_PACKED
// A tensor that the copy engine cannot take (its first element is not on a 16-byte boundary), unit by unit, where the
// engine would put them. Slow, and rare.
template <int kLine>
__device__ __forceinline__ void gather_piece(uint4* to, const storage_t* from, const int (&size)[3], int batch,
                                             int all_channels, int channel, const Place& at, const int (&step)[3],
                                             int lane) {
  constexpr int kUnits = kLine / 16;
  for (int i = lane; i < kPositions * kUnits; i += 32) {
    const int p = i / kUnits, u = i % kUnits;
    const int w = at.w + p % BW_TW * step[2], h = at.h + p / BW_TW % BW_TH * step[1];
    const int d = at.d + p / (BW_TW * BW_TH) % BW_TD * step[0], b = at.b + p / (BW_TW * BW_TH * BW_TD);
    const bool inside = (unsigned)w < (unsigned)size[2] && (unsigned)h < (unsigned)size[1] &&
                        (unsigned)d < (unsigned)size[0] && b < batch;
    const storage_t* position =
        from + (((static_cast<long long>(b) * size[0] + d) * size[1] + h) * size[2] + w) * all_channels;
    storage_t unit[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = channel + u * 8 + e;
      unit[e] = inside && c < all_channels ? position[c] : storage_t();
    }
    to[p * kUnits + (u ^ (p * kUnits / 8 & (kUnits - 1)))] = unit_of(unit);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1) box_gemm_grad_weight(const __grid_constant__ BoxGemmArgs a) {
  extern __shared__ __align__(1024) uint4 shared[];
  Barrier* const full = reinterpret_cast<Barrier*>(shared + BW_STAGES * kStageUnits);
  Barrier* const empty = full + BW_STAGES;
  const int lane = threadIdx.x % 32, warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < BW_STAGES; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 4 * kWarpgroups);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_kernel_before();  // packs

  // 1 locate: the blocks that share positions are neighbours and meet in L2.
  constexpr int kBlocks = TCONV_GROUPS * BW_BLOCKS_M * BW_BLOCKS_N;
  const int block = blockIdx.x % kBlocks, share = blockIdx.x / kBlocks;
  const int block_n = block % BW_BLOCKS_N, block_m = block / BW_BLOCKS_N % BW_BLOCKS_M;
  const int group = block / (BW_BLOCKS_N * BW_BLOCKS_M);
  const long long tile_begin = a.num_tiles * share / a.shares, tile_end = a.num_tiles * (share + 1) / a.shares;
  RingPlace<BW_STAGES> at;

  if (warpgroup == kWarpgroups) {
    // 2 load
    if (kWarpgroups == 2) give_registers<40>();
    if (threadIdx.x >= kWarpgroups * 128 + 32) return;
    const int input_piece = (BW_INPUT_ROWS ? block_m : block_n) * kInputPieces;
    const int grad_piece = (BW_INPUT_ROWS ? block_n : block_m) * kGradPieces;
    for (long long tile = tile_begin; tile < tile_end; ++tile) {
      barrier_wait(empty + at.stage, at.parity ^ 1);
      uint4* const stage = shared + at.stage * kStageUnits;
      uint4* const input_to = stage + (BW_INPUT_ROWS ? 0 : BW_ROWS * kRowUnits);
      uint4* const grad_to = stage + (BW_INPUT_ROWS ? BW_ROWS * kRowUnits : 0);
      const Place place(a, tile);
      const int k = static_cast<int>(tile) * kPositions;
      if (lane == 0 && a.tensor) barrier_expect(full + at.stage, kStageUnits * 16);
#pragma unroll 1
      for (int i = 0; i < kInputPieces; ++i) {
        const int channel = group * BW_INPUT_PITCH + (input_piece + i) * kInputChannels;
        uint4* const to = input_to + i * kInputUnits;
#if BW_PACKED
        if (lane == 0)
          copy_box(to, a.input_map, BW_POSITIONS_INNER ? k : channel, BW_POSITIONS_INNER ? channel : k, 0, 0, 0,
                   full + at.stage);
#else
        if (a.tensor) {
          if (lane == 0) copy_box(to, a.input_map, channel, place.w, place.h, place.d, place.b, full + at.stage);
        } else {
          gather_piece<BW_INPUT_ROWS ? 128 : BW_LINE>(to, a.input, a.input_size, a.batch, TCONV_GROUPS * TCONV_CI,
                                                      channel, place, {1, 1, 1}, lane);
        }
#endif
      }
#pragma unroll 1
      for (int i = 0; i < kGradPieces; ++i) {
        // Pieces behind the last repeat it; tap_gemm_finish leaves them out.
        const int piece = min(grad_piece + i, BW_NUM_OUTER * BW_TAP_PIECES - 1), outer = piece / BW_TAP_PIECES;
        const int channel = group * BW_GRAD_PITCH + piece % BW_TAP_PIECES * kGradChannels;
        uint4* const to = grad_to + i * kGradUnits;
#if BW_PACKED
        const int first = channel + bw_outer[outer * 2], shifted = k + bw_outer[outer * 2 + 1];
        if (lane == 0)
          copy_box(to, a.grad_map, BW_POSITIONS_INNER ? shifted : first, BW_POSITIONS_INNER ? first : shifted, 0, 0, 0,
                   full + at.stage);
#else
        Place from = place;
        from.w = place.w * TCONV_S2 + bw_outer[outer * 3], from.h = place.h * TCONV_S1 + bw_outer[outer * 3 + 1];
        from.d = place.d * TCONV_S0 + bw_outer[outer * 3 + 2];
        if (a.tensor) {
          if (lane == 0) copy_box(to, a.grad_map, channel, from.w, from.h, from.d, from.b, full + at.stage);
        } else {
          gather_piece<BW_INPUT_ROWS ? BW_LINE : 128>(to, a.grad_output, a.grad_size, a.batch, TCONV_GROUPS * TCONV_CO,
                                                      channel, from, {TCONV_S0, TCONV_S1, TCONV_S2}, lane);
        }
#endif
      }
#if !BW_PACKED
      if (!a.tensor) {
        fence_shared_for_wgmma();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + at.stage);
      }
#endif
      at.advance();
    }
  } else {
    if (kWarpgroups == 2) take_registers<232>();
    float sum[kOwn][kColumns / 2];
    // 5 store: the block's partial sum in fragment order: [block][share][row piece][8 columns][thread][4].
    float4* const partial =
        reinterpret_cast<float4*>(a.partial) +
        (((long long)block * a.shares + share) * BW_ROWS + warpgroup * kOwn) * (kColumns / 8 * 128) + threadIdx.x % 128;

    // Operands. Positions innermost: 8 rows of 128 bytes repeat. Channels innermost: 8 positions of a line repeat, and
    // column pieces are kColumnUnits apart.
    constexpr unsigned kCode = BW_POSITIONS_INNER ? 1 : BW_LINE == 128 ? 1 : BW_LINE == 64 ? 2 : 3;
    constexpr unsigned kRowHigh = 64u | 1u << 30;
    constexpr unsigned kColumnHigh = (BW_POSITIONS_INNER ? 64u : BW_LINE / 2u) | kCode << 30;
    constexpr unsigned kRowStep = BW_POSITIONS_INNER ? 2 : 128, kColumnStep = BW_POSITIONS_INNER ? 2 : BW_LINE;
    const unsigned first_row = operand_word(shared + warpgroup * kOwn * kRowUnits, kRowUnits * 16);
    const unsigned first_column = operand_word(shared + BW_ROWS * kRowUnits, kColumnUnits * 16);
    bool first = true;
    int previous = -1;
    for (long long left = tile_end - tile_begin; left > 0;) {
      const int count = static_cast<int>(left < BW_FLUSH ? left : BW_FLUSH);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        barrier_wait(full + at.stage, at.parity);
        // 3 multiply
        const unsigned rows = first_row + at.stage * kStageUnits, columns = first_column + at.stage * kStageUnits;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
          for (int j = 0; j < kOwn; ++j)
            wgmma_shared(sum[j], operand_descriptor(rows + j * kRowUnits + step * kRowStep, kRowHigh),
                         operand_descriptor(columns + step * kColumnStep, kColumnHigh), step > 0 || i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0 && lane == 0) barrier_arrive(empty + previous);
        previous = at.stage;
        at.advance();
      }
      wgmma_wait<0>();
      flush_sums(partial, sum, first);
      first = false;
      left -= count;
    }
  }
}
