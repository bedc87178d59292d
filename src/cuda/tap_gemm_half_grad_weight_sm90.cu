// tap_gemm_half_grad_weight_sm90 — weight gradient of 16-bit layers on Hopper's warpgroup products.
// Computes  grad_weight[ci, co, t] = sum over b, i of input[b, ci, i] * grad_output[b, co, s * i + d * t - p]
// Method    a block owns channel blocks and a slice of taps for a share of the tiles of input positions. Four warps
//           fill a ring of stages, each with the input and the grad_output of a tile as 16-byte units of 8 channels of
//           one position, [channel / 8][position], the columns of grad_output in planes by residue modulo the stride.
//           Position is k: 16 neighbouring units are the columns of a product as they lie (MN-major without swizzle),
//           any tap is a shift by whole units, and ldmatrix turns the same units into the rows of a product. So one
//           staged tile serves all taps. TG_INPUT_ROWS: 64 input channels make the rows, read once for all taps of the
//           warpgroup; otherwise TG_CHANNELS output channels times 64 / TG_CHANNELS taps do, with the input as the
//           columns. Every TG_FLUSH tiles the sums move to the block's partial sum in memory, because the tensor core
//           truncates.
// Refuses   fp32, fp64 (see tap_gemm_half_grad_weight_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "barrier_sm90.cuh"
#include "partial_sums_sm90.cuh"

// Tables of the layer, generated in the prelude; see tap_gemm_grad_weight_sm90.cu. Words are units here.
__constant__ int tg_slice_offset[] = {TG_SLICE_OFFSET};
__constant__ int tg_tap_word[] = {TG_TAP_WORD};
__constant__ int tg_rows_d[] = {TG_ROWS_D};
__constant__ int tg_rows_h[] = {TG_ROWS_H};
__constant__ int tg_residues[] = {TG_RESIDUES};  // of each plane
__constant__ int tg_plane_of[] = {TG_PLANE_OF};  // of each residue modulo the stride; -1: no tap needs it

constexpr int kConsumers = TG_WARPGROUPS;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kTeams = 2, kTeamWarps = 4 / kTeams;
constexpr int kInputPositions = TG_TD * TG_TH * TG_TW;
constexpr int kSteps = kInputPositions / 16;
constexpr int kRowUnits = TG_PLANES * TG_LENGTH;
constexpr int kInputUnits = (TG_INPUT_GROUPS * TG_INPUT_PITCH + 7) / 8 * 8;
constexpr int kStageUnits = (kInputUnits + TG_GRAD_GROUPS * TG_GRAD_PITCH + 7) / 8 * 8;
constexpr int kSets = TG_SETS;  // sums of 64 x TG_N per warpgroup

struct TapGemmArgs {
  const storage_t* input;
  const storage_t* grad_output;
  float* partial;
  int input_d, input_h, input_w;
  int grad_d, grad_h, grad_w;
  int tiles_d, tiles_h, tiles_w;
  int shares;
  long long num_tiles;
  int input_wide, grad_wide;  // contiguous: even columns are 4-byte aligned; channels_last: units are 16-byte aligned
};

// Where a tile lies; blocks walk their tiles in order.
struct Place {
  long long b;
  int d, h, w;  // in tiles
  __device__ __forceinline__ Place(const TapGemmArgs& a, long long tile) {
    const long long per_sample = (long long)a.tiles_d * a.tiles_h * a.tiles_w;
    b = tile / per_sample;
    unsigned rest = tile % per_sample;
    w = rest % a.tiles_w;
    rest /= a.tiles_w;
    h = rest % a.tiles_h, d = rest / a.tiles_h;
  }
  __device__ __forceinline__ void next(const TapGemmArgs& a) {
    if (++w < a.tiles_w) return;
    w = 0;
    if (++h < a.tiles_h) return;
    h = 0;
    if (++d < a.tiles_d) return;
    d = 0;
    ++b;
  }
};

