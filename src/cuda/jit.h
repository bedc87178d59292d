// jit.h — what tests and measurements need of the compiler beyond driver.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tconv::cuda {

// Drops the programs that this process keeps in memory, so that the next compile goes to the disk cache.
void forget_programs();

}  // namespace tconv::cuda
