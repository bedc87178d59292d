// finish — what a convolution leaves of its chain: pointwise operations and normalisation, and their gradients.
//
// Computes  output = after(norm(before(pre(input) + bias))), or for grad_epilogue the gradient of input and operands.
// Method    A thread keeps one (b, channel) and walks over positions, so that everything that belongs to a channel or
//           a group is loaded once and no index is divided. Contiguous: a row of positions in 16-byte packs, by 8 to 256
//           threads; channels_last: a thread per channel, neighbouring threads on neighbouring channels. Both are bound
//           by memory; 8 to 16 elements are loaded before any is used.
//           Statistics: (count, mean, M2) of 8 to 16 registers at a time, merged along the thread, the row and then the
//           rows of a group, always in the same order. They need a pass of their own (a group's result depends on all of
//           it), then the apply pass reads the input a second time: 3 transfers where a pointwise pass needs 2.
//           Gradients: one pass for the sums that a norm's gradient needs, one for everything else; sums over a channel
//           as partials that a last kernel adds in a fixed order.
// Refuses   Other directions.
// Reads as  Walk, reductions, then the entries in the order in which they are launched.
// SPDX-License-Identifier: Apache-2.0
#include "finish_moments.cuh"

// Defined by finish.cpp: TCONV_NORM (0 none, 1 group_norm, 2 layer_norm, 3 batch_norm), TCONV_NORM_AFFINE,
// TCONV_NORM_SLOT, TCONV_NORM_EPS; for gradients TCONV_SUMS, TCONV_NORM_SUM, kSumSlot, keep_before and keep_after.

constexpr int kThreads = 256;
constexpr int kPack = TCONV_CHANNELS_LAST ? 1 : 16 / static_cast<int>(sizeof(storage_t));
// Bytes in flight hide the latency of memory: 2048 threads of a multiprocessor times 32 bytes are 64 KB, twice what
// 4.3 TB/s over 132 multiprocessors and 0.8 us need.
constexpr int kUnroll = TCONV_CHANNELS_LAST ? 8 : 2;
constexpr int kBatch = kPack * kUnroll;

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
  long long packed;         // all tensors are aligned for packs
};

// The positions of one thread. Those of one step are kBatch, in kUnroll packs.
struct Walk {
  long long b, row, first, last, begin, units, slot;
  int channel, lane, lanes, columns;  // columns: rows side by side in the block
  bool active;

  __device__ explicit Walk(const Arguments& a) {
    const int thread = static_cast<int>(threadIdx.x);
    unsigned block = blockIdx.x, chunk = 0;  // rows are fewer than 2^32
    const unsigned chunks = static_cast<unsigned>(a.chunks), channels = static_cast<unsigned>(a.channels);
#if TCONV_CHANNELS_LAST
    chunk = block % chunks;
    block /= chunks;
    const unsigned tiles = (channels + kThreads - 1) / kThreads, tile = block % tiles * kThreads;
    columns = static_cast<int>(channels - tile < kThreads ? channels - tile : kThreads);
    b = block / tiles;
    lanes = kThreads / columns;
    lane = thread / columns;
    channel = static_cast<int>(tile) + thread % columns;
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

  // Item j of pack u, in the step that starts at unit `base`: its offset in memory, its position, and whether it exists.
  __device__ long long element(const Arguments& a, long long base, int u, int j) const {
    const long long unit = begin + base + static_cast<long long>(u) * lanes + lane;
#if TCONV_CHANNELS_LAST
    return row + unit * a.channels;
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
  __device__ bool exists(const Arguments& a, long long base, int u, int j) const {
    const long long p = position(a, base, u, j);
    return p >= first && p < last;
  }

  template <typename S>
  __device__ void load(const Arguments& a, const void* from, long long base, S (&item)[kBatch]) const {
    const S* pointer = static_cast<const S*>(from);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kPack > 1 && a.packed && exists(a, base, u, 0) && exists(a, base, u, kPack - 1)) {
        S pack[kPack];
        load_pack(pack, pointer + element(a, base, u, 0));
#pragma unroll
        for (int j = 0; j < kPack; ++j) item[u * kPack + j] = pack[j];
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          item[u * kPack + j] = S{};
          if (exists(a, base, u, j)) item[u * kPack + j] = pointer[element(a, base, u, j)];
        }
      }
    }
  }
  template <typename S>
  __device__ void store(const Arguments& a, void* to, long long base, const S (&item)[kBatch]) const {
    S* pointer = static_cast<S*>(to);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kPack > 1 && a.packed && exists(a, base, u, 0) && exists(a, base, u, kPack - 1)) {
        S pack[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) pack[j] = item[u * kPack + j];
        store_pack(pointer + element(a, base, u, 0), pack);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (exists(a, base, u, j)) pointer[element(a, base, u, j)] = item[u * kPack + j];
        }
      }
    }
  }
};