// One operand of this block: what is staged of it, and where a row or a window begins.
struct InputTile {
  static constexpr int kChannels = TCONV_CI, kGroups = TG_INPUT_GROUPS, kPitch = TG_INPUT_PITCH;
  static constexpr int kRows = TG_TD * TG_TH, kStride = 1, kPlanes = 1, kLength = TG_TW, kWindow = TG_TW;
  static constexpr int kOffset = 0;
  const storage_t* tensor;
  long long plane;                      // positions of a channel
  int size_d, size_h, width, channels;  // channels: how many exist from the block's first on
  int wide;
  __device__ __forceinline__ InputTile(const TapGemmArgs& a, int group, int first, int)
      : tensor(a.input + (TCONV_CHANNELS_LAST ? group * TCONV_CI + first : 0)),
        plane((long long)a.input_d * a.input_h * a.input_w),
        size_d(a.input_d),
        size_h(a.input_h),
        width(a.input_w),
        channels(TCONV_CI - first),
        wide(a.input_wide) {
    if (!TCONV_CHANNELS_LAST) tensor += ((long long)group * TCONV_CI + first) * plane;
  }
  // Offset of column 0 of a staged row, or -1 where the row is outside.
  __device__ __forceinline__ long long row_offset(const Place& at, int row) const {
    const int d = at.d * TG_TD + row / TG_TH, h = at.h * TG_TH + row % TG_TH;
    return d < size_d && h < size_h ? ((long long)d * size_h + h) * width : -1;
  }
  __device__ __forceinline__ int first_column(const Place& at) const { return at.w * TG_TW; }
  static __device__ __forceinline__ int residue_of(int) { return 0; }
  static __device__ __forceinline__ int plane_of(int) { return 0; }
};
struct GradTile {
  static constexpr int kChannels = TCONV_CO, kGroups = TG_GRAD_GROUPS, kPitch = TG_GRAD_PITCH;
  static constexpr int kRows = TG_ND * TG_NH, kStride = TCONV_S2, kPlanes = TG_PLANES, kLength = TG_LENGTH,
                       kWindow = TG_LENGTH * TCONV_S2;
  static constexpr int kOffset = kInputUnits;
  const storage_t* tensor;
  long long plane;
  int size_d, size_h, width, channels;
  int wide;
  int offset_d, offset_h;
  __device__ __forceinline__ GradTile(const TapGemmArgs& a, int group, int first, int slice)
      : tensor(a.grad_output + (TCONV_CHANNELS_LAST ? group * TCONV_CO + first : 0)),
        plane((long long)a.grad_d * a.grad_h * a.grad_w),
        size_d(a.grad_d),
        size_h(a.grad_h),
        width(a.grad_w),
        channels(TCONV_CO - first),
        wide(a.grad_wide),
        offset_d(tg_slice_offset[2 * slice]),
        offset_h(tg_slice_offset[2 * slice + 1]) {
    if (!TCONV_CHANNELS_LAST) tensor += ((long long)group * TCONV_CO + first) * plane;
  }
  __device__ __forceinline__ long long row_offset(const Place& at, int row) const {
    const int d = at.d * (TG_TD * TCONV_S0) + offset_d + tg_rows_d[row / TG_NH];
    const int h = at.h * (TG_TH * TCONV_S1) + offset_h + tg_rows_h[row % TG_NH];
    return (unsigned)d < (unsigned)size_d && (unsigned)h < (unsigned)size_h ? ((long long)d * size_h + h) * width : -1;
  }
  __device__ __forceinline__ int first_column(const Place& at) const {
    return (at.w * TG_TW + TG_WINDOW_FIRST) * TCONV_S2;
  }
  static __device__ __forceinline__ int residue_of(int plane) {
    return kPlanes == 1 ? TG_RESIDUE0 : tg_residues[plane];
  }
  static __device__ __forceinline__ int plane_of(int residue) { return kStride == 1 ? 0 : tg_plane_of[residue]; }
};

