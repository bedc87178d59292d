// finish — what a convolution leaves of its chain: pointwise operations and normalisation, and their gradients.
//
// Computes  output = after(norm(before(pre(input) + bias))), or for grad_epilogue the gradient of input and operands.
// Method    A thread walks over positions in packs: 16 bytes of one channel (contiguous; 8 to 256 threads to a row), or up
//           to 4 channels of one position (channels_last). What belongs to a channel stays in registers, and no index is
//           divided. Up to 32 bytes are loaded before any is used.
//           Steps that lie inside their row as a whole have a copy of the code without a test per element, because 16-bit
//           chains are bound by instructions.
//           Statistics: (count, mean, M2) of the elements of a step at a time, merged along the thread, the row and then
//           the rows of a group, always in the same order. They need a pass of their own (a group's result depends on all
//           of it), then the apply pass reads the input a second time: 3 transfers where a pointwise pass needs 2.
//           Gradients: one pass for the sums that a norm's gradient needs, one for everything else; sums over a channel
//           as partials that a last kernel adds in a fixed order.
// Refuses   Other directions.
// Reads as  Walk, reductions, then the entries in the order in which they are launched.
// SPDX-License-Identifier: Apache-2.0
#include "finish_moments.cuh"

// Defined by finish.cpp: TCONV_PACK (elements of a pack), TCONV_NORM (0 none, 1 group_norm, 2 layer_norm, 3 batch_norm),
// TCONV_NORM_AFFINE, TCONV_NORM_SLOT, TCONV_NORM_EPS; for gradients TCONV_SUMS, TCONV_NORM_SUM, kSumSlot, keep_before and
// keep_after.

constexpr int kThreads = 256;
constexpr int kPack = TCONV_PACK;
// Bytes in flight hide the latency of memory: 2048 threads of a multiprocessor times 32 bytes are 64 KB, twice what
// 4.3 TB/s over 132 multiprocessors and 0.8 us need. Gradients load two tensors; channels_last and fp64 have no registers
// to spare.
#if defined(TCONV_SUMS) && (TCONV_CHANNELS_LAST || TCONV_DTYPE_f64)
constexpr int kBytes = 16;
#else
constexpr int kBytes = 32;
#endif
constexpr int kPacks = kBytes / (kPack * static_cast<int>(sizeof(storage_t)));
constexpr int kUnroll = kPacks < 8 ? kPacks : 8;
constexpr int kBatch = kPack * kUnroll;
constexpr int kChannels = TCONV_CHANNELS_LAST ? kPack : 1;  // of a thread
// Which of them element i of a step belongs to.
#define CHANNEL_OF(i) (TCONV_CHANNELS_LAST ? (i) % kPack : 0)

struct Arguments {
  const void* input;
  const void* grad_output;
  void* output;
  const void* bias;
  accum_t* mean;  // one per statistic
  accum_t* rstd;
  accum_t* partial;  // [quantity][channel][b][chunk]
  accum_t* sums;     // grad_epilogue: [2][statistic]
  long long batch, channels, positions;
  long long groups;         // of group_norm
  long long statistics;     // how many mean and rstd there are
  long long chunk, chunks;  // positions of a row that one block takes, and blocks per row
  long long lanes;          // contiguous: threads per row
  long long mergers;        // threads that add up the partial sums of one statistic or channel: 32 or 256
  long long packed;         // all tensors are aligned for packs; channels_last: channels are a multiple of a pack
};

// The elements of one thread: kUnroll packs at a step, the next pack `lanes` further on.
struct Walk {
  long long b, row, first, last, begin, units, slot;
  int channel, lane, lanes, columns;  // channel: the thread's first; columns: rows side by side in the block
  bool active;

