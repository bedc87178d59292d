// emulation_data.h — data for the main programs of emulated kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace {

// Elements that begin EMULATED_OFFSET behind a 16-byte boundary.
template <typename T>
struct Buffer {
  std::vector<unsigned char> bytes;
  T* first;
  explicit Buffer(long long elements)
      : bytes(static_cast<std::size_t>(elements) * sizeof(T) + 64, 0xff),
        first(reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(bytes.data()) + 15) / 16 * 16) + EMULATED_OFFSET) {
  }
};

int small_number() {
  static unsigned long long state = 12345;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<int>((state >> 33) % 5) - 2;
}

}  // namespace
