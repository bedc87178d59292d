// finish_group_sm90 — group_norm and what follows it, with its statistics, reading the input once (sm_90).
// Computes  output = after(norm(before(pre(input) + bias)))
// Method    the channels of a group lie side by side in a contiguous tensor. Eight blocks of a cluster take an eighth each of
//           one image's group: they work out its moments, keep what they read in shared memory as far as it goes, exchange
//           their moments through the cluster's memory, and apply. What did not fit is read again soon enough to be in L2.
//           A cluster walks over groups: a place in shared memory that has been read for the last time is filled for the
//           next group at once, so that the memory reads while it writes. Every thread reads only what it fetched itself.
//           finish.cu reads the tensor twice: 3 transfers where this takes 2. Moments are merged in a fixed order.
// Refuses   channels_last, fp64, groups or channels of less than 16 bytes (see finish_group_sm90.cpp)
// Reads as  1 locate · 2 load · 4 epilogue · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "finish_moments.cuh"

constexpr int kThreads = 512, kBlocks = 8;
constexpr int kPack = 16 / static_cast<int>(sizeof(storage_t));
constexpr int kUnroll = sizeof(storage_t) == 4 ? 4 : 2;  // packs at once

// Moments of up to 32 sets, one to a lane, as those of all; at every lane, with one division. In double, because that is
// cheap for a few: merged one by one, the sets of a group took as long as reading them.
struct Moments {
  double n, mean, m2;
  __device__ __forceinline__ Moments all() const {
    const double count = sum(n), middle = sum(n * mean) / count, distance = mean - middle;
    return {count, middle, sum(m2 + n * distance * distance)};
  }
  static __device__ __forceinline__ double sum(double x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }
};

// What stands before the norm is kept in place of what was read where that loses nothing, instead of computed again.
constexpr bool kKeepsResult = sizeof(storage_t) == 4 && (TCONV_OPS > 0 || TCONV_BIAS || TCONV_PRE);

struct GroupArgs {
  const storage_t* input;
  output_t* output;
  const void* bias;
  float* mean;  // [image][group]
  float* rstd;
  int channels, groups;
  unsigned positions;            // of a channel, no fewer than a pack has
  unsigned statistics;           // images times groups
  int group_packs, block_packs;  // packs of 16 bytes: of a group, of a block
  int kept;                      // packs per thread that shared memory holds
  int packed;                    // both tensors are aligned for packs
};

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// Without making what was written visible: where only reads have to be over.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// A number in the shared memory of another block of the cluster, named by its place in one's own.
__device__ __forceinline__ double cluster_load(const double* own, int block) {
  double value;
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.f64 %0, [there]; }"
               : "=d"(value)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(block)
               : "memory");
  return value;
}

__device__ __forceinline__ void load(const GroupArgs& a, long long element, storage_t (&item)[kPack]) {
  if (a.packed) {
    load_pack(item, a.input + element);
  } else {
#pragma unroll
    for (int j = 0; j < kPack; ++j) item[j] = a.input[element + j];
  }
}
// To a place in shared memory, asynchronously where the address allows.
__device__ __forceinline__ void fetch(const GroupArgs& a, long long element, uint4* to) {
  if (a.packed) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(a.input + element)
                 : "memory");
  } else {
    storage_t item[kPack];
    load(a, element, item);
    *to = unit_of(item);
  }
}

