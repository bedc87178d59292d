// ring_gemm_grad_weight_sm90 — weight gradient on Hopper's warpgroup products, fed row by row through a ring.
// Computes  grad_weight[ci, co, t] = sum over b, i of input[b, ci, i] * grad_output[b, co, s * i + d * t - p]
// Method    A block walks down strips of RW_TILE columns, one row of the input a step. Row j of grad_output (in strides)
//           meets the rows j - e of the input, one for every tap along the height, so the last rows of the input stay in
//           the ring and nothing is staged twice along the height.
//             load      4 warps copy the next row of the input and the RW_CLASSES rows of grad_output that start in its
//                       stride, several steps ahead, and round the input to TF32 where it lies
//             multiply  2 or 3 warpgroups. Rows of a product: 64 (tap of depth and width, output channel) pairs, read at
//                       any shift or stride from grad_output into registers and rounded there; columns: RW_N input
//                       channels as 16-byte units of 4 positions. One set of rows serves all taps along the height: a
//                       product reads its columns at half of what shared memory delivers, rows read anew for each tap
//                       would take the other half.
//           Rows of grad_output may begin anywhere in 16 bytes: they are staged with their phase, which the reader adds.
//           Every RW_FLUSH rows the sums move to the block's partial sum in memory, because the tensor core truncates
//           when it adds to a large sum.
// Refuses   fp32 accuracy, fp64, 16-bit types, channels_last (see ring_gemm_grad_weight_sm90.cpp)
// Reads as  1 locate · 2 load · 3 multiply · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "ring_sm90.cuh"
#include "stage_sm90.cuh"

// Per slice of taps. A step's row of grad_output is (row + first) * stride + residue of the class; a tap along the height
// reads the input `back` rows above the newest one.
__constant__ int rw_first[] = {RW_FIRST};
__constant__ int rw_residue[] = {RW_RESIDUE};      // [slice][class]
__constant__ int rw_back[] = {RW_BACK};            // [slice][tap along the height, by class]
__constant__ int rw_depth[] = {RW_DEPTH};          // [slice][staged depth]: offset
__constant__ int rw_column[] = {RW_COLUMN};        // offset of the first staged column
__constant__ int rw_tap_word[] = {RW_TAP_WORD};    // [slice][tap of the rows]: where its first position lies
__constant__ int rw_tap_depth[] = {RW_TAP_DEPTH};  // [slice][tap of the rows]: staged depth

constexpr int kConsumers = 128 * RW_WARPGROUPS, kLoaders = 128, kThreads = kConsumers + kLoaders;
constexpr int kUnitPitch = RW_N + 1;  // units of 4 positions: an odd pitch spreads a row's units over the banks
constexpr int kInputUnits = RW_TILE / 4 * kUnitPitch;
constexpr int kInputSlots = RW_STAGES + RW_SPAN;
constexpr int kClassWords =
    RW_M * RW_PITCH;  // = 4 mod 8 a channel: 8 channels x 4 positions hit 32 banks at odd strides
constexpr int kGradWords = RW_DEPTHS * RW_CLASSES * kClassWords;
constexpr int kTapRows = 64 / RW_CHANNELS;               // taps side by side in the rows of a product
constexpr int kLag = RW_STAGES > 2 ? RW_STAGES - 2 : 1;  // steps whose copies are under way
constexpr int kSteps = RW_TILE / 8;
// Products that a warpgroup has under way, each with rows of its own: 2 or 4. Where four steps leave no loop, with several
// sets of rows, or with few sums, four make the compiler wait for every single product.
constexpr int kUnderWay = RW_UNDER_WAY;
static_assert(kSteps % kUnderWay == 0);

