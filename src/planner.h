// planner.h — planning without the cache, over any list of kernels; for tests and tools.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

#include "kernel.h"

namespace tconv {

// Pure: asks fit, compares prices, lays out the workspace; prepares nothing. Validates both parts first.
Plan make_plan(const Problem& problem, const Epilogue& epilogue, const Device& device, std::string_view only,
               std::span<const Kernel* const> kernels);

}  // namespace tconv
