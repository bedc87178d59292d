// pages.cpp — large results in large pages.
// SPDX-License-Identifier: Apache-2.0
#include "pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>

#include <cerrno>
#endif

namespace tconv {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2 << 20;
  if (data == nullptr || bytes < kPage) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (end <= begin) return;
  const int kept = errno;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  errno = kept;
#endif
}

}  // namespace tconv