struct RingGradArgs {
  const float* input;
  const float* grad_output;
  float* partial;
  // Elements between neighbours: images, depths, rows, channels. Without height and depth, images are the rows.
  long long input_image, input_slab, input_row, input_channel;
  long long grad_image, grad_slab, grad_row, grad_channel;
  int input_d, input_h, input_w;
  int grad_d, grad_h, grad_w;
  int strips, shares, item_steps;  // strips of a row; rows of an item with those beyond the last that taps reach
  long long steps;                 // of all items: images, depths, strips
};

// 1 locate: the steps of a share; both roles count them alike. Behind each start the rows that the first step needs come
// first, without products (`warm` of them are left).
struct Walk {
  long long left, b;
  int row, warm, strip, d;

  __device__ __forceinline__ Walk(const RingGradArgs& a, int share) {
    const long long begin = a.steps * share / a.shares;
    left = a.steps * (share + 1) / a.shares - begin;
    row = static_cast<int>(begin % a.item_steps);
    warm = RW_SPAN;
    const long long item = begin / a.item_steps;
    strip = static_cast<int>(item % a.strips);
    d = static_cast<int>(item / a.strips % a.input_d);
    b = item / a.strips / a.input_d;
  }
  __device__ __forceinline__ void next(const RingGradArgs& a) {
    if (warm > 0) {
      --warm;
      return;
    }
    --left;
    if (++row < a.item_steps) return;
    row = 0;
    warm = RW_SPAN;
    if (++strip < a.strips) return;
    strip = 0;
    if (++d < a.input_d) return;
    d = 0;
    ++b;
  }
};

// The blocks that share rows (slices, channel blocks) are neighbours and meet in L2.
struct Block {
  int slice, block_n, block_m, group, share;

  __device__ __forceinline__ Block() {
    unsigned index = blockIdx.x;
    asm volatile("" : "+r"(index));  // each role works this out for itself: kept for both, it spilled
    slice = index % RW_SLICES;
    index /= RW_SLICES;
    block_n = index % RW_BLOCKS_N;
    index /= RW_BLOCKS_N;
    block_m = index % RW_BLOCKS_M;
    index /= RW_BLOCKS_M;
    group = index % TCONV_GROUPS;
    share = index / TCONV_GROUPS;
  }
};

// ------------------------------------------------------------------------------------------------------------- 2 load

// One thread copies pieces of a row that lie kLanes apart, of channels that lie kLoaders / kLanes apart: addresses are
// worked out once per channel. With divisions for every piece a warp that loads had 1470 instructions a step and a step
// took 5000 cycles on an H100 (64 x 64 channels, 3x3), where its products alone need 2300.
//
// A row of the input, in pieces of 16, 8 or 4 bytes; a thread rounds later what it copies here. Columns behind the row's end and
// rows outside the input are zeros; channels that do not exist stay as they are, their sums are dropped.
struct InputPieces {
  static constexpr int kBytes = RW_COPY_BYTES, kPer = kBytes / 4, kAcross = RW_TILE / kPer,
                       kLanes = kAcross < kLoaders ? kAcross : kLoaders;
  static constexpr int kApart = kLoaders / kLanes;  // channels
  static constexpr int kTurns = (RW_N + kApart - 1) / kApart;
  int q, c, channels;

  __device__ __forceinline__ InputPieces(const Block& block, int thread)
      : q(thread % kLanes * kPer), c(thread / kLanes), channels(min(RW_N, TCONV_CI - block.block_n * RW_N)) {}
  __device__ __forceinline__ unsigned* word(unsigned* slot) const {
    return slot + (q / 4 * kUnitPitch + c) * 4 + q % 4;
  }
  __device__ __forceinline__ bool exists(int turn) const {
    return (TCONV_CI % RW_N == 0 && RW_N % kApart == 0) || c + turn * kApart < channels;
  }

