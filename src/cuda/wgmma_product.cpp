// wgmma_product.cpp — see wgmma_product.h.
// SPDX-License-Identifier: Apache-2.0
#include "wgmma_product.h"

#include <sstream>

namespace tconv::cuda {

std::string product_text(DType dtype, int columns, bool channel_units) {
  const char* types = dtype == DType::f32 ? "f32.tf32.tf32" : dtype == DType::f16 ? "f32.f16.f16" : "f32.bf16.bf16";
  std::ostringstream text;
  const int sums = columns / 2;
  text << "__device__ __forceinline__ void wgmma_step(float (&d)[" << sums
       << "], const unsigned (&a)[4], unsigned long long b) {\n"
       << "  asm volatile(\"{ .reg .pred p; setp.ne.b32 p, 1, 0;\\n\"\n    \"wgmma.mma_async.sync.aligned.m64n"
       << columns << (dtype == DType::f32 ? "k8." : "k16.") << types << " {";
  for (int i = 0; i < sums; ++i) text << (i ? "," : "") << '%' << i;
  text << "}, {%" << sums << ",%" << sums + 1 << ",%" << sums + 2 << ",%" << sums + 3 << "}, %" << sums + 4
       << ", p, 1, 1"
       << (dtype == DType::f32 ? ""
           : channel_units     ? ", 1"
                               : ", 0")
       << "; }\"\n    : ";
  for (int i = 0; i < sums; ++i) text << (i ? "," : "") << "\"+f\"(d[" << i << "])";
  text << "\n    : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b));\n}\n";
  return text.str();
}

std::string shared_product_text(DType dtype, int columns, bool channels_inner) {
  const char* types = dtype == DType::f32 ? "f32.tf32.tf32" : dtype == DType::f16 ? "f32.f16.f16" : "f32.bf16.bf16";
  std::ostringstream text;
  const int sums = columns / 2;
  text << "__device__ __forceinline__ void wgmma_shared(float (&d)[" << sums
       << "], unsigned long long a, unsigned long long b, int accumulate) {\n"
       << "  asm volatile(\"{ .reg .pred p; setp.ne.b32 p, %" << sums + 2
       << ", 0;\\n\"\n    \"wgmma.mma_async.sync.aligned.m64n" << columns << (dtype == DType::f32 ? "k8." : "k16.")
       << types << " {";
  for (int i = 0; i < sums; ++i) text << (i ? "," : "") << '%' << i;
  text << "}, %" << sums << ", %" << sums + 1 << ", p, 1, 1"
       << (dtype == DType::f32 ? ""
           : channels_inner    ? ", 1, 1"
                               : ", 0, 0")
       << "; }\"\n    : ";
  for (int i = 0; i < sums; ++i) text << (i ? "," : "") << "\"+f\"(d[" << i << "])";
  text << "\n    : \"l\"(a), \"l\"(b), \"r\"(accumulate));\n}\n";
  return text.str();
}

}  // namespace tconv::cuda