// 2 load
#if TCONV_CHANNELS_LAST
// Units lie in memory as they are staged. A warp takes a row, its lanes the channels of neighbouring positions; where all
// residues are staged, neighbours go to different planes, otherwise a plane is filled after the other and positions are
// a stride apart. Each unit is fetched as a sector and written alone, and L2 is the limit.
// Through registers, 17 loads of 16 bytes a thread, filling is faster (0.32 instead of 0.35 ms for 3x3 taps of 64 x 64
// channels at 2^21 positions on an H100), but the whole slower (0.43 instead of 0.38), and 2.0 times as slow for 32
// channels.
template <typename Tile>
__device__ __forceinline__ void load_tile(uint4* stage, const Tile& tile, const Place& at, int thread) {
  constexpr int kPixel = Tile::kChannels * TCONV_GROUPS;
  constexpr int kLanes = TG_LANES(Tile::kGroups), kStep = 32 / kLanes;  // a power of two of lanes for the channels
  constexpr bool kTogether = Tile::kPlanes == Tile::kStride && kStep % Tile::kStride == 0;
  constexpr int kTurns = kTogether ? 1 : Tile::kPlanes;
  constexpr int kApart = kTogether ? 1 : Tile::kStride;        // positions of neighbouring lanes
  constexpr int kUnitsApart = kStep * kApart / Tile::kStride;  // units of a lane's neighbouring positions
  constexpr int kColumns = kTogether ? Tile::kWindow : Tile::kLength, kWhole = kColumns / kStep;
  const int lane = thread % 32, first = lane / kLanes, w0 = tile.first_column(at);
  const int own_unit =
      kTogether ? Tile::plane_of(first % Tile::kStride) * Tile::kLength + first / Tile::kStride : first;
  const storage_t* tensor = tile.tensor + at.b * tile.plane * kPixel;
#pragma unroll 1
  for (int row = thread / 32; row < Tile::kRows; row += kTeamWarps) {
    const long long offset = tile.row_offset(at, row);
#pragma unroll 1
    for (int group = lane % kLanes; group < Tile::kGroups; group += kLanes) {
      const bool there = offset >= 0 && group * 8 < tile.channels;
#pragma unroll 1
      for (int turn = 0; turn < kTurns; ++turn) {
        int w = w0 + (kTogether ? 0 : Tile::residue_of(turn)) + first * kApart;
        const storage_t* from = tensor + (offset + w) * kPixel + group * 8;
        uint4* unit =
            stage + Tile::kOffset + group * Tile::kPitch + (row * Tile::kPlanes + turn) * Tile::kLength + own_unit;
        auto one = [&]() {
          const bool inside = there && (unsigned)w < (unsigned)tile.width;
          if (Tile::kChannels % 8 == 0 && tile.wide) {
            copy_async_16(unit, from, inside);
          } else {
            unsigned word[4] = {0, 0, 0, 0};
#pragma unroll
            for (int c = 0; c < 8; ++c)
              if (inside && group * 8 + c < tile.channels) word[c / 2] |= word_of(from[c]) << (c % 2 * 16);
            *unit = make_uint4(word[0], word[1], word[2], word[3]);
          }
          w += kStep * kApart;
          from += kStep * kApart * kPixel;
          unit += kUnitsApart;
        };
#pragma unroll(Tile::kChannels % 8 == 0 ? 8 : 1)
        for (int i = 0; i < kWhole; ++i) one();
        if (first < kColumns - kWhole * kStep) one();
      }
    }
  }
}
#else
// One or two neighbouring elements, or zero. In assembly, because the compiler otherwise works out the addresses of all
// loads of a batch beforehand and spills.
template <int kWide>
__device__ __forceinline__ unsigned load_if(const storage_t* from, bool valid) {
  unsigned word = 0;
  if (kWide == 2) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
                 : "+r"(word)
                 : "l"(from), "r"(static_cast<int>(valid)));
  } else {
    asm volatile(
        "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, %2, 0; mov.b16 h, 0; @p ld.global.nc.b16 h, [%1];\n"
        "cvt.u32.u16 %0, h; }"
        : "+r"(word)
        : "l"(from), "r"(static_cast<int>(valid)));
  }
  return word;
}
// A thread takes kWide neighbouring columns of 8 channels at a time and turns them into kWide units; kTake such lots
// are neighbouring channels, kSpots more columns, so that up to 8 * TG_TAKE loads are under way. Filling takes 0.36 ms
// so for 3x3 taps of 64 x 64 channels at 2^21 positions (H100). cp.async of 16-byte pieces into slots that a warp then
// turns took 0.84: bound by its instructions, and by pieces of a sector that it fetches and writes one by one.
template <typename Tile, int kWide>
struct Columns {
  static constexpr int kTake = Tile::kGroups < TG_TAKE ? Tile::kGroups : TG_TAKE;
  static constexpr int kSpots = TG_TAKE / kTake < 4 ? TG_TAKE / kTake : 4;
  static constexpr int kLots = (Tile::kGroups + kTake - 1) / kTake;
  static constexpr int kColumns = Tile::kWindow / kWide, kPlaces = kColumns * Tile::kRows;
  static constexpr int kBatches = (kPlaces + kSpots - 1) / kSpots;
  unsigned raw[kSpots][kTake][8];