// The channels of the packs that a thread walks over in order: `first`, and from item `change` of the group on the next.
// Without a division per pack.
struct Channels {
  int first;
  unsigned change, positions;
  __device__ __forceinline__ Channels(const GroupArgs& a, int channel0, int pack) : positions(a.positions) {
    const unsigned channel = static_cast<unsigned>(pack) * kPack / positions;
    first = channel0 + static_cast<int>(channel);
    change = (channel + 1) * positions;
  }
  // True where the first channel of this pack is another than before.
  __device__ __forceinline__ bool walk(int pack) {
    const int before = first;
    for (; static_cast<unsigned>(pack) * kPack >= change; change += positions) ++first;
    return first != before;
  }
  __device__ __forceinline__ int of(int pack, int item) const {
    return first + (static_cast<unsigned>(pack) * kPack + item >= change);
  }
  __device__ __forceinline__ bool single(int pack) const {
    return static_cast<unsigned>(pack) * kPack + (kPack - 1) < change;
  }
};

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    finish_group(const GroupArgs a, const Operands operands) {
  extern __shared__ __align__(16) uint4 kept[];
  __shared__ float of_warp[kThreads / 32][3];
  __shared__ double of_block[3];
  __shared__ float result[2];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;

  // 1 locate
  const int block = static_cast<int>(blockIdx.x % kBlocks), per_group = a.channels / a.groups;
  const int begin = block * a.block_packs, end = min(begin + a.block_packs, a.group_packs);
  auto start_of = [&](unsigned statistic) {
    return static_cast<long long>(statistic) * per_group * static_cast<long long>(a.positions);
  };
  unsigned statistic = blockIdx.x / kBlocks;
  for (int slot = 0, pack = begin + thread; slot < a.kept && pack < end; ++slot, pack += kThreads)
    fetch(a, start_of(statistic) + static_cast<long long>(pack) * kPack, kept + slot * kThreads + thread);

  for (bool again = false; statistic < a.statistics; statistic += gridDim.x / kBlocks, again = true) {
    const int channel0 = static_cast<int>(statistic % a.groups) * per_group;
    const long long start = start_of(statistic);
    asm volatile("cp.async.wait_all;" ::: "memory");

    // 2 load
    float n = 0, mean = 0, m2 = 0;
    Channels channel(a, channel0, begin + thread);
    auto add = [&](auto whole, int base, int slot) {
      constexpr bool kWhole = decltype(whole)::value;
      storage_t raw[kUnroll][kPack];
      float x[kUnroll][kPack], sum = 0, squares = 0;
      int count = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!kWhole && base + u * kThreads >= end) continue;
        if (slot + u < a.kept)
          load_pack(raw[u], reinterpret_cast<const storage_t*>(kept + (slot + u) * kThreads + thread));
        else
          load(a, start + static_cast<long long>(base + u * kThreads) * kPack, raw[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int pack = base + u * kThreads;
        const bool exists = kWhole || pack < end;
        if (exists) channel.walk(pack);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          x[u][j] = exists ? before(a.bias, raw[u][j], channel.of(pack, j),
                                    start + static_cast<long long>(pack) * kPack + j, operands)
                           : 0.f;
          sum += x[u][j];
        }
        if constexpr (kKeepsResult)
          if (exists && slot + u < a.kept) kept[(slot + u) * kThreads + thread] = unit_of(x[u]);
        count += exists ? kPack : 0;
      }
      const float of = static_cast<float>(count), middle = sum / of;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const float distance = x[u][j] - middle;
          squares += kWhole || base + u * kThreads < end ? distance * distance : 0.f;
        }
      merge_moments(n, mean, m2, of, middle, squares);
    };
    for (int base = begin + thread, slot = 0; base < end; base += kUnroll * kThreads, slot += kUnroll) {
      if (base + (kUnroll - 1) * kThreads < end)
        add(Flag<true>{}, base, slot);
      else
        add(Flag<false>{}, base, slot);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other_n = __shfl_down_sync(0xffffffffu, n, distance);
      const float other_mean = __shfl_down_sync(0xffffffffu, mean, distance);
      const float other_m2 = __shfl_down_sync(0xffffffffu, m2, distance);
      if (lane + distance < 32) merge_moments(n, mean, m2, other_n, other_mean, other_m2);
    }
    if (lane == 0) of_warp[thread / 32][0] = n, of_warp[thread / 32][1] = mean, of_warp[thread / 32][2] = m2;
    if (again) cluster_wait();  // nobody reads this block's moments of the last group any more
    __syncthreads();
    if (thread < 32) {
      Moments of_block_now{0, 0, 0};
      if (lane < kThreads / 32) of_block_now = {of_warp[lane][0], of_warp[lane][1], of_warp[lane][2]};
      of_block_now = of_block_now.all();
      if (lane == 0) of_block[0] = of_block_now.n, of_block[1] = of_block_now.mean, of_block[2] = of_block_now.m2;
    }
    cluster_arrive();
    cluster_wait();
    if (thread < 32) {
      Moments moments{0, 0, 0};
      if (lane < kBlocks)
        moments = {cluster_load(of_block, lane), cluster_load(of_block + 1, lane), cluster_load(of_block + 2, lane)};
      moments = moments.all();
      if (lane == 0) {
        result[0] = static_cast<float>(moments.mean);
        result[1] = static_cast<float>(1 / sqrt(moments.m2 / moments.n + double(TCONV_NORM_EPS)));
        if (block == 0) {
          a.mean[statistic] = result[0];
          a.rstd[statistic] = result[1];
        }
      }
    }
    cluster_arrive_relaxed();  // waited for before this block's moments change, and before it ends
    __syncthreads();

    // 4 epilogue
    const float group_mean = result[0], group_rstd = result[1];
    const unsigned next = statistic + gridDim.x / kBlocks;
    const long long next_start = start_of(next);
    channel = Channels(a, channel0, begin + thread);
    float weight[2] = {1, 1}, bias[2] = {0, 0};  // of the pack's first channel and the next
    auto affine = [&]() {
#if TCONV_NORM_AFFINE
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = min(channel.first + i, a.channels - 1);
        weight[i] = tconv_channel_operand<float>(operands, TCONV_NORM_SLOT, c);
        bias[i] = tconv_channel_operand<float>(operands, TCONV_NORM_SLOT + 1, c);
      }