  __device__ explicit Walk(const Arguments& a) {
    const int thread = static_cast<int>(threadIdx.x);
    unsigned block = blockIdx.x, chunk = 0;  // rows are fewer than 2^32
    const unsigned chunks = static_cast<unsigned>(a.chunks), channels = static_cast<unsigned>(a.channels);
#if TCONV_CHANNELS_LAST
    chunk = block % chunks;
    block /= chunks;
    const unsigned packs = (channels + kPack - 1) / kPack, tiles = (packs + kThreads - 1) / kThreads;
    const unsigned tile = block % tiles * kThreads;
    columns = static_cast<int>(packs - tile < kThreads ? packs - tile : kThreads);
    b = block / tiles;
    lanes = kThreads / columns;
    lane = thread / columns;
    channel = (static_cast<int>(tile) + thread % columns) * kPack;
    active = lane < lanes;
    row = b * a.positions * a.channels + channel;
#else
    lanes = static_cast<int>(a.lanes);
    lane = thread % lanes;
    columns = kThreads / lanes;
    if (lanes == kThreads) {
      chunk = block % chunks;
      block /= chunks;
    } else {
      block = block * columns + thread / lanes;
    }
    active = block < a.batch * a.channels;
    b = block / channels;
    channel = static_cast<int>(block % channels);
    row = block * a.positions;
#endif
    first = chunk * a.chunk;
    last = first + a.chunk < a.positions ? first + a.chunk : a.positions;
    slot = (static_cast<long long>(channel) * a.batch + b) * a.chunks + chunk;
#if TCONV_CHANNELS_LAST
    begin = first;
    units = last - first;
#else
    begin = (row + first) / kPack;
    units = (row + last + kPack - 1) / kPack - begin;
#endif
    if (!active) units = 0;
  }

  // Of channel j of the thread, between slots of partial sums.
  __device__ long long slot_of(const Arguments& a, int j) const { return slot + j * a.batch * a.chunks; }
  __device__ bool has_channel(const Arguments& a, int j) const {
    return !TCONV_CHANNELS_LAST || channel + j < a.channels;
  }

  // Item j of pack u, in the step that starts at unit `base`: its offset in memory, its position, and whether it exists.
  __device__ long long element(const Arguments& a, long long base, int u, int j) const {
    const long long unit = begin + base + static_cast<long long>(u) * lanes + lane;
#if TCONV_CHANNELS_LAST
    return row + unit * a.channels + j;
#else
    return unit * kPack + j;
#endif
  }
  __device__ long long position(const Arguments& a, long long base, int u, int j) const {
#if TCONV_CHANNELS_LAST
    return begin + base + static_cast<long long>(u) * lanes + lane;
#else
    return element(a, base, u, j) - row;
#endif
  }
  template <bool kWhole>
  __device__ bool exists(const Arguments& a, long long base, int u, int j) const {
    if (kWhole) return true;
    const long long p = position(a, base, u, j);
    return p >= first && p < last && has_channel(a, j);
  }
  // Whether all items of the step exist and lie in packs.
  __device__ bool whole(const Arguments& a, long long base) const {
    return a.packed && exists<false>(a, base, 0, 0) && exists<false>(a, base, kUnroll - 1, kPack - 1);
  }

  template <bool kWhole, typename S>
  __device__ void load(const Arguments& a, const void* from, long long base, S (&item)[kBatch]) const {
    const S* pointer = static_cast<const S*>(from);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kWhole || (a.packed && exists<false>(a, base, u, 0) && exists<false>(a, base, u, kPack - 1))) {
        S pack[kPack];
        load_pack(pack, pointer + element(a, base, u, 0));
#pragma unroll
        for (int j = 0; j < kPack; ++j) item[u * kPack + j] = pack[j];
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          item[u * kPack + j] = S{};
          if (exists<false>(a, base, u, j)) item[u * kPack + j] = pointer[element(a, base, u, j)];
        }
      }
    }
  }
  template <bool kWhole, typename S>
  __device__ void store(const Arguments& a, void* to, long long base, const S (&item)[kBatch]) const {
    S* pointer = static_cast<S*>(to);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kWhole || (a.packed && exists<false>(a, base, u, 0) && exists<false>(a, base, u, kPack - 1))) {
        S pack[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) pack[j] = item[u * kPack + j];
        store_pack(pointer + element(a, base, u, 0), pack);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (exists<false>(a, base, u, j)) pointer[element(a, base, u, j)] = item[u * kPack + j];
        }
      }
    }
  }
};

