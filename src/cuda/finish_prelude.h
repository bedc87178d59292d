// finish_prelude.h — what the kernels that finish a chain share on the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "kernel.h"

namespace tconv::cuda {

// TCONV_NORM of a chain: 0 none, 1 group_norm, 2 layer_norm, 3 batch_norm.
int norm_number(const Epilogue& epilogue);
// What an operation costs per result, in instructions about.
double math_of(OpKind kind);
// The #define lines and functions of a chain; no channels and sizes, so that one program serves all layers with it.
std::string finish_prelude(const Step& step);

}  // namespace tconv::cuda