#endif
    };
    if (begin + thread < end) affine();
    auto apply = [&](auto single, auto done, const storage_t(&raw)[kPack], int pack, long long element) {
      constexpr bool kSingle = decltype(single)::value;  // all items are of one channel
      constexpr bool kDone = decltype(done)::value;      // they are what the norm sees
      output_t results[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const int c = kSingle ? channel.first : channel.of(pack, j);
        float x = kDone ? widen(raw[j]) : before(a.bias, raw[j], c, element + j, operands);
        x = (x - group_mean) * group_rstd;
        x = kSingle || c == channel.first ? x * weight[0] + bias[0] : x * weight[1] + bias[1];
        results[j] = narrow<output_t>(tconv_after<float>(x, c, element + j, operands));
      }
      // 5 store
      if (a.packed) {
        store_pack(a.output + element, results);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) a.output[element + j] = results[j];
      }
    };
    for (int base = begin + thread, slot = 0; base < end; base += kUnroll * kThreads, slot += kUnroll) {
      storage_t raw[kUnroll][kPack];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int pack = base + u * kThreads;
        if (pack >= end) continue;
        if (slot + u < a.kept) {
          uint4* const place = kept + (slot + u) * kThreads + thread;
          load_pack(raw[u], reinterpret_cast<const storage_t*>(place));
          if (next < a.statistics) fetch(a, next_start + static_cast<long long>(pack) * kPack, place);
        } else {
          load(a, start + static_cast<long long>(pack) * kPack, raw[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int pack = base + u * kThreads;
        if (pack >= end) continue;
        if (channel.walk(pack)) affine();
        const long long element = start + static_cast<long long>(pack) * kPack;
        const bool done = kKeepsResult && slot + u < a.kept;
        if (channel.single(pack)) {
          if (done)
            apply(Flag<true>{}, Flag<kKeepsResult>{}, raw[u], pack, element);
          else
            apply(Flag<true>{}, Flag<false>{}, raw[u], pack, element);
        } else {
          if (done)
            apply(Flag<false>{}, Flag<kKeepsResult>{}, raw[u], pack, element);
          else
            apply(Flag<false>{}, Flag<false>{}, raw[u], pack, element);
        }
      }
    }
  }
  cluster_wait();
}
