// channel_sum — bias gradient: the sum of grad_output over batch and positions, per channel.
// Computes  grad_bias[c] = sum over b, o of grad_output[b, c, o]
// Method    a block adds one segment of positions of one channel (channels_last: of 32 neighbouring channels); the
//           partial sums are added in segment order by one warp per channel
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "convert.cuh"

// partial: (channels, batch * segments)
extern "C" __global__ void __launch_bounds__(256)
    channel_sum(const storage_t* grad_output, float* partial, int channels, long long positions, int segments,
                long long length) {
  __shared__ float sums[8][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if TCONV_CHANNELS_LAST
  unsigned index = blockIdx.x;
  const int segment = index % segments;
  index /= segments;
  const int strips = (channels + 31) / 32;
  const int channel = index % strips * 32 + lane;
  const long long b = index / strips;
  const long long begin = segment * length, end = begin + length < positions ? begin + length : positions;
  float sum = 0.f;
  if (channel < channels) {
    const storage_t* from = grad_output + (b * positions + begin + warp) * channels + channel;
#pragma unroll 4
    for (long long p = begin + warp; p < end; p += 8, from += 8ll * channels) sum += widen(*from);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int w = 1; w < 8; ++w) sum += sums[w][lane];
  if (channel < channels)
    partial[(channel * (long long)(gridDim.x / (strips * segments)) + b) * segments + segment] = sum;
#else
  unsigned index = blockIdx.x;
  const int segment = index % segments;
  index /= segments;
  const int channel = index % channels;
  const long long b = index / channels;
  const long long begin = segment * length, end = begin + length < positions ? begin + length : positions;
  const storage_t* from = grad_output + (b * channels + channel) * positions;
  float sum = 0.f;
#pragma unroll 8
  for (long long p = begin + threadIdx.x; p < end; p += 256) sum += widen(from[p]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (lane == 0) sums[0][warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int w = 1; w < 8; ++w) sum += sums[0][w];
  partial[(channel * (long long)(gridDim.x / (channels * segments)) + b) * segments + segment] = sum;
#endif
}

extern "C" __global__ void __launch_bounds__(32)
    channel_sum_finish(const float* partial, storage_t* grad_bias, int count) {
  const float* from = partial + blockIdx.x * (long long)count;
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += 32) sum += from[i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x == 0) grad_bias[blockIdx.x] = narrow<storage_t>(sum);
}