// Steps of a thread over its part of the row: step(Flag<whether the step is whole>, base).
template <typename Step>
__device__ __forceinline__ void each_step(const Arguments& a, const Walk& walk, Step step) {
  for (long long base = 0; base < walk.units; base += static_cast<long long>(walk.lanes) * kUnroll) {
    if (walk.whole(a, base))
      step(Flag<true>{}, base);
    else
      step(Flag<false>{}, base);
  }
}

template <int count>
struct Values {
  accum_t at[count];
};

struct MergeMoments {
  static __device__ void into(Values<3>& x, const Values<3>& y) {
    merge_moments(x.at[0], x.at[1], x.at[2], y.at[0], y.at[1], y.at[2]);
  }
};
template <int count>
struct Add {
  static __device__ void into(Values<count>& x, const Values<count>& y) {
#pragma unroll
    for (int i = 0; i < count; ++i) x.at[i] += y.at[i];
  }
};

#if TCONV_CHANNELS_LAST
// Halves of the lanes meet, all channels of the block at once.
template <class Merge, int count>
__device__ void reduce_lanes(const Walk& walk, Values<count> (&value)[kChannels]) {
  const int thread = static_cast<int>(threadIdx.x);
  __shared__ Values<count> stage[kThreads * kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) stage[j * kThreads + thread] = value[j];
  for (int lanes = walk.lanes; lanes > 1;) {
    const int half = (lanes + 1) / 2, pairs = lanes / 2 * walk.columns;
    __syncthreads();
    for (int i = thread; i < pairs * kPack; i += kThreads) {
      const int at = i / pairs * kThreads + i % pairs;
      Merge::into(stage[at], stage[at + half * walk.columns]);
    }
    lanes = half;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kPack; ++j) value[j] = stage[j * kThreads + thread];
}
#endif

// The values of all threads that share a row, at its lane 0, channel by channel; every thread of the block must call.
template <class Merge, int count>
__device__ void reduce_row(const Walk& walk, Values<count> (&value)[kChannels]) {
#if TCONV_CHANNELS_LAST
  reduce_lanes<Merge>(walk, value);
#else
  const int thread = static_cast<int>(threadIdx.x);
  __shared__ Values<count> stage[kThreads / 32];
  Values<count> total = value[0];
  const int width = walk.lanes < 32 ? walk.lanes : 32;
  for (int distance = width / 2; distance > 0; distance /= 2) {
    Values<count> other;
#pragma unroll
    for (int i = 0; i < count; ++i) other.at[i] = __shfl_down_sync(0xffffffffu, total.at[i], distance, width);
    if (walk.lane % width + distance < width) Merge::into(total, other);
  }
  if (walk.lanes > 32) {
    if (thread % 32 == 0) stage[thread / 32] = total;
    __syncthreads();
    if (walk.lane == 0) {
      for (int warp = 1; warp < walk.lanes / 32; ++warp) Merge::into(total, stage[thread / 32 + warp]);
    }
  }
  value[0] = total;
#endif
}

// Sums: those of a long chain would take more shared memory than there is, so channels_last takes them one by one.
template <int count>
__device__ void add_row(const Walk& walk, Values<count> (&value)[kChannels]) {
#if TCONV_CHANNELS_LAST
#pragma unroll
  for (int i = 0; i < count; ++i) {
    Values<1> one[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) one[j].at[0] = value[j].at[i];
    reduce_lanes<Add<1>>(walk, one);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) value[j].at[i] = one[j].at[0];
    __syncthreads();
  }
#else
  reduce_row<Add<count>>(walk, value);
#endif
}

// Where the statistics of an element are.
__device__ __forceinline__ long long statistic(const Arguments& a, const Walk& walk, int channel, long long position) {
#if TCONV_NORM == 1
  return walk.b * a.groups + channel / static_cast<int>(a.channels / a.groups);
#else
  return walk.b * a.positions + position;
#endif
}

