// wgmma_product.h — device text of one warpgroup product; its operand list depends on the number of columns.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "tconv/problem.h"

namespace tconv::cuda {

// `void wgmma_step(float (&sum)[columns / 2], const unsigned (&rows)[4], unsigned long long columns)`: 64 rows from
// registers times `columns` (a multiple of 8, at most 256) from shared memory, over 32 bytes of k; f32 means TF32.
// channel_units: 16-byte units of shared memory hold 8 columns of one k (16-bit only), not 8 k of one column.
std::string product_text(DType dtype, int columns, bool channel_units = false);

// `void wgmma_shared(float (&sum)[columns / 2], rows, columns, int accumulate)`: the same with both operands behind
// descriptors; without `accumulate` the sums start from zero. k is contiguous in memory, or with channels_inner (16-bit only)
// the rows and columns are.
std::string shared_product_text(DType dtype, int columns, bool channels_inner = false);

}  // namespace tconv::cuda
