// measured.h — choices that were measured, for layers where the predicted prices are off by more than a few percent.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "tconv/device.h"
#include "tconv/epilogue.h"
#include "tconv/problem.h"

namespace tconv {

// "kernel:config" for a simplified problem, or empty. Tables (measured_<device>.def) are made by `tconv tune`; a line
// serves its layer and size for batches within a factor of four of the measured one, and one with a chain behind ` | ` goes
// before one without: few storing warps suffice for a plain result and not for a tanh. The variable TCONV_MEASURED names a
// file of such lines that is used instead of the built-in ones, on any CUDA device; a file that cannot be read is an
// std::invalid_argument that names the line.
std::string_view measured_choice(const Problem& problem, const Epilogue& epilogue, const Device& device);

// The chain of such a line: operations, and whether results are kept for the backward pass.
std::string measured_chain(const Epilogue& epilogue);

}  // namespace tconv