  __device__ __forceinline__ void load(const RingGradArgs& a, const Block& block, const Walk& at,
                                       unsigned* slot) const {
    const int h = at.row - at.warm, q0 = at.strip * RW_TILE + q;
    const bool valid = (unsigned)h < (unsigned)a.input_h && q0 < a.input_w;
    const float* from = valid ? a.input + at.b * a.input_image + at.d * a.input_slab + h * a.input_row + q0 +
                                    (long long)(block.group * TCONV_CI + block.block_n * RW_N + c) * a.input_channel
                              : a.input;
    const long long apart = valid ? kApart * a.input_channel : 0;
    const int bytes = valid ? kBytes : 0;
    unsigned* const to = word(slot);
#pragma unroll(kTurns <= 8 ? kTurns : 4)
    for (int turn = 0; turn < kTurns; ++turn) {
      if (!exists(turn)) break;
      copy_part<kBytes>(to + turn * (kApart * 4), from, bytes);
      from += apart;
    }
  }
  __device__ __forceinline__ void round(unsigned* slot) const {
    constexpr int kAtOnce = kTurns < 4 ? kTurns : 4;  // read before the first is written
    unsigned* const first = word(slot);
#pragma unroll(kTurns <= 8 ? kTurns : 1)
    for (int turn0 = 0; turn0 < kTurns; turn0 += kAtOnce) {
      Pack<unsigned, kPer> pieces[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (turn0 + i < kTurns && exists(turn0 + i))
          pieces[i] = *reinterpret_cast<Pack<unsigned, kPer>*>(first + (turn0 + i) * (kApart * 4));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (turn0 + i < kTurns && exists(turn0 + i)) {
#pragma unroll
          for (int e = 0; e < kPer; ++e) pieces[i].item[e] = nearest_tf32(pieces[i].item[e]);
          *reinterpret_cast<Pack<unsigned, kPer>*>(first + (turn0 + i) * (kApart * 4)) = pieces[i];
        }
    }
  }
};

// The rows of grad_output of a step, whole 16-byte vectors of memory: a row's first column lies 0 to 3 words behind the
// start. What a vector would hold outside its row becomes zero and is not read.
struct GradPieces {
  static constexpr int kLanes = RW_M >= 16 ? 8 : 16, kApart = kLoaders / kLanes;
  static constexpr int kTurns = (RW_M + kApart - 1) / kApart, kAlong = (RW_VECTORS + kLanes - 1) / kLanes;
  int v, c, channels, first_column;

  __device__ __forceinline__ GradPieces(const Block& block, int thread)
      : v(thread % kLanes),
        c(thread / kLanes),
        channels(min(RW_M, TCONV_CO - block.block_m * RW_M)),
        first_column(rw_column[block.slice]) {}

  // width: of the row, 0 where the row lies outside.
  template <bool kInterior>
  __device__ __forceinline__ void load_row(const RingGradArgs& a, const float* from, int width, int column0,
                                           unsigned* to) const {
    const long long apart = kApart * a.grad_channel;
#pragma unroll(kInterior&& kTurns <= 8 ? kTurns : 1)
    for (int turn = 0; turn < kTurns; ++turn) {
      if ((TCONV_CO % RW_M != 0 || RW_M % kApart != 0) && c + turn * kApart >= channels) break;
      const int phase = static_cast<int>(reinterpret_cast<unsigned long long>(from) / 4) & 3;
      const float* const vector = from - phase;
      unsigned* const target = to + turn * (kApart * RW_PITCH);
#pragma unroll(kAlong <= 8 ? kAlong : 1)
      for (int i = 0; i < kAlong; ++i) {
        if ((i + 1) * kLanes > RW_VECTORS && v + i * kLanes >= RW_VECTORS) break;
        const int column = column0 - phase + i * (4 * kLanes);
        const int bytes = kInterior ? 16 : column >= 0 ? max(0, min(16, (width - column) * 4)) : 0;
        if (kInterior || column >= 0 || column <= -4)
          copy_part<16>(target + i * (4 * kLanes), vector + i * (4 * kLanes), bytes);
      }
      if (!kInterior && column0 < 4) {  // a vector that begins before its row
#pragma unroll 1
        for (int i = 0; i < kAlong; ++i) {
          const int column = column0 - phase + i * (4 * kLanes);
          if (column >= 0) break;
          if (column <= -4 || v + i * kLanes >= RW_VECTORS) continue;
#pragma unroll
          for (int e = 0; e < 4; ++e)
            copy_part<4>(target + i * (4 * kLanes) + e, vector + i * (4 * kLanes) + e,
                         column + e >= 0 && column + e < width ? 4 : 0);
        }
      }
      from += apart;
    }
  }

