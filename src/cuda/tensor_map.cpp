// tensor_map.cpp — see tensor_map.h.
// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.h"

#include "libcuda.h"

namespace tconv::cuda {

bool has_tensor_maps() {
  const Libcuda& cuda = libcuda_or_failure();
  return !cuda.failure.empty() || cuda.tensor_map != nullptr;
}

TensorMap tensor_map(const TensorView& view) {
  constexpr int kRank = 5, kBits16 = 1, kBits32 = 2, kPromote128 = 2;  // CU_TENSOR_MAP_*
  std::uint64_t size[kRank], stride[kRank - 1];
  unsigned box[kRank], step[kRank];
  for (int dim = 0; dim < kRank; ++dim) {
    size[dim] = static_cast<std::uint64_t>(view.size[dim]);
    if (dim > 0) stride[dim - 1] = static_cast<std::uint64_t>(view.stride[dim - 1]);
    box[dim] = static_cast<unsigned>(view.box[dim]);
    step[dim] = static_cast<unsigned>(view.step[dim]);
  }
  TensorMap map;
  check(libcuda().tensor_map(&map, view.element_bytes == 2 ? kBits16 : kBits32, kRank, const_cast<void*>(view.first),
                             size, stride, box, step, 0,
                             view.exchange_bytes == 128  ? 3
                             : view.exchange_bytes == 64 ? 2
                             : view.exchange_bytes == 32 ? 1
                                                         : 0,
                             kPromote128, 0),
        "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace tconv::cuda