// The normalisation at one channel: weight and bias, and for group_norm and batch_norm mean and rstd; for the gradient of
// group_norm also the sums over the group.
struct Norm {
  accum_t weight = 1, bias = 0, mean = 0, rstd = 1, sum = 0, sum_normal = 0;

  __device__ void read(const Arguments& a, const Walk& walk, int channel, const Operands& operands, bool sums) {
    (void)a, (void)operands, (void)sums;
#if TCONV_NORM_AFFINE
    constexpr int kAffine = TCONV_NORM_SLOT + (TCONV_NORM == 3 ? 2 : 0);
    weight = tconv_channel_operand<accum_t>(operands, kAffine, channel);
    bias = tconv_channel_operand<accum_t>(operands, kAffine + 1, channel);
#endif
#if TCONV_NORM == 1
    const long long s = statistic(a, walk, channel, 0);
    mean = a.mean[s];
    rstd = a.rstd[s];
    if (sums) sum = a.sums[s], sum_normal = a.sums[a.statistics + s];
#elif TCONV_NORM == 3
    mean = tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT, channel);
    rstd = accum_t(1) /
           sqrt(tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT + 1, channel) + accum_t(TCONV_NORM_EPS));
#endif
  }
};
__device__ __forceinline__ void read_norms(const Arguments& a, const Walk& walk, const Operands& operands, bool sums,
                                           Norm (&norm)[kChannels]) {
#pragma unroll
  for (int j = 0; j < kChannels; ++j)
    if (walk.active && walk.has_channel(a, j)) norm[j].read(a, walk, walk.channel + j, operands, sums);
}
// count values per channel at lane 0 of each row, to the partial sums.
template <int stored, int count>
__device__ __forceinline__ void store_partial(const Arguments& a, const Walk& walk,
                                              const Values<count> (&total)[kChannels], int from) {
  if (!walk.active || walk.lane != 0) return;
  const long long quantity = a.channels * a.batch * a.chunks;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) {
    if (!walk.has_channel(a, j)) continue;
#pragma unroll
    for (int k = 0; k < stored; ++k) a.partial[k * quantity + walk.slot_of(a, j)] = total[j].at[from + k];
  }
}

// At least two blocks of a multiprocessor: without a number the compiler aims at more and spills in long chains.
#define ENTRY(name)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) \
      name(const Arguments a, const Operands operands, const GradOperands grad_operands)

#ifdef TCONV_ENTRY_finish_row_moments
// Mean and M2 of every piece of a row; how many elements it has is known to whoever merges.
ENTRY(finish_row_moments) {
  (void)grad_operands;
  const Walk walk(a);
  Values<3> total[kChannels]{};
  each_step(a, walk, [&](auto whole, long long base) {
    constexpr bool kWhole = decltype(whole)::value;
    storage_t raw[kBatch];
    walk.load<kWhole>(a, a.input, base, raw);
    accum_t x[kBatch], sum[kChannels]{};
    int count[kChannels]{};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = CHANNEL_OF(i);
      const bool exists = walk.exists<kWhole>(a, base, i / kPack, i % kPack);
      x[i] = exists ? before(a.bias, raw[i], walk.channel + c, walk.element(a, base, i / kPack, i % kPack), operands)
                    : accum_t(0);
      sum[c] += x[i];
      count[c] += exists;
    }
    accum_t n[kChannels], mean[kChannels], m2[kChannels]{};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      n[c] = static_cast<accum_t>(count[c]);
      mean[c] = count[c] ? sum[c] / n[c] : accum_t(0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const accum_t distance = x[i] - mean[CHANNEL_OF(i)];
      m2[CHANNEL_OF(i)] += walk.exists<kWhole>(a, base, i / kPack, i % kPack) ? distance * distance : accum_t(0);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      merge_moments(total[c].at[0], total[c].at[1], total[c].at[2], n[c], mean[c], m2[c]);
  });
  reduce_row<MergeMoments>(walk, total);
  store_partial<2>(a, walk, total, 1);
}
#endif