  __device__ __forceinline__ void load(int batch, const Tile& tile, const Place& at) {
    long long plane = tile.plane;
    asm volatile("" : "+l"(plane), "+r"(batch));  // nothing below is worth keeping in registers over the loop
    const int group = batch / kBatches * kTake, w0 = tile.first_column(at);
    const storage_t* const tensor = tile.tensor + (at.b * (TCONV_GROUPS * Tile::kChannels) + group * 8) * plane + w0;
#pragma unroll
    for (int i = 0; i < kSpots; ++i) {
      const int place = i * kBatches + batch % kBatches, column = place % kColumns * kWide, row = place / kColumns;
      const long long offset = kPlaces % kSpots == 0 || place < kPlaces ? tile.row_offset(at, row) : -1;
      const bool inside = offset >= 0 && (unsigned)(w0 + column) < (unsigned)tile.width;
      const storage_t* from = tensor + offset + column;
#pragma unroll
      for (int g = 0; g < kTake; ++g)
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const bool valid = inside && (Tile::kChannels % (Tile::kGroups * 8) == 0 && Tile::kGroups % kTake == 0
                                            ? true
                                            : (group + g) * 8 + c < tile.channels);
          raw[i][g][c] = load_if<kWide>(from, valid);
          from += plane;
        }
    }
  }

  __device__ __forceinline__ void store(int batch, uint4* stage) const {
    asm volatile("" : "+r"(batch));
    const int group = batch / kBatches * kTake;
#pragma unroll
    for (int i = 0; i < kSpots; ++i) {
      const int place = i * kBatches + batch % kBatches, column = place % kColumns * kWide, row = place / kColumns;
      if (kPlaces % kSpots != 0 && place >= kPlaces) break;
      uint4* units = stage + Tile::kOffset + group * Tile::kPitch + row * (Tile::kPlanes * Tile::kLength);
      // Stride 1: a thread's units are neighbours; half of the lanes store the second first, which spreads the banks.
      const int swap = kWide == 2 && Tile::kStride == 1 ? batch / 4 % 2 : 0;
#pragma unroll
      for (int turn = 0; turn < kWide; ++turn) {
        const int e = turn ^ swap;
        const unsigned selector = kWide == 2 && e == 1 ? 0x7632 : 0x5410;
        const int at_plane = Tile::plane_of((column + e) % Tile::kStride);
        if (at_plane < 0) continue;
        uint4* unit = units + at_plane * Tile::kLength + (column + e) / Tile::kStride;
#pragma unroll
        for (int g = 0; g < kTake; ++g)
          if (Tile::kGroups % kTake == 0 || group + g < Tile::kGroups)
            unit[g * Tile::kPitch] = make_uint4(
                __byte_perm(raw[i][g][0], raw[i][g][1], selector), __byte_perm(raw[i][g][2], raw[i][g][3], selector),
                __byte_perm(raw[i][g][4], raw[i][g][5], selector), __byte_perm(raw[i][g][6], raw[i][g][7], selector));
      }
    }
  }
};
template <typename Tile, int kWide>
__device__ __forceinline__ void load_columns(uint4* stage, const Tile& tile, const Place& at, int thread) {
  using Batch = Columns<Tile, kWide>;
  const int batches = Batch::kBatches * min(Batch::kLots, (tile.channels + Batch::kTake * 8 - 1) / (Batch::kTake * 8));
#pragma unroll 1
  for (int batch = thread; batch < batches; batch += 32 * kTeamWarps) {
    Batch one;
    one.load(batch, tile, at);
    one.store(batch, stage);
  }
}
template <typename Tile>
__device__ __forceinline__ void load_tile(uint4* stage, const Tile& tile, const Place& at, int thread) {
  if (Tile::kWindow % 2 == 0 && tile.wide)
    load_columns<Tile, Tile::kWindow % 2 == 0 ? 2 : 1>(stage, tile, at, thread);
  else
    load_columns<Tile, 1>(stage, tile, at, thread);
}
#endif

