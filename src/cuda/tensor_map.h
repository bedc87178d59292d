// tensor_map.h — a tensor as Hopper's copy engine sees it, for kernels that stage boxes of it (sm_90a).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace tconv::cuda {

struct alignas(64) TensorMap {
  std::uint64_t word[16] = {};
};

// Dimensions from the innermost on; sizes in elements, strides in bytes (multiples of 16) from the second dimension on.
struct TensorView {
  const void* first = nullptr;  // on a 16-byte boundary
  int element_bytes = 4;
  std::int64_t size[5] = {1, 1, 1, 1, 1};
  std::int64_t stride[4] = {16, 16, 16, 16};
  int box[5] = {1, 1, 1, 1, 1};   // what one copy takes, at most 256 a dimension
  int step[5] = {1, 1, 1, 1, 1};  // of which every step-th element is copied, at most 8
  int exchange_bytes =
      0;  // 32, 64, 128: the innermost side of the box, within which 16-byte units are exchanged; 0: none
};

// Whether the driver here can describe tensors (CUDA 12.0 or newer); true where there is no driver, as for compiling.
bool has_tensor_maps();
// Throws std::runtime_error with the driver's text when it refuses the view.
TensorMap tensor_map(const TensorView& view);

}  // namespace tconv::cuda
