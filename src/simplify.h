// simplify.h — exact rewrites of a problem into an equal, simpler one over the same memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tconv/epilogue.h"
#include "tconv/problem.h"

namespace tconv {

// Same tensors, same result bits up to summation order; fewer or simpler dimensions. Each rule carries its proof.
Problem simplify(const Problem& problem, const Epilogue& epilogue);

}  // namespace tconv
