// channel_sum — bias gradient: the sum of grad_output over batch and positions, per channel.
// Computes  grad_bias[c] = sum over b, o of grad_output[b, c, o]
// Method    a block adds one segment of positions of one channel (channels_last: of up to 32 neighbouring channels, with
//           the other threads on other positions); the partial sums are added in segment order by one warp per channel
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "convert.cuh"

constexpr int kThreads = 256, kChannels = TCONV_CO * TCONV_GROUPS;
// Neighbouring threads on neighbouring channels, a power of two of them. A single channel lies as in a contiguous tensor.
constexpr int kLanes = !TCONV_CHANNELS_LAST || kChannels == 1 ? 1
                       : kChannels > 16                       ? 32
                       : kChannels > 8                        ? 16
                       : kChannels > 4                        ? 8
                       : kChannels > 2                        ? 4
                                                              : 2;

// partial: (channels, batch * segments)
extern "C" __global__ void __launch_bounds__(kThreads)
    channel_sum(const storage_t* grad_output, float* partial, long long positions, int segments, long long length) {
  __shared__ float sums[kThreads];
  constexpr int kStrips = (kChannels + kLanes - 1) / kLanes, kRows = kThreads / kLanes;
  constexpr int kStep = kLanes == 1 ? 1 : kChannels;  // elements between positions
  unsigned index = blockIdx.x;
  const int segment = index % segments;
  index /= segments;
  const int channel = index % kStrips * kLanes + threadIdx.x % kLanes;
  const long long b = index / kStrips, batch = gridDim.x / (kStrips * segments);
  const long long begin = segment * length, end = begin + length < positions ? begin + length : positions;
  float sum = 0.f;
  if (channel < kChannels) {
    const long long first = begin + threadIdx.x / kLanes;
    const storage_t* from = grad_output + (kLanes == 1 ? (b * kChannels + channel) * positions + first
                                                       : (b * positions + first) * kChannels + channel);
#pragma unroll 8
    for (long long p = first; p < end; p += kRows, from += kRows * kStep) sum += widen(*from);
  }
  sums[threadIdx.x] = sum;
#pragma unroll
  for (int step = kThreads / 2; step >= kLanes; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x < kLanes && channel < kChannels)
    partial[(channel * batch + b) * segments + segment] = sums[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32)
    channel_sum_finish(const float* partial, storage_t* grad_bias, int count) {
  wait_for_kernel_before();  // adds the segments
  const float* from = partial + blockIdx.x * (long long)count;
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += 32) sum += from[i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = narrow<storage_t>(sum);
}
