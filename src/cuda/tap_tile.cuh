// tap_tile.cuh — staging a tile of positions as fp32 words, for the tap_gemm_grad_weight kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "mma_sm80.cuh"

// Where a word of the tile lies: units of 4 positions of one channel (pitch in units), or rows of positions.
template <bool kUnits, int kPitch>
__device__ __forceinline__ int word_at(int channel, int p) {
  return kUnits ? (p / 4 * kPitch + channel) * 4 + p % 4 : channel * kPitch + p;
}

// kChannels channels from first_channel on (kTotal exist) at kPositions positions; locate(p) is the offset of a position
// in a channel's plane, or -1 where it is zero. fp32 travels asynchronously, 16-bit values are widened, which is exact.
template <int kThreads, int kChannels, int kPitch, int kPositions, int kTotal, bool kUnits, typename Locate>
__device__ __forceinline__ void load_tile(unsigned* tile, const storage_t* base, long long plane, int first_channel,
                                          Locate locate) {
#if TCONV_CHANNELS_LAST
  // Eight lanes take 32 bytes of neighbouring channels, four such groups four positions: whole sectors from memory, and
  // banks that collide twice at most.
  constexpr int kPer = sizeof(storage_t) == 2 && kTotal % 2 == 0 ? 2 : 1;  // channels a load; even offsets stay aligned
  constexpr int kLanes = kChannels / kPer < 8 ? kChannels / kPer : 8;
  constexpr int kTurns = kChannels / (kPer * kLanes);
  const int lane = threadIdx.x % kLanes;
#if TG_ASYNC
#pragma unroll 2
  for (int p = threadIdx.x / kLanes; p < kPositions; p += kThreads / kLanes) {
    const long long at = locate(p);
    const storage_t* from = base + (at >= 0 ? at * (kTotal * TCONV_GROUPS) + first_channel + lane : 0);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int channel = turn * kLanes + lane;
      const bool valid = at >= 0 && (kTotal % kChannels == 0 || first_channel + channel < kTotal);
      copy_async_4(tile + word_at<kUnits, kPitch>(channel, p), valid ? from + turn * kLanes : base, valid);
    }
  }
#else
  constexpr int kAtOnce = kTurns >= 8 ? 1 : 8 / kTurns;  // positions: eight loads under way before the first store
  for (int p0 = threadIdx.x / kLanes; p0 < kPositions; p0 += kAtOnce * (kThreads / kLanes)) {
    unsigned word[kAtOnce][kTurns];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int p = p0 + i * (kThreads / kLanes);
      const long long at = p < kPositions ? locate(p) : -1;
      const storage_t* from = base + (at >= 0 ? at * (kTotal * TCONV_GROUPS) + first_channel + lane * kPer : 0);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int channel = (turn * kLanes + lane) * kPer;
        const bool valid = at >= 0 && (kTotal % kChannels == 0 || first_channel + channel < kTotal);
        word[i][turn] = 0;
        if (valid) {
          const storage_t* first = from + turn * kLanes * kPer;
          if (kPer == 2 && a_pair_is_aligned(first))
            word[i][turn] = *reinterpret_cast<const unsigned*>(first);
          else
            word[i][turn] = kPer == 2 ? pack_words(first[0], first[kPer - 1]) : word_of(first[0]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int p = p0 + i * (kThreads / kLanes);
      if (p >= kPositions) break;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int channel = (turn * kLanes + lane) * kPer;
        tile[word_at<kUnits, kPitch>(channel, p)] = __float_as_uint(widen(low_half<storage_t>(word[i][turn])));
        if (kPer == 2)
          tile[word_at<kUnits, kPitch>(channel + 1, p)] =
              __float_as_uint(widen(low_half<storage_t>(word[i][turn] >> 16)));
      }
    }
  }
#endif
#else
  // A thread owns a position and walks the channels, so bounds and addresses are worked out once per position.
  constexpr int kLines = (kPositions + 31) / 32 * 32;
  constexpr int kTeams = kThreads / kLines > 0 ? kThreads / kLines : 1;
  constexpr int kLanes = kTeams > 1 ? kLines : kThreads;
  const int team = kTeams > 1 ? threadIdx.x / kLines : 0;
  if (team >= kTeams) return;
  for (int p = kTeams > 1 ? threadIdx.x % kLines : threadIdx.x; p < kPositions; p += kLanes) {
    const long long at = locate(p);
    const storage_t* from = base + (at >= 0 ? at : 0) + (first_channel + team) * plane;
    unsigned* to = tile + word_at<kUnits, kPitch>(team, p);
#pragma unroll(TG_ASYNC ? 8 : 16)
    for (int channel = team; channel < kChannels; channel += kTeams) {
      const bool valid = at >= 0 && (kTotal % kChannels == 0 || first_channel + channel < kTotal);
#if TG_ASYNC
      copy_async_4(to, valid ? from : base, valid);
#else
      *to = valid ? __float_as_uint(widen(*from)) : 0u;
#endif
      from += plane * kTeams;
      to += (kUnits ? 4 : kPitch) * kTeams;
    }
  }
#endif
}