// Steps of a thread over its part of the row.
#define EACH_STEP(walk, base) \
  for (long long base = 0; base < (walk).units; base += static_cast<long long>((walk).lanes) * kUnroll)

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

// The values of all threads that share a row, at its lane 0; every thread of the block must call.
template <class Merge, int count>
__device__ Values<count> reduce_row(const Walk& walk, Values<count> value) {
  const int thread = static_cast<int>(threadIdx.x);
#if TCONV_CHANNELS_LAST
  __shared__ Values<count> stage[kThreads];
  stage[thread] = value;
  __syncthreads();
  if (walk.lane == 0) {
    for (int lane = 1; lane < walk.lanes; ++lane) Merge::into(value, stage[thread + lane * walk.columns]);
  }
#else
  __shared__ Values<count> stage[kThreads / 32];
  const int width = walk.lanes < 32 ? walk.lanes : 32;
  for (int distance = width / 2; distance > 0; distance /= 2) {
    Values<count> other;
#pragma unroll
    for (int i = 0; i < count; ++i) other.at[i] = __shfl_down_sync(0xffffffffu, value.at[i], distance, width);
    if (walk.lane % width + distance < width) Merge::into(value, other);
  }
  if (walk.lanes > 32) {
    if (thread % 32 == 0) stage[thread / 32] = value;
    __syncthreads();
    if (walk.lane == 0) {
      for (int warp = 1; warp < walk.lanes / 32; ++warp) Merge::into(value, stage[thread / 32 + warp]);
    }
  }
#endif
  return value;
}

// Where the statistics of an element are.
__device__ __forceinline__ long long statistic(const Arguments& a, const Walk& walk, long long position) {
#if TCONV_NORM == 1
  return walk.b * a.groups + walk.channel / static_cast<int>(a.channels / a.groups);
#else
  return walk.b * a.positions + position;
#endif
}

// The normalisation at one channel: weight and bias, and for batch_norm mean and rstd.
struct Norm {
  accum_t weight = 1, bias = 0, mean = 0, rstd = 1;

  __device__ Norm(const Arguments& a, const Walk& walk, const Operands& operands) {
    (void)a, (void)operands;
    if (!walk.active) return;
#if TCONV_NORM_AFFINE
    constexpr int kAffine = TCONV_NORM_SLOT + (TCONV_NORM == 3 ? 2 : 0);
    weight = tconv_channel_operand<accum_t>(operands, kAffine, walk.channel);
    bias = tconv_channel_operand<accum_t>(operands, kAffine + 1, walk.channel);
#endif
#if TCONV_NORM == 1
    mean = a.mean[statistic(a, walk, 0)];
    rstd = a.rstd[statistic(a, walk, 0)];
#elif TCONV_NORM == 3
    mean = tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT, walk.channel);
    rstd = accum_t(1) /
           sqrt(tconv_channel_operand<accum_t>(operands, TCONV_NORM_SLOT + 1, walk.channel) + accum_t(TCONV_NORM_EPS));
#endif
  }
};

// At least two blocks of a multiprocessor: without a number the compiler aims at more and spills in long chains.
#define ENTRY(name)                                         \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) \
      name(const Arguments a, const Operands operands, const GradOperands grad_operands)

#ifdef TCONV_ENTRY_finish_row_moments
// Mean and M2 of every piece of a row; how many elements it has is known to whoever merges.
ENTRY(finish_row_moments) {
  (void)grad_operands;
  const Walk walk(a);
  Values<3> total{};
  EACH_STEP(walk, base) {
    storage_t raw[kBatch];
    walk.load(a, a.input, base, raw);
    accum_t x[kBatch], sum = 0, m2 = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool exists = walk.exists(a, base, i / kPack, i % kPack);
      x[i] = exists ? before(a.bias, raw[i], walk.channel, walk.element(a, base, i / kPack, i % kPack), operands)
                    : accum_t(0);
      sum += x[i];
      count += exists;
    }
    const accum_t n = static_cast<accum_t>(count);
    const accum_t mean = count ? sum / n : accum_t(0);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const accum_t distance = x[i] - mean;
      m2 += walk.exists(a, base, i / kPack, i % kPack) ? distance * distance : accum_t(0);
    }
    merge_moments(total.at[0], total.at[1], total.at[2], n, mean, m2);
  }
  total = reduce_row<MergeMoments>(walk, total);
  if (walk.active && walk.lane == 0) {
    a.partial[walk.slot] = total.at[1];
    a.partial[a.channels * a.batch * a.chunks + walk.slot] = total.at[2];
  }
}
#endif

