// partial_sums_sm90.cuh — sums of weight-gradient kernels on their way to memory (sm_90a).
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "wgmma_sm90.cuh"

// Sums of a thread to a block's partial sum of weights in memory, or, behind the first, added to it: fragments of 8 columns,
// which the 128 threads of a warpgroup store side by side.
template <int kSets, int kSums>
__device__ __forceinline__ void flush_sums(float4* partial, const float (&sum)[kSets][kSums], bool first) {
#pragma unroll
  for (int j = 0; j < kSets; ++j)
#pragma unroll
    for (int n8 = 0; n8 < kSums / 4; ++n8) {
      float4* to = partial + (j * (kSums / 4) + n8) * 128;
      float4 value = make_float4(sum[j][4 * n8], sum[j][4 * n8 + 1], sum[j][4 * n8 + 2], sum[j][4 * n8 + 3]);
      if (!first) {
        const float4 before = *to;
        value = make_float4(value.x + before.x, value.y + before.y, value.z + before.z, value.w + before.w);
      }
      *to = value;
    }
}