  __device__ __forceinline__ void load(const RingGradArgs& a, const Block& block, const Walk& at,
                                       unsigned* slot) const {
    const int column0 = at.strip * RW_TILE * TCONV_S2 + first_column;
    const float* const tensor = a.grad_output + at.b * a.grad_image + column0 + 4 * v +
                                (long long)(block.group * TCONV_CO + block.block_m * RW_M + c) * a.grad_channel;
    const bool columns_inside = column0 >= 3 && column0 + 4 * RW_VECTORS <= a.grad_w;
#pragma unroll 1
    for (int rows = 0; rows < RW_DEPTHS * RW_CLASSES; ++rows) {
      const int d = at.d * TCONV_S0 + rw_depth[block.slice * RW_DEPTHS + rows / RW_CLASSES];
      const int h =
          (at.row + rw_first[block.slice]) * TCONV_S1 + rw_residue[block.slice * RW_CLASSES + rows % RW_CLASSES];
      const bool inside = (unsigned)d < (unsigned)a.grad_d && (unsigned)h < (unsigned)a.grad_h;
      const float* const from = tensor + d * a.grad_slab + h * a.grad_row;
      unsigned* const to = slot + rows * kClassWords + c * RW_PITCH + 4 * v;
      if (inside && columns_inside)
        load_row<true>(a, from, a.grad_w, column0 + 4 * v, to);
      else
        load_row<false>(a, from, inside ? a.grad_w : 0, column0 + 4 * v, to);
    }
  }
};

__device__ __forceinline__ void load_steps(const RingGradArgs& a, const Block& block, uint4* inputs, unsigned* grads,
                                           Barrier* full, Barrier* empty, int thread) {
  const InputPieces input(block, thread);
  const GradPieces grad(block, thread);
  RingPlace<RW_STAGES> at, behind;
  RingPlace<kInputSlots> input_at, input_behind;
  int filled = 0;
  auto hand_over = [&]() {
    input.round(reinterpret_cast<unsigned*>(inputs + input_behind.stage * kInputUnits));
    barrier_arrive(full + behind.stage);
    behind.advance();
    input_behind.advance();
  };
  for (Walk walk(a, block.share); walk.left > 0; walk.next(a)) {
    barrier_wait(empty + at.stage, at.parity ^ 1);
    input.load(a, block, walk, reinterpret_cast<unsigned*>(inputs + input_at.stage * kInputUnits));
    if (walk.warm == 0) grad.load(a, block, walk, grads + at.stage * kGradWords);
    copy_async_commit();
    at.advance();
    input_at.advance();
    if (++filled > kLag) {
      copy_async_wait<kLag>();
      hand_over();
    }
  }
  copy_async_wait<0>();
  for (int left = min(filled, kLag); left > 0; --left) hand_over();
}

// --------------------------------------------------------------------------------------------------------- the block

// Three warpgroups have 128 registers a thread like the warps that load, of which sums take up to 96; two have 168 for
// sums up to 144. Loading needs fewer.
template <bool kMultiplies>
__device__ __forceinline__ void move_registers() {
#if RW_WARPGROUPS == 2
  kMultiplies ? take_registers<208>() : give_registers<88>();
#else
  kMultiplies ? take_registers<152>() : give_registers<56>();
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) ring_gemm_grad_weight(const RingGradArgs a) {
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ Barrier full[RW_STAGES], empty[RW_STAGES];
  uint4* const inputs = shared;
  unsigned* const grads = reinterpret_cast<unsigned*>(shared + kInputSlots * kInputUnits);
  if (threadIdx.x == 0) {
    for (int s = 0; s < RW_STAGES; ++s) {
      barrier_init(full + s, kLoaders);
      barrier_init(empty + s, 128 * RW_WARPGROUPS);
    }
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    move_registers<false>();
    const Block block;
    const int thread = threadIdx.x - kConsumers;
    load_steps(a, block, inputs, grads, full, empty, thread);
  } else {
    move_registers<true>();
    const Block block;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
    const int quad = lane / 4, quarter = lane % 4;
    float sum[RW_OWN][RW_TAPS_H][RW_N / 2];
    auto clear = [&]() {
#pragma unroll
      for (int own = 0; own < RW_OWN; ++own)
#pragma unroll
        for (int k = 0; k < RW_TAPS_H; ++k)
#pragma unroll
          for (int r = 0; r < RW_N / 2; ++r) sum[own][k][r] = 0.f;
    };
    clear();

    // 5 store: the block's partial sum in fragment order: [block][share][set][8 columns][thread][4]. 64 rows of output
    // channels are one block there.
    auto flush = [&](bool first) {
#pragma unroll
      for (int own = 0; own < RW_OWN; ++own) {
        const int m = (warpgroup * RW_OWN + own) / RW_SETS, set = (warpgroup * RW_OWN + own) % RW_SETS;
        const long long at =
            ((block.group * RW_BLOCKS_M + block.block_m) * RW_M_BLOCKS + m) * RW_BLOCKS_N + block.block_n;
        float4* const partial =
            reinterpret_cast<float4*>(a.partial) +
            ((at * RW_SLICES + block.slice) * a.shares + block.share) * (RW_SETS * RW_TAPS_H * (RW_N / 8) * 128) +
            set * (RW_TAPS_H * (RW_N / 8) * 128) + threadIdx.x % 128;
        constexpr int kAll = RW_N / 8, kAtOnce = kAll % 4 == 0 ? 4 : kAll % 3 == 0 ? 3 : kAll % 2 == 0 ? 2 : 1;
#pragma unroll
        for (int k = 0; k < RW_TAPS_H; ++k)
#pragma unroll
          for (int n8 = 0; n8 < kAll; n8 += kAtOnce) {
            float4* const to = partial + (k * kAll + n8) * 128;
            float4 before[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) before[i] = first ? make_float4(0.f, 0.f, 0.f, 0.f) : to[i * 128];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              const float* from = sum[own][k] + 4 * (n8 + i);
              to[i * 128] = make_float4(before[i].x + from[0], before[i].y + from[1], before[i].z + from[2],
                                        before[i].w + from[3]);
            }
          }
      }
    };

    // Where a lane's two rows of a set lie in a stage, and their phase in 16 bytes: a sum whose lowest two bits count.
    int word[RW_OWN][2];
    unsigned phase[RW_OWN][2];
#pragma unroll
    for (int own = 0; own < RW_OWN; ++own)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = (warpgroup * RW_OWN + own) / RW_SETS, set = (warpgroup * RW_OWN + own) % RW_SETS;
        const int row = warp * 16 + quad + half * 8, channel = m * 64 + row % RW_CHANNELS;
        const int tap = (block.slice * RW_SETS + set) * kTapRows + row / RW_CHANNELS;
        word[own][half] = rw_tap_word[tap] + channel * RW_PITCH + quarter * TCONV_S2;
        phase[own][half] =
            (block.group * TCONV_CO + block.block_m * RW_M + channel) * static_cast<unsigned>(a.grad_channel) +
            rw_depth[block.slice * RW_DEPTHS + rw_tap_depth[tap]] * static_cast<unsigned>(a.grad_slab) +
            static_cast<unsigned>(reinterpret_cast<unsigned long long>(a.grad_output) / 4);
      }