// Partial sums are merged by a warp, or by the whole block where they are many; in double, because that costs nothing.
struct Mergers {
  long long index;
  int lane, count;
  __device__ explicit Mergers(const Arguments& a)
      : index((static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x) / a.mergers),
        lane(static_cast<int>(threadIdx.x % a.mergers)),
        count(static_cast<int>(a.mergers)) {}
};
struct MergeDoubleMoments {
  static __device__ void into(double (&x)[3], const double (&y)[3]) {
    merge_moments(x[0], x[1], x[2], y[0], y[1], y[2]);
  }
};
struct AddDoubles {
  template <int count>
  static __device__ void into(double (&x)[count], const double (&y)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] += y[i];
  }
};
// At lane 0; every thread of the block must call.
template <class Merge, int count>
__device__ void reduce_merged(const Mergers& mergers, double (&value)[count]) {
  __shared__ double stage[kThreads / 32][count];
  double other[count];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) other[i] = __shfl_down_sync(0xffffffffu, value[i], distance);
    if (mergers.lane % 32 + distance < 32) Merge::into(value, other);
  }
  if (mergers.count == 32) return;
  if (mergers.lane % 32 == 0)
#pragma unroll
    for (int i = 0; i < count; ++i) stage[mergers.lane / 32][i] = value[i];
  __syncthreads();
  if (mergers.lane == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) Merge::into(value, stage[warp]);
}

#ifdef TCONV_ENTRY_finish_merge_moments
// Per (b, group): merges its pieces.
ENTRY(finish_merge_moments) {
  (void)operands, (void)grad_operands;
  const Mergers mergers(a);
  const long long s = mergers.index;
  const long long per_group = a.channels / a.groups, b = s / a.groups, first = s % a.groups * per_group;
  const long long quantity = a.channels * a.batch * a.chunks;
  double moments[3] = {0, 0, 0};
  for (long long i = mergers.lane; s < a.statistics && i < per_group * a.chunks; i += mergers.count) {
    const long long chunk = i % a.chunks, slot = ((first + i / a.chunks) * a.batch + b) * a.chunks + chunk;
    const long long begin = chunk * a.chunk, end = begin + a.chunk < a.positions ? begin + a.chunk : a.positions;
    const double piece[3] = {static_cast<double>(end - begin), a.partial[slot], a.partial[quantity + slot]};
    MergeDoubleMoments::into(moments, piece);
  }
  reduce_merged<MergeDoubleMoments>(mergers, moments);
  if (mergers.lane == 0 && s < a.statistics) {
    a.mean[s] = static_cast<accum_t>(moments[1]);
    a.rstd[s] = static_cast<accum_t>(1 / sqrt(moments[2] / moments[0] + double(TCONV_NORM_EPS)));
  }
}
#endif

#if defined(TCONV_ENTRY_finish_position_moments) || defined(TCONV_ENTRY_finish_grad_positions)
// A block takes 32 positions with 8 threads each (contiguous) or 8 positions with a warp each (channels_last), so that
// a warp reads whole lines in both layouts; the threads of a position share its channels.
struct Across {
  long long b, position, row, step;
  int slice, slices;
  bool active;

  __device__ explicit Across(const Arguments& a) {
#if TCONV_CHANNELS_LAST
    constexpr int kPositions = kThreads / 32;
    slice = threadIdx.x % 32;
    slices = 32;
    const long long within = threadIdx.x / 32;
#else
    constexpr int kPositions = 32;
    slice = threadIdx.x / 32;
    slices = kThreads / 32;
    const long long within = threadIdx.x % 32;
#endif
    const unsigned tiles = static_cast<unsigned>((a.positions + kPositions - 1) / kPositions);
    b = blockIdx.x / tiles;
    position = static_cast<long long>(blockIdx.x % tiles) * kPositions + within;
    active = position < a.positions;
#if TCONV_CHANNELS_LAST
    row = (b * a.positions + position) * a.channels;
    step = 1;
#else
    row = b * a.channels * a.positions + position;
    step = a.positions;
#endif
  }
};