#ifdef TCONV_ENTRY_finish_merge_moments
// One warp per (b, group): merges its pieces, in double because there are few.
ENTRY(finish_merge_moments) {
  (void)operands, (void)grad_operands;
  const long long s = static_cast<long long>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (s >= a.statistics) return;
  const long long per_group = a.channels / a.groups, b = s / a.groups, first = s % a.groups * per_group;
  const long long quantity = a.channels * a.batch * a.chunks;
  double n = 0, mean = 0, m2 = 0;
  for (long long i = lane; i < per_group * a.chunks; i += 32) {
    const long long chunk = i % a.chunks, slot = ((first + i / a.chunks) * a.batch + b) * a.chunks + chunk;
    const long long begin = chunk * a.chunk, end = begin + a.chunk < a.positions ? begin + a.chunk : a.positions;
    merge_moments<double>(n, mean, m2, static_cast<double>(end - begin), a.partial[slot], a.partial[quantity + slot]);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const double other_n = __shfl_down_sync(0xffffffffu, n, distance);
    const double other_mean = __shfl_down_sync(0xffffffffu, mean, distance);
    const double other_m2 = __shfl_down_sync(0xffffffffu, m2, distance);
    if (lane + distance < 32) merge_moments(n, mean, m2, other_n, other_mean, other_m2);
  }
  if (lane == 0) {
    a.mean[s] = static_cast<accum_t>(mean);
    a.rstd[s] = static_cast<accum_t>(1 / sqrt(m2 / n + double(TCONV_NORM_EPS)));
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
#if TCONV_NORM
  const Norm norm(a, walk, operands);
#endif
  EACH_STEP(walk, base) {
    storage_t raw[kBatch];
    output_t result[kBatch];
    walk.load(a, a.input, base, raw);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      result[i] = output_t{};
      if (!walk.exists(a, base, i / kPack, i % kPack)) continue;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      accum_t x = before(a.bias, raw[i], walk.channel, element, operands);
#if TCONV_NORM
      accum_t mean = norm.mean, rstd = norm.rstd;
#if TCONV_NORM == 2
      const long long s = statistic(a, walk, walk.position(a, base, i / kPack, i % kPack));
      mean = a.mean[s];
      rstd = a.rstd[s];
#endif
      x = (x - mean) * rstd;
#if TCONV_NORM_AFFINE
      x = x * norm.weight + norm.bias;
#endif
      x = tconv_after<accum_t>(x, walk.channel, element, operands);
#endif
      result[i] = narrow<output_t>(x);
    }
    walk.store(a, a.output, base, result);
  }
}
#endif

#ifdef TCONV_ENTRY_finish_grad_rows
// Per piece of a row: the sums of g and of g times the normalised value, where g is the gradient of the norm's result.
ENTRY(finish_grad_rows) {
  (void)grad_operands;
  const Walk walk(a);
  const Norm norm(a, walk, operands);
  Values<2> total{};
  EACH_STEP(walk, base) {
    storage_t raw[kBatch];
    output_t grad[kBatch];
    walk.load(a, a.input, base, raw);
    walk.load(a, a.grad_output, base, grad);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!walk.exists(a, base, i / kPack, i % kPack)) continue;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      const accum_t normal = (before(a.bias, raw[i], walk.channel, element, operands) - norm.mean) * norm.rstd;
      accum_t unused[tconv_after_operands + 1];
      const accum_t g =
          tconv_after_grad<accum_t>(normal * norm.weight + norm.bias, static_cast<accum_t>(widen(grad[i])),
                                    walk.channel, element, operands, unused);
      total.at[0] += g;
      total.at[1] += g * normal;
    }
  }
  total = reduce_row<Add<2>>(walk, total);
  if (walk.active && walk.lane == 0) {
    a.partial[walk.slot] = total.at[0];
    a.partial[a.channels * a.batch * a.chunks + walk.slot] = total.at[1];
  }
}
#endif

