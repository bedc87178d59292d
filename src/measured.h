// measured.h — choices that were measured, for layers where the predicted prices are off by more than a few percent.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "tconv/device.h"
#include "tconv/problem.h"

namespace tconv {

// "kernel:config" for a simplified problem, or empty. Tables (measured_<device>.def) are made by `tconv tune`; a line
// serves its layer and size for batches within a factor of four of the measured one.
std::string_view measured_choice(const Problem& problem, const Device& device);

}  // namespace tconv