// At slice 0 of each position; every thread of the block must call.
template <class Merge, int count>
__device__ Values<count> reduce_across(const Across& across, Values<count> value) {
#if TCONV_CHANNELS_LAST
  for (int distance = 16; distance > 0; distance /= 2) {
    Values<count> other;
#pragma unroll
    for (int i = 0; i < count; ++i) other.at[i] = __shfl_down_sync(0xffffffffu, value.at[i], distance);
    if (across.slice + distance < 32) Merge::into(value, other);
  }
#else
  __shared__ Values<count> stage[kThreads];
  stage[threadIdx.x] = value;
  __syncthreads();
  if (across.slice == 0) {
    for (int slice = 1; slice < across.slices; ++slice) Merge::into(value, stage[threadIdx.x + 32 * slice]);
  }
#endif
  return value;
}
#endif

#ifdef TCONV_ENTRY_finish_position_moments
ENTRY(finish_position_moments) {
  (void)grad_operands;
  const Across across(a);
  constexpr int kStep = 8;
  Values<3> total{};
  const int channels = across.active ? static_cast<int>(a.channels) : 0;
  for (int base = across.slice; base < channels; base += kStep * across.slices) {
    accum_t x[kStep], sum = 0, m2 = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const int c = base + i * across.slices;
      const long long element = across.row + c * across.step;
      x[i] = 0;
      if (c < channels) x[i] = before(a.bias, static_cast<const storage_t*>(a.input)[element], c, element, operands);
      sum += x[i];
      count += c < channels;
    }
    const accum_t n = static_cast<accum_t>(count), mean = sum / n;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const accum_t distance = x[i] - mean;
      m2 += base + i * across.slices < channels ? distance * distance : accum_t(0);
    }
    merge_moments(total.at[0], total.at[1], total.at[2], n, mean, m2);
  }
  total = reduce_across<MergeMoments>(across, total);
  if (across.active && across.slice == 0) {
    const long long s = across.b * a.positions + across.position;
    a.mean[s] = total.at[1];
    a.rstd[s] = accum_t(1) / sqrt(total.at[2] / total.at[0] + accum_t(TCONV_NORM_EPS));
  }
}
#endif

#ifdef TCONV_ENTRY_finish_apply
// May run in place: a thread reads its elements before it writes them, and nobody else reads them.
ENTRY(finish_apply) {
  (void)grad_operands;
  const Walk walk(a);
  Norm norm[kChannels];
  read_norms(a, walk, operands, false, norm);
  each_step(a, walk, [&](auto whole, long long base) {
    constexpr bool kWhole = decltype(whole)::value;
    storage_t raw[kBatch];
    output_t result[kBatch];
    walk.load<kWhole>(a, a.input, base, raw);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      result[i] = output_t{};
      if (!walk.exists<kWhole>(a, base, i / kPack, i % kPack)) continue;
      const int c = CHANNEL_OF(i), channel = walk.channel + c;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      accum_t x = before(a.bias, raw[i], channel, element, operands);
#if TCONV_NORM
      accum_t mean = norm[c].mean, rstd = norm[c].rstd;
#if TCONV_NORM == 2
      const long long s = statistic(a, walk, channel, walk.position(a, base, i / kPack, i % kPack));
      mean = a.mean[s];
      rstd = a.rstd[s];
#endif
      x = (x - mean) * rstd;
#if TCONV_NORM_AFFINE
      x = x * norm[c].weight + norm[c].bias;
#endif
      x = tconv_after<accum_t>(x, channel, element, operands);
#endif
      result[i] = narrow<output_t>(x);
    }
    walk.store<kWhole>(a, a.output, base, result);
  });
}
#endif