    RingPlace<RW_STAGES> at;
    int newest = 0, unflushed = warpgroup * (RW_FLUSH / RW_WARPGROUPS);  // the warpgroups flush in turns
    bool first = true;
    for (Walk walk(a, block.share); walk.left > 0; walk.next(a)) {
      barrier_wait(full + at.stage, at.parity);
      if (walk.warm == 0) {
        // The tensor core reads what other threads stored in the ordinary way. The fence stands here and not with the
        // loaders, where it would also wait for the copies that they have under way.
        fence_shared_for_wgmma();
        // 3 multiply
        unsigned long long columns[RW_TAPS_H];
#pragma unroll
        for (int k = 0; k < RW_TAPS_H; ++k) {
          int slot = newest - rw_back[block.slice * RW_TAPS_H + k];
          slot += slot < 0 ? kInputSlots : 0;
          columns[k] = columns_descriptor(inputs + slot * kInputUnits, kUnitPitch * 16);
        }
        const int first_row = (walk.row + rw_first[block.slice]) * TCONV_S1;
        const unsigned start = static_cast<unsigned>(walk.b) * static_cast<unsigned>(a.grad_image) +
                               walk.d * TCONV_S0 * static_cast<unsigned>(a.grad_slab) +
                               walk.strip * RW_TILE * TCONV_S2 + rw_column[block.slice];
        unsigned rows[kUnderWay][4];
#pragma unroll
        for (int by_class = 0; by_class < RW_CLASSES; ++by_class) {
          const unsigned* const grad = grads + at.stage * kGradWords + by_class * kClassWords;
          const unsigned row_start =
              start + (first_row + rw_residue[block.slice * RW_CLASSES + by_class]) * static_cast<unsigned>(a.grad_row);
#pragma unroll
          for (int own = 0; own < RW_OWN; ++own) {
            const unsigned* const upper = grad + word[own][0] + ((phase[own][0] + row_start) & 3);
            const unsigned* const lower = grad + word[own][1] + ((phase[own][1] + row_start) & 3);
            auto multiply = [&](int step, unsigned (&current)[4]) {
              const int at_step = step * (8 * TCONV_S2);
              current[0] = nearest_tf32(upper[at_step]);
              current[1] = nearest_tf32(lower[at_step]);
              current[2] = nearest_tf32(upper[at_step + 4 * TCONV_S2]);
              current[3] = nearest_tf32(lower[at_step + 4 * TCONV_S2]);
              wgmma_fence();
#pragma unroll
              for (int k = 0; k < RW_TAPS_H; ++k)
                if (RW_CLASS_OF(k) == by_class) wgmma_step(sum[own][k], current, columns[k] + step * (2 * kUnitPitch));
              wgmma_commit();
              wgmma_wait<kUnderWay - 1>();  // the products that read the next rows are done
            };
#pragma unroll 1
            for (int step = 0; step < kSteps; step += kUnderWay) {
#pragma unroll
              for (int i = 0; i < kUnderWay; ++i) multiply(step + i, rows[i]);
            }
          }
        }
        // Products that stay under way over the end of a step make the compiler wait for every single one.
        wgmma_wait<0>();
      }
      // Every thread for itself: it is their loads that the next copies must not overtake, and racecheck sees no order
      // through a warp's barrier and one lane.
      barrier_arrive(empty + at.stage);
      at.advance();
      newest = newest + 1 == kInputSlots ? 0 : newest + 1;
      if (walk.warm > 0) continue;
      if (++unflushed >= RW_FLUSH || walk.left == 1) {
        flush(first);
        clear();
        first = false;
        unflushed = 0;
      }
    }
    if (first) flush(true);  // no step: zeros
  }
}