#ifdef TCONV_ENTRY_finish_grad_merge
// One warp per (b, group): the two sums, weighted by each channel's weight.
ENTRY(finish_grad_merge) {
  (void)grad_operands, (void)operands;
  const long long s = static_cast<long long>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (s >= a.statistics) return;
  const long long per_group = a.channels / a.groups, b = s / a.groups, first = s % a.groups * per_group;
  const long long quantity = a.channels * a.batch * a.chunks;
  double sum = 0, sum_normal = 0;
  for (long long i = lane; i < per_group * a.chunks; i += 32) {
    const long long channel = first + i / a.chunks, slot = (channel * a.batch + b) * a.chunks + i % a.chunks;
    double weight = 1;
#if TCONV_NORM_AFFINE
    weight = tconv_channel_operand<double>(operands, TCONV_NORM_SLOT, static_cast<int>(channel));
#endif
    sum += weight * a.partial[slot];
    sum_normal += weight * a.partial[quantity + slot];
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, distance);
    sum_normal += __shfl_down_sync(0xffffffffu, sum_normal, distance);
  }
  if (lane == 0) {
    a.sums[s] = static_cast<accum_t>(sum);
    a.sums[a.statistics + s] = static_cast<accum_t>(sum_normal);
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
#if TCONV_NORM
  const Norm norm(a, walk, operands);
#endif
#if TCONV_NORM == 1
  const accum_t share = accum_t(1) / (static_cast<accum_t>(a.channels / a.groups) * static_cast<accum_t>(a.positions));
#elif TCONV_NORM == 2
  const accum_t share = accum_t(1) / static_cast<accum_t>(a.channels);
#endif
  Values<TCONV_SUMS + 1> total{};
  EACH_STEP(walk, base) {
    storage_t raw[kBatch], result[kBatch];
    output_t grad[kBatch];
    walk.load(a, a.input, base, raw);
    walk.load(a, a.grad_output, base, grad);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      result[i] = storage_t{};
      if (!walk.exists(a, base, i / kPack, i % kPack)) continue;
      const long long element = walk.element(a, base, i / kPack, i % kPack);
      accum_t g = static_cast<accum_t>(widen(grad[i]));
      const accum_t x = widen(raw[i]);
#if TCONV_NORM
      accum_t mean = norm.mean, rstd = norm.rstd;
#if TCONV_NORM == 1 || TCONV_NORM == 2
      const long long s = statistic(a, walk, walk.position(a, base, i / kPack, i % kPack));
      mean = a.mean[s];
      rstd = a.rstd[s];
#endif
      const accum_t normal = (tconv_epilogue<accum_t>(x, walk.channel, element, operands) - mean) * rstd;
      accum_t grad_after[tconv_after_operands + 1];
      g = tconv_after_grad<accum_t>(normal * norm.weight + norm.bias, g, walk.channel, element, operands, grad_after);
      keep_after(grad_after, total.at, element, grad_operands);
#if TCONV_NORM_AFFINE
      constexpr int kAffineSum = TCONV_NORM_SUM + (TCONV_NORM == 3 ? 2 : 0);
      total.at[kAffineSum] += g * normal;
      total.at[kAffineSum + 1] += g;
#endif
      g = g * norm.weight;
#if TCONV_NORM == 3
      total.at[TCONV_NORM_SUM] -= g * rstd;
      total.at[TCONV_NORM_SUM + 1] -= g * normal * rstd * rstd * accum_t(0.5);
      g = g * rstd;
#else
      g = (g - (a.sums[s] + normal * a.sums[a.statistics + s]) * share) * rstd;
#endif
#endif
      accum_t grad_before[tconv_epilogue_operands + 1];
      g = tconv_epilogue_grad<accum_t>(x, g, walk.channel, element, operands, grad_before);
      keep_before(grad_before, total.at, element, grad_operands);
      result[i] = narrow<storage_t>(g);
    }
    if (a.output) walk.store(a, a.output, base, result);
  }
#if TCONV_SUMS
  total = reduce_row<Add<TCONV_SUMS + 1>>(walk, total);
  if (walk.active && walk.lane == 0) {
    const long long quantity = a.channels * a.batch * a.chunks;
#pragma unroll
    for (int k = 0; k < TCONV_SUMS; ++k) a.partial[k * quantity + walk.slot] = total.at[k];
  }
#endif
}
#endif

#ifdef TCONV_ENTRY_finish_channel_sums
// One warp per quantity and channel, over (b, chunk) in a fixed order.
ENTRY(finish_channel_sums) {
  (void)operands;
  const long long index = static_cast<long long>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (index >= TCONV_SUMS * a.channels) return;
  void* to = grad_operands.at[kSumSlot[index / a.channels]];
  const long long count = a.batch * a.chunks;
  double sum = 0;
  for (long long i = lane; i < count; i += 32) sum += a.partial[index * count + i];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (lane == 0 && to) static_cast<operand_t*>(to)[index % a.channels] = narrow<operand_t>(static_cast<accum_t>(sum));
}
#endif
