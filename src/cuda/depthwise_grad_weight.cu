// depthwise_grad_weight — gradients of weight and bias where every group has one input channel, bound by memory.
//
// Computes  grad_weight[c, t] = sum over b, i of input[b, c / m, i] * grad_output[b, c, s*i + d*t - p] for m = out_channels
//           / groups, and grad_bias[c].
// Method    grad_output is the larger operand, so it is the one that is read once. A thread walks down a column of lattice
//           cells; of a cell it takes the s_1 * s_2 elements of grad_output of one depth phase and multiplies each with the
//           inputs that its phase reaches. Those stand in a window of registers that moves down with the cells: per cell
//           one new row of inputs. For s = 2, k = 5 in three dimensions that is 11 reads for 62 products, with the 75 or
//           50 sums of a depth phase in registers. Blocks take phases of depth and shares of all cells. Contiguous: lanes
//           along the width. channels_last: lanes along the channels. The products are written out by
//           depthwise_grad_weight.cpp, one function per class of phases.
//           An element outside counts as zero. That is wrong only next to an infinity or a NaN, which leaves a sum that
//           is not finite: then the block adds up again, product by product.
// Refuses   Groups of more than one input channel, rows of taps for which the registers do not suffice.
// Reads as  Place -> add_cells (in the prelude) -> reduce; add_exactly; the sum over shares.
// SPDX-License-Identifier: Apache-2.0
#include "epilogue.cuh"

struct Arguments {
  const void* input;
  const void* grad_output;
  void* grad_weight;
  void* grad_bias;   // null: not wanted
  accum_t* partial;  // [share][channel][tap, then one bias sum for each variant that counts it]
  long long input_size[3];
  long long output_size[3];
  unsigned cells;    // of depth
  unsigned columns;  // cells of width
  unsigned strip;    // cells of height that a thread walks
  unsigned places;   // strips * columns
  unsigned tiles;    // of kPlaces places
  unsigned items;    // batch * cells * tiles
  unsigned shares, share;
};

__device__ __forceinline__ storage_t stored_at(bool there, const storage_t* at) {
  storage_t stored{};
  if (there) stored = *at;
  return stored;
}
__device__ __forceinline__ accum_t input_of(bool there, storage_t stored) {
  const accum_t value = tconv_pre<accum_t>(widen(stored));
  return TCONV_PRE && !there ? accum_t(0) : value;
}

