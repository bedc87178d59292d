// finish_group_sm90 — group_norm and what follows it, with its statistics, reading the input once (sm_90).
// Computes  output = after(norm(before(pre(input) + bias)))
// Method    the channels of a group lie side by side in a contiguous tensor. Eight blocks of a cluster take an eighth each of
//           one image's group: they work out its moments, keep what they read in shared memory as far as it goes, exchange
//           their moments through the cluster's memory, and apply. What did not fit is read again soon enough to be in L2.
//           finish.cu reads the tensor twice: 3 transfers where this takes 2. Moments are merged in a fixed order.
// Refuses   channels_last, fp64, groups or channels of less than 16 bytes (see finish_group_sm90.cpp)
// Reads as  1 locate · 2 load · 4 epilogue · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "finish_moments.cuh"

constexpr int kThreads = 1024, kBlocks = 8;
constexpr int kPack = 16 / static_cast<int>(sizeof(storage_t));
constexpr int kUnroll = sizeof(storage_t) == 4 ? 4 : 2;  // packs under way: 64 KB a multiprocessor, and 64 registers

struct GroupArgs {
  const storage_t* input;
  output_t* output;
  const void* bias;
  float* mean;  // [image][group]
  float* rstd;
  int channels, groups;
  unsigned positions;            // of a channel, no fewer than a pack has
  int group_packs, block_packs;  // packs of 16 bytes: of a group, of a block
  int kept;                      // packs per thread that shared memory holds
  int packed;                    // both tensors are aligned for packs
};

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
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
};

extern "C" __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    finish_group(const GroupArgs a, const Operands operands) {
  extern __shared__ __align__(16) uint4 kept[];
  __shared__ float of_warp[kThreads / 32][3];
  __shared__ double of_block[3];
  __shared__ float result[2];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;

  // 1 locate
  const int block = static_cast<int>(blockIdx.x % kBlocks);
  const unsigned statistic = blockIdx.x / kBlocks;
  const int per_group = a.channels / a.groups, channel0 = static_cast<int>(statistic % a.groups) * per_group;
  const long long start = static_cast<long long>(statistic) * per_group * static_cast<long long>(a.positions);
  const int begin = block * a.block_packs, end = min(begin + a.block_packs, a.group_packs);

  // 2 load
  float n = 0, mean = 0, m2 = 0;
  Channels channel(a, channel0, begin + thread);
  for (int base = begin + thread, slot = 0; base < end; base += kUnroll * kThreads, slot += kUnroll) {
    storage_t raw[kUnroll][kPack];
    float x[kUnroll][kPack], sum = 0, squares = 0;
    int count = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (base + u * kThreads < end) load(a, start + static_cast<long long>(base + u * kThreads) * kPack, raw[u]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pack = base + u * kThreads;
      const bool exists = pack < end;
      if (exists && slot + u < a.kept) kept[(slot + u) * kThreads + thread] = unit_of(raw[u]);
      if (exists) channel.walk(pack);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        x[u][j] = exists ? before(a.bias, raw[u][j], channel.of(pack, j),
                                  start + static_cast<long long>(pack) * kPack + j, operands)
                         : 0.f;
        sum += x[u][j];
      }
      count += exists ? kPack : 0;
    }
    const float of = static_cast<float>(count), middle = sum / of;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float distance = x[u][j] - middle;
        squares += base + u * kThreads < end ? distance * distance : 0.f;
      }
    merge_moments(n, mean, m2, of, middle, squares);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_n = __shfl_down_sync(0xffffffffu, n, distance);
    const float other_mean = __shfl_down_sync(0xffffffffu, mean, distance);
    const float other_m2 = __shfl_down_sync(0xffffffffu, m2, distance);
    if (lane + distance < 32) merge_moments(n, mean, m2, other_n, other_mean, other_m2);
  }
  if (lane == 0) of_warp[thread / 32][0] = n, of_warp[thread / 32][1] = mean, of_warp[thread / 32][2] = m2;
  __syncthreads();
  if (thread == 0) {  // in double, because there are few
    double moments[3] = {0, 0, 0};
    for (int warp = 0; warp < kThreads / 32; ++warp)
      merge_moments<double>(moments[0], moments[1], moments[2], of_warp[warp][0], of_warp[warp][1], of_warp[warp][2]);
    for (int i = 0; i < 3; ++i) of_block[i] = moments[i];
  }
  cluster_arrive();
  cluster_wait();
  if (thread == 0) {
    double moments[3] = {0, 0, 0};
    for (int other = 0; other < kBlocks; ++other)
      merge_moments(moments[0], moments[1], moments[2], cluster_load(of_block, other),
                    cluster_load(of_block + 1, other), cluster_load(of_block + 2, other));
    result[0] = static_cast<float>(moments[1]);
    result[1] = static_cast<float>(1 / sqrt(moments[2] / moments[0] + double(TCONV_NORM_EPS)));
    if (block == 0) {
      a.mean[statistic] = result[0];
      a.rstd[statistic] = result[1];
    }
  }
  cluster_arrive();  // waited for at the end: until then others may read this block's moments
  __syncthreads();

  // 4 epilogue
  const float group_mean = result[0], group_rstd = result[1];
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
  for (int base = begin + thread, slot = 0; base < end; base += kUnroll * kThreads, slot += kUnroll) {
    storage_t raw[kUnroll][kPack];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pack = base + u * kThreads;
      if (pack >= end) continue;
      if (slot + u < a.kept)
        load_pack(raw[u], reinterpret_cast<const storage_t*>(kept + (slot + u) * kThreads + thread));
      else
        load(a, start + static_cast<long long>(pack) * kPack, raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int pack = base + u * kThreads;
      if (pack >= end) continue;
      if (channel.walk(pack)) affine();
      const long long element = start + static_cast<long long>(pack) * kPack;
      output_t results[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const int c = channel.of(pack, j);
        float x = (before(a.bias, raw[u][j], c, element + j, operands) - group_mean) * group_rstd;
        x = c == channel.first ? x * weight[0] + bias[0] : x * weight[1] + bias[1];
        results[j] = narrow<output_t>(tconv_after<float>(x, c, element + j, operands));
      }
      // 5 store
      if (a.packed) {
        store_pack(a.output + element, results);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) a.output[element + j] = results[j];
      }
    }
  }
  cluster_wait();
}