// Columns of a product: 16 positions from `unit` of shared memory on, TG_N channels in planes of `pitch` units
// (MN-major, no swizzle).
__device__ __forceinline__ unsigned long long units_descriptor(unsigned unit, unsigned pitch) {
  return (unit + (128u >> 4 << 16)) | (static_cast<unsigned long long>(pitch) << 32);
}
// 16 rows of a product from units: each lane names one unit of its matrix of 8 positions by 8 channels.
__device__ __forceinline__ void load_rows(unsigned (&rows)[4], unsigned unit) { load_turned_matrices(unit * 16, rows); }

// Three warpgroups that multiply have 128 registers a thread like the warps that fill, of which sums take up to 96 and
// loads under way 64; channels_last fills without registers and gives 24 away. Two have 192 for sums up to 130.
template <bool kMultiplies>
__device__ __forceinline__ void move_registers() {
#if TG_WARPGROUPS == 2
  kMultiplies ? take_registers<192>() : give_registers<120>();
#elif TCONV_CHANNELS_LAST
  kMultiplies ? take_registers<136>() : give_registers<104>();
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) tap_gemm_half_grad_weight(const TapGemmArgs a) {
  extern __shared__ __align__(128) uint4 shared[];
  unsigned long long* const full = reinterpret_cast<unsigned long long*>(shared + TG_STAGES * kStageUnits);
  unsigned long long* const empty = full + TG_STAGES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < TG_STAGES; ++s) {
      // Every thread arrives: racecheck sees no order through one lane behind a warp's barrier.
      barrier_init(full + s, 32 * kTeamWarps);
      barrier_init(empty + s, 128 * kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // 1 locate: the blocks that share a tile of positions (slices, channel blocks) are neighbours and meet in L2.
  unsigned index = blockIdx.x;
  const int slice = index % TG_SLICES;
  index /= TG_SLICES;
  const int block_n = index % TG_BLOCKS_N;
  index /= TG_BLOCKS_N;
  const int block_m = index % TG_BLOCKS_M;
  index /= TG_BLOCKS_M;
  const int group = index % TCONV_GROUPS;
  const int share = index / TCONV_GROUPS;
  const long long tile_begin = a.num_tiles * share / a.shares, tile_end = a.num_tiles * (share + 1) / a.shares;

  if (warpgroup == kConsumers) {
    move_registers<false>();
    const InputTile input(a, group, (TG_INPUT_ROWS ? block_m : block_n) * (TG_INPUT_GROUPS * 8), slice);
    const GradTile grad(a, group, (TG_INPUT_ROWS ? block_n : block_m) * (TG_GRAD_GROUPS * 8), slice);
    // Two teams of warps fill every other tile, so that one waits for memory while the other issues.
    const int team = warp / kTeamWarps, thread = threadIdx.x % (32 * kTeamWarps);
    int slot = team, parity = 1;
    Place at(a, tile_begin + team);
    for (long long tile = tile_begin + team; tile < tile_end; tile += kTeams) {
      uint4* const stage = shared + slot * kStageUnits;
      barrier_wait(empty + slot, parity);
      load_tile(stage, input, at, thread);
      load_tile(stage, grad, at, thread);
      for (int i = 0; i < kTeams; ++i) at.next(a);
      if (TCONV_CHANNELS_LAST) {
        copy_async_commit();
        copy_async_wait<0>();
      }
      fence_shared_for_wgmma();
      barrier_arrive(full + slot);
      slot += kTeams;
      if (slot >= TG_STAGES) {
        slot -= TG_STAGES;
        parity ^= 1;
      }
    }
  } else {
    move_registers<true>();
    float sum[kSets][TG_N / 2];
    auto clear = [&]() {
#pragma unroll
      for (int j = 0; j < kSets; ++j)
#pragma unroll
        for (int r = 0; r < TG_N / 2; ++r) sum[j][r] = 0.f;
    };
    clear();

    // 5 store: the block's partial sum in fragment order: [block][share][set][8 columns][thread][4].
    const int block = ((group * TG_BLOCKS_M + block_m) * TG_BLOCKS_N + block_n) * TG_SLICES + slice;
    float4* const partial =
        reinterpret_cast<float4*>(a.partial) +
        (((long long)block * a.shares + share) * kConsumers + warpgroup) * (kSets * (TG_N / 8) * 128) +
        threadIdx.x % 128;

    // Which unit of a step a lane names to ldmatrix: matrices 0, 1 are the lower and upper 8 rows of positions 0 to 7,
    // matrices 2, 3 of positions 8 to 15.
    const int row8 = warp * 2 + lane / 8 % 2, position = lane / 16 * 8 + lane % 8;
#if TG_INPUT_ROWS
    const int m = warpgroup / TG_TAP_PARTS, first_set = warpgroup % TG_TAP_PARTS * kSets;
    const int row_word = min(m * 8 + row8, TG_INPUT_GROUPS - 1) * TG_INPUT_PITCH + position;
    int column_word[kSets];
#pragma unroll
    for (int j = 0; j < kSets; ++j) column_word[j] = tg_tap_word[slice * TG_TAPS + first_set + j];
#else
    constexpr int kTapRows = 64 / TG_CHANNELS;
    int row_word[kSets];
#pragma unroll
    for (int j = 0; j < kSets; ++j) {
      const int tap = (warpgroup * kSets + j) * kTapRows + row8 / (TG_CHANNELS / 8);
      row_word[j] = min(row8 % (TG_CHANNELS / 8), TG_GRAD_GROUPS - 1) * TG_GRAD_PITCH + position +
                    tg_tap_word[slice * TG_TAPS + tap];
    }
#endif

    const unsigned first_unit = shared_address(shared) / 16;
    int stage = 0, parity = 0, unflushed = 0, left = static_cast<int>(tile_end - tile_begin);
    bool first = true;
    for (; left > 0; --left) {
      const unsigned input = first_unit + stage * kStageUnits, grad = input + kInputUnits;
      barrier_wait(full + stage, parity);

      // 3 multiply
#if TG_INPUT_ROWS
      unsigned rows[2][1][4];
#else
      unsigned rows[2][kSets][4];
#endif
      auto multiply = [&](int step, unsigned (&current)[TG_INPUT_ROWS ? 1 : kSets][4]) {
        const int row = step * 16 / TG_TW;
        const unsigned grad_row = grad + (row / TG_TH) * (TG_STEP_D * TG_NH * kRowUnits) +
                                  (row % TG_TH) * (TG_STEP_H * kRowUnits) + step * 16 % TG_TW;
#if TG_INPUT_ROWS
        load_rows(current[0], input + step * 16 + row_word);
        const unsigned long long columns = units_descriptor(grad_row, TG_GRAD_PITCH);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kSets; ++j) wgmma_step(sum[j], current[0], columns + column_word[j]);
#else
#pragma unroll
        for (int j = 0; j < kSets; ++j) load_rows(current[j], grad_row + row_word[j]);
        const unsigned long long columns = units_descriptor(input + step * 16, TG_INPUT_PITCH);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kSets; ++j) wgmma_step(sum[j], current[j], columns);
#endif
        wgmma_commit();
        wgmma_wait<1>();  // the step before has left the other rows
      };
#pragma unroll 1
      for (int step = 0; step < kSteps; step += 2) {
        multiply(step, rows[0]);
        multiply(step + 1, rows[1]);
      }
      wgmma_wait<0>();
      barrier_arrive(empty + stage);
      if (++stage == TG_STAGES) {
        stage = 0;
        parity ^= 1;
      }
      if (++unflushed == TG_FLUSH || left == 1) {
        flush_sums(partial, sum, first);
        clear();
        first = false;
        unflushed = 0;
      }
    }
    if (first) flush_sums(partial, sum, true);  // no tile: zeros
  }
}