__device__ __forceinline__ void fetch_to_l2(const storage_t* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// From depthwise_grad_weight.cpp: kThreads kMinBlocks kLanes (channels side by side in a warp) kSlots (most sums of a
// variant) kBiasSums, the tables kClass kPhase kSlice kRow kGradRow kBias kFirst by variant, kSums by class, kSlotTap by
// kFirst + slot, kTapPhase and kTapShift by dimension and tap, and add_cells: one thread's cells of one item.
constexpr int kWarps = kThreads / 32, kPlaces = 32 / kLanes, kTaps = TCONV_K0 * TCONV_K1 * TCONV_K2;
constexpr int kChannels = TCONV_GROUPS * TCONV_CO, kColumns = kTaps + kBiasSums;
constexpr int kChannelTiles = (kChannels + kLanes - 1) / kLanes;
// Elements between neighbouring positions.
constexpr int kInputStep = TCONV_CHANNELS_LAST ? TCONV_GROUPS : 1;
constexpr int kGradStep = TCONV_CHANNELS_LAST ? kChannels : 1;

#ifdef TCONV_ENTRY_depthwise_grad_weight
// What a lane has to do in one item.
struct Place {
  bool here;
  int b, q_0, q_1, q_2;
};

__device__ __forceinline__ Place place_of(const Arguments& a, unsigned item, int spot) {
  Place at;
  const unsigned place = item % a.tiles * kPlaces + spot;
  item /= a.tiles;
  at.q_0 = static_cast<int>(item % a.cells);
  at.b = static_cast<int>(item / a.cells);
  at.here = place < a.places;
  at.q_1 = static_cast<int>(place / a.columns * a.strip);
  at.q_2 = static_cast<int>(place % a.columns);
  return at;
}

// Of position (z, y, x), which need not exist.
__device__ __forceinline__ long long element(long long b, int channel, int channels, const long long (&size)[3],
                                             long long z, long long y, long long x) {
  const long long volume = size[0] * size[1] * size[2], at = (z * size[1] + y) * size[2] + x;
  return TCONV_CHANNELS_LAST ? (b * volume + at) * channels + channel : (b * channels + channel) * volume + at;
}

// The sum of one tap over the block's share with every product tested for its operands: for data that is not finite.
__device__ __forceinline__ accum_t add_exactly(const Arguments& a, unsigned begin, unsigned end, int spot, int channel,
                                               int tap) {
  const int t_0 = tap / (TCONV_K1 * TCONV_K2), t_1 = tap / TCONV_K2 % TCONV_K1, t_2 = tap % TCONV_K2;
  accum_t sum = 0;
  for (unsigned item = begin; item < end; ++item) {
    const Place at = place_of(a, item, spot);
    const long long z = static_cast<long long>(at.q_0) * TCONV_S0 + kTapPhase[0][t_0], d = at.q_0 + kTapShift[0][t_0];
    const long long x = static_cast<long long>(at.q_2) * TCONV_S2 + kTapPhase[2][t_2], w = at.q_2 + kTapShift[2][t_2];
    if (!at.here || channel >= kChannels || z >= a.output_size[0] || x >= a.output_size[2] || d < 0 ||
        d >= a.input_size[0] || w < 0 || w >= a.input_size[2])
      continue;
    for (unsigned n = 0; n < a.strip; ++n) {
      const long long y = static_cast<long long>(at.q_1 + n) * TCONV_S1 + kTapPhase[1][t_1];
      const long long h = static_cast<long long>(at.q_1 + n) + kTapShift[1][t_1];
      if (y >= a.output_size[1] || h < 0 || h >= a.input_size[1]) continue;
      const long long from = element(at.b, channel / TCONV_CO, TCONV_GROUPS, a.input_size, d, h, w);
      const long long with = element(at.b, channel, kChannels, a.output_size, z, y, x);
      sum += input_of(true, static_cast<const storage_t*>(a.input)[from]) *
             widen(static_cast<const storage_t*>(a.grad_output)[with]);
    }
  }
  return sum;
}

// Of one value over the lanes of one channel; each of them gets the sum.
__device__ __forceinline__ accum_t over_lanes(accum_t sum) {
#pragma unroll
  for (int distance = 16; distance >= kLanes; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// Of as many values as a channel has lanes: each exchange halves them, and part[0] of lane `spot` ends up as the sum of its
// value. A tree for each takes five times the exchanges.
template <int half>
__device__ __forceinline__ void scatter_sums(accum_t (&part)[kPlaces], int spot) {
  if constexpr (half > 0) {
    const bool upper = spot & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const accum_t give = upper ? part[i] : part[i + half];
      part[i] = (upper ? part[i + half] : part[i]) + __shfl_xor_sync(0xffffffffu, give, half * kLanes);
    }
    scatter_sums<half / 2>(part, spot);
  }
}

using Stage = accum_t[kWarps][kSlots + 1][kLanes];

// What a thread's block does, and its own part. Worked out again wherever it is needed: kept, it spilled.
struct Block {
  int thread, warp, local, spot, first_channel, variant;
  unsigned share, begin, end;
  __device__ __forceinline__ explicit Block(const Arguments& a) {
    unsigned index = blockIdx.x;
    thread = static_cast<int>(threadIdx.x);
    asm volatile("" : "+r"(thread), "+r"(index));
    warp = thread / 32, local = thread % kLanes, spot = thread % 32 / kLanes;
    first_channel = static_cast<int>(index % kChannelTiles) * kLanes;
    index /= kChannelTiles;
    variant = static_cast<int>(index % kVariants);
    share = index / kVariants, begin = share * a.share;
    end = begin + a.share < a.items ? begin + a.share : a.items;
  }
};

template <int kind>
__device__ __forceinline__ void add_items(const Arguments& a, Stage& stage) {
  const int size[3] = {static_cast<int>(a.input_size[0]), static_cast<int>(a.input_size[1]),
                       static_cast<int>(a.input_size[2])};
  const int grad_height = static_cast<int>(a.output_size[1]);
  constexpr int kCount = kSums[kind];
  accum_t sum[kCount + 1];
#pragma unroll
  for (int i = 0; i <= kCount; ++i) sum[i] = 0;
  __shared__ unsigned next[kThreads];  // item of each thread: even that register is needed for the sums
  {
    const Block block(a);
    next[block.thread] = block.begin + block.warp;
  }
#pragma unroll 1
  for (;;) {
    const Block block(a);
    const unsigned item = next[block.thread];
    if (item >= block.end) break;
    next[block.thread] = item + kWarps;
    const int variant = block.variant, channel = block.first_channel + block.local;
    const Place at = place_of(a, item, block.spot);
    const int z = at.q_0 * TCONV_S0 + kPhase[variant];
    if (z >= a.output_size[0]) continue;
    const bool here = at.here && channel < kChannels;
    // Rows of grad_output from y on that are added; none where there is nothing to do.
    const long long below = static_cast<long long>(at.q_1 + a.strip) * TCONV_S1;
    const int d = at.q_0 + kSlice[variant], h = here ? at.q_1 + kRow[variant] : -(1 << 30);
    const int y = at.q_1 * TCONV_S1 + kGradRow[variant];
    const int left = here ? (below < grad_height ? static_cast<int>(below) : grad_height) - y : 0;
    const storage_t* input =
        static_cast<const storage_t*>(a.input) +
        element(at.b, channel / TCONV_CO, TCONV_GROUPS, a.input_size, d, at.q_1 + kRow[variant], at.q_2);
    const storage_t* grad = static_cast<const storage_t*>(a.grad_output) +
                            element(at.b, channel, kChannels, a.output_size, z, y, at.q_2 * TCONV_S2);
    add_cells<kind, kInputStep, kGradStep>(input, grad, size, static_cast<int>(a.output_size[2]), d, h, at.q_2,
                                           at.q_2 * TCONV_S2, left, a.strip, sum);
  }
  const Block block(a);
#pragma unroll
  for (int first = 0; first <= kCount; first += kPlaces) {
    accum_t part[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) part[i] = first + i <= kCount ? sum[first + i] : accum_t(0);
    scatter_sums<kPlaces / 2>(part, block.spot);
    if (first + block.spot <= kCount) stage[block.warp][first + block.spot][block.local] = part[0];
  }
}

template <int kind>
__device__ __forceinline__ void add_items_of(const Arguments& a, Stage& stage) {
  if (kClass[Block(a).variant] == kind) {
    add_items<kind>(a, stage);
  } else if constexpr (kind + 1 < kClasses) {
    add_items_of<kind + 1>(a, stage);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) depthwise_grad_weight(const Arguments a) {
  __shared__ Stage stage;
  add_items_of<0>(a, stage);
  __syncthreads();

  // From here on once for all classes, for the compiler's time.
  const Block block(a);
  const int count = kSums[kClass[block.variant]];
  const int* taps = kSlotTap + kFirst[block.variant];
  bool finite = true;
  for (int slot = block.warp; slot < count; slot += kWarps)
    for (int other = 0; other < kWarps; ++other) {
      const accum_t total = stage[other][slot][block.local];
      finite = finite && total - total == accum_t(0);
    }
  if (__syncthreads_or(!finite)) {
    for (int slot = block.warp; slot < count; slot += kWarps) {
      const accum_t exact =
          over_lanes(add_exactly(a, block.begin, block.end, block.spot, block.first_channel + block.local, taps[slot]));
      if (block.spot == 0) {
        for (int other = 0; other < kWarps; ++other) stage[other][slot][block.local] = other ? accum_t(0) : exact;
      }
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < (count + 1) * kLanes; e += kThreads) {
    const int slot = e / kLanes, c = block.first_channel + e % kLanes;
    const int column = slot < count ? taps[slot] : kTaps + kBias[block.variant];
    if (c >= kChannels || (slot == count && kBias[block.variant] < 0)) continue;
    accum_t value = stage[0][slot][e % kLanes];
    for (int other = 1; other < kWarps; ++other) value += stage[other][slot][e % kLanes];
    a.partial[(static_cast<long long>(block.share) * kChannels + c) * kColumns + column] = value;
  }
}
#endif

#ifdef TCONV_ENTRY_depthwise_sum
// A block adds 32 results over their shares, eight threads each.
extern "C" __global__ void __launch_bounds__(256) depthwise_sum(const Arguments a) {
  __shared__ accum_t stage[8][32];
  const long long result = static_cast<long long>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int channel = static_cast<int>(result / (kTaps + 1)), column = static_cast<int>(result % (kTaps + 1));
  accum_t sum = 0;
  if (channel < kChannels) {
    for (int bias = 0; bias < (column < kTaps ? 1 : kBiasSums); ++bias) {
      const accum_t* from = a.partial + static_cast<long long>(channel) * kColumns + column + bias;
#pragma unroll 4
      for (unsigned share = threadIdx.x / 32; share < a.shares; share += 8)
        sum += from[static_cast<long long>(share) * kChannels * kColumns];
    }
  }
  stage[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || channel >= kChannels) return;
#pragma unroll
  for (int other = 1; other < 8; ++other) sum += stage[other][threadIdx.x];
  if (column < kTaps) {
    if (a.grad_weight)
      static_cast<storage_t*>(a.grad_weight)[static_cast<long long>(channel) * kTaps + column] = narrow<storage_t>(sum);
  } else if (a.grad_bias) {
    static_cast<storage_t*>(a.grad_bias)[channel] = narrow<storage_t>(sum);
  }
}
#endif