#ifdef TCONV_ENTRY_finish_grad_rows
// Per piece of a row: the sums of g and of g times the normalised value, where g is the gradient of the norm's result.
ENTRY(finish_grad_rows) {
  (void)grad_operands;
  const Walk walk(a);
  Norm norm[kChannels];
  read_norms(a, walk, operands, false, norm);
  Values<2> total[kChannels]{};
  each_step(a, walk, [&](auto whole, long long base) {
    constexpr bool kWhole = decltype(whole)::value;
    storage_t raw[kBatch];
    output_t grad[kBatch];
    walk.load<kWhole>(a, a.input, base, raw);
    walk.load<kWhole>(a, a.grad_output, base, grad);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!walk.exists<kWhole>(a, base, i / kPack, i % kPack)) continue;
      const int c = CHANNEL_OF(i), channel = walk.channel + c;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      const accum_t normal = (before(a.bias, raw[i], channel, element, operands) - norm[c].mean) * norm[c].rstd;
      accum_t unused[tconv_after_operands + 1];
      const accum_t g =
          tconv_after_grad<accum_t>(normal * norm[c].weight + norm[c].bias, static_cast<accum_t>(widen(grad[i])),
                                    channel, element, operands, unused);
      total[c].at[0] += g;
      total[c].at[1] += g * normal;
    }
  });
  add_row(walk, total);
  store_partial<2>(a, walk, total, 0);
}
#endif

#ifdef TCONV_ENTRY_finish_grad_merge
// Per (b, group): the two sums, weighted by each channel's weight.
ENTRY(finish_grad_merge) {
  (void)grad_operands, (void)operands;
  const Mergers mergers(a);
  const long long s = mergers.index;
  const long long per_group = a.channels / a.groups, b = s / a.groups, first = s % a.groups * per_group;
  const long long quantity = a.channels * a.batch * a.chunks;
  double sums[2] = {0, 0};
  for (long long i = mergers.lane; s < a.statistics && i < per_group * a.chunks; i += mergers.count) {
    const long long channel = first + i / a.chunks, slot = (channel * a.batch + b) * a.chunks + i % a.chunks;
    double weight = 1;
#if TCONV_NORM_AFFINE
    weight = tconv_channel_operand<double>(operands, TCONV_NORM_SLOT, static_cast<int>(channel));
#endif
    sums[0] += weight * a.partial[slot];
    sums[1] += weight * a.partial[quantity + slot];
  }
  reduce_merged<AddDoubles>(mergers, sums);
  if (mergers.lane == 0 && s < a.statistics) {
    a.sums[s] = static_cast<accum_t>(sums[0]);
    a.sums[a.statistics + s] = static_cast<accum_t>(sums[1]);
  }
}
#endif

#ifdef TCONV_ENTRY_finish_grad_positions
ENTRY(finish_grad_positions) {
  (void)grad_operands;
  const Across across(a);
  Values<2> total{};
  const int channels = across.active ? static_cast<int>(a.channels) : 0;
  const long long s = across.b * a.positions + across.position;
  const accum_t mean = across.active ? a.mean[s] : accum_t(0), rstd = across.active ? a.rstd[s] : accum_t(0);
#pragma unroll 4
  for (int c = across.slice; c < channels; c += across.slices) {
    const long long element = across.row + c * across.step;
    const accum_t x = before(a.bias, static_cast<const storage_t*>(a.input)[element], c, element, operands);
    const accum_t normal = (x - mean) * rstd;
    accum_t weight = 1, bias = 0, unused[tconv_after_operands + 1];
#if TCONV_NORM_AFFINE
    weight = tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT, c);
    bias = tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT + 1, c);
#endif
    const accum_t g = weight * tconv_after_grad<accum_t>(
                                   normal * weight + bias,
                                   static_cast<accum_t>(widen(static_cast<const output_t*>(a.grad_output)[element])), c,
                                   element, operands, unused);
    total.at[0] += g;
    total.at[1] += g * normal;
  }
  total = reduce_across<Add<2>>(across, total);
  if (across.active && across.slice == 0) {
    a.sums[s] = total.at[0];
    a.sums[a.statistics + s] = total.at[1];
  }
}
#endif

