// operands.cuh — reading bias and operands; included by the prelude once the types of the layer are known.
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Through the read-only path, so that what belongs to a channel is loaded once and not again behind every store.
template <typename S>
__device__ __forceinline__ S read_only(const void* from, int index) {
  if constexpr (sizeof(S) == 2)
    return S{__ldg(static_cast<const unsigned short*>(from) + index)};
  else
    return __ldg(static_cast<const S*>(from) + index);
}

template <typename T>
__device__ __forceinline__ T tconv_channel_operand(const Operands& operands, int slot, int channel) {
  return static_cast<T>(widen(read_only<operand_t>(operands.at[slot], channel)));
}
template <typename T>
__device__ __forceinline__ T tconv_tensor_operand(const Operands& operands, int slot, long long element) {
  return static_cast<T>(widen(static_cast<const storage_t*>(operands.at[slot])[element]));
}
__device__ __forceinline__ accum_t tconv_bias(const void* bias, int channel) {
#if TCONV_BIAS
  return static_cast<accum_t>(widen(read_only<storage_t>(bias, channel)));
#else
  (void)bias, (void)channel;
  return accum_t(0);
#endif
}