#ifdef TCONV_ENTRY_finish_grad_apply
ENTRY(finish_grad_apply) {
  const Walk walk(a);
  Norm norm[kChannels];
  read_norms(a, walk, operands, true, norm);
#if TCONV_NORM == 1
  const accum_t share = accum_t(1) / (static_cast<accum_t>(a.channels / a.groups) * static_cast<accum_t>(a.positions));
#elif TCONV_NORM == 2
  const accum_t share = accum_t(1) / static_cast<accum_t>(a.channels);
#endif
  constexpr int kSums = TCONV_SUMS > 0 ? TCONV_SUMS : 1;
  Values<kSums> total[kChannels]{};
  each_step(a, walk, [&](auto whole, long long base) {
    constexpr bool kWhole = decltype(whole)::value;
    storage_t raw[kBatch], result[kBatch];
    output_t grad[kBatch];
    walk.load<kWhole>(a, a.input, base, raw);
    walk.load<kWhole>(a, a.grad_output, base, grad);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      result[i] = storage_t{};
      if (!walk.exists<kWhole>(a, base, i / kPack, i % kPack)) continue;
      const int c = CHANNEL_OF(i), channel = walk.channel + c;
      accum_t(&sums)[kSums] = total[c].at;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      accum_t g = static_cast<accum_t>(widen(grad[i]));
      const accum_t x = widen(raw[i]);
#if TCONV_NORM
      accum_t mean = norm[c].mean, rstd = norm[c].rstd, sum = norm[c].sum, sum_normal = norm[c].sum_normal;
#if TCONV_NORM == 2
      const long long s = statistic(a, walk, channel, walk.position(a, base, i / kPack, i % kPack));
      mean = a.mean[s];
      rstd = a.rstd[s];
      sum = a.sums[s];
      sum_normal = a.sums[a.statistics + s];
#endif
      const accum_t normal = (tconv_epilogue<accum_t>(x, channel, element, operands) - mean) * rstd;
      accum_t grad_after[tconv_after_operands + 1];
      g = tconv_after_grad<accum_t>(normal * norm[c].weight + norm[c].bias, g, channel, element, operands, grad_after);
      keep_after(grad_after, sums, element, grad_operands);
#if TCONV_NORM_AFFINE
      constexpr int kAffineSum = TCONV_NORM_SUM + (TCONV_NORM == 3 ? 2 : 0);
      sums[kAffineSum] += g * normal;
      sums[kAffineSum + 1] += g;
#endif
      g = g * norm[c].weight;
#if TCONV_NORM == 3
      sums[TCONV_NORM_SUM] -= g * rstd;
      sums[TCONV_NORM_SUM + 1] -= g * normal * rstd * rstd * accum_t(0.5);
      g = g * rstd;
#else
      g = (g - (sum + normal * sum_normal) * share) * rstd;
#endif
#endif
      accum_t grad_before[tconv_epilogue_operands + 1];
      g = tconv_epilogue_grad<accum_t>(x, g, channel, element, operands, grad_before);
      keep_before(grad_before, sums, element, grad_operands);
      result[i] = narrow<storage_t>(g);
    }
    if (a.output) walk.store<kWhole>(a, a.output, base, result);
  });
#if TCONV_SUMS
  add_row(walk, total);
  store_partial<TCONV_SUMS>(a, walk, total, 0);
#endif
}
#endif

#ifdef TCONV_ENTRY_finish_channel_sums
// Per quantity and channel, over (b, chunk) in a fixed order.
ENTRY(finish_channel_sums) {
  (void)operands;
  const Mergers mergers(a);
  const long long index = mergers.index, count = a.batch * a.chunks;
  const bool exists = index < TCONV_SUMS * a.channels;
  double sum[1] = {0};
  for (long long i = mergers.lane; exists && i < count; i += mergers.count) sum[0] += a.partial[index * count + i];
  reduce_merged<AddDoubles>(mergers, sum);
  void* to = exists ? grad_operands.at[kSumSlot[index / a.channels]] : nullptr;
  if (mergers.lane == 0 && to)
    static_cast<operand_t*>(to)[index % a.channels] = narrow<operand_t>(static_cast<accum_t>(sum[0]));
}
#endif
