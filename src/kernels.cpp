// kernels.cpp — the lists of kernels, from the two kernels.def files.
// SPDX-License-Identifier: Apache-2.0
#include <iterator>

#include "kernel.h"

// A line reads KERNEL(name, source, target). Kernels for x86 instruction sets exist on x86-64 only.
#define KERNEL_portable(...) __VA_ARGS__
#if defined(__x86_64__)
#define KERNEL_avx2(...) __VA_ARGS__
#define KERNEL_avx512(...) __VA_ARGS__
#define KERNEL_avx512_bf16(...) __VA_ARGS__
#define KERNEL_avx512_amx(...) __VA_ARGS__
#else
#define KERNEL_avx2(...)
#define KERNEL_avx512(...)
#define KERNEL_avx512_bf16(...)
#define KERNEL_avx512_amx(...)
#endif

namespace tconv::cpu {
#if __has_include("cpu/kernels.def")
#define KERNEL(name, source, target) KERNEL_##target(extern const Kernel name;)
#include "cpu/kernels.def"
#undef KERNEL
#endif
}  // namespace tconv::cpu

namespace tconv::cuda {
#if __has_include("cuda/kernels.def")
#define KERNEL(name, source, target) extern const Kernel name;
#include "cuda/kernels.def"
#undef KERNEL
#endif
}  // namespace tconv::cuda

namespace tconv {

std::span<const Kernel* const> kernels(Backend backend) {
  // The null keeps an empty list a valid array; it is not part of the span.
  static const Kernel* const cpu_kernels[] = {
#if __has_include("cpu/kernels.def")
#define KERNEL(name, source, target) KERNEL_##target(&cpu::name, )
#include "cpu/kernels.def"
#undef KERNEL
#endif
      nullptr};
  static const Kernel* const cuda_kernels[] = {
#if __has_include("cuda/kernels.def")
#define KERNEL(name, source, target) &cuda::name,
#include "cuda/kernels.def"
#undef KERNEL
#endif
      nullptr};
  if (backend == Backend::cpu) return {cpu_kernels, std::size(cpu_kernels) - 1};
  return {cuda_kernels, std::size(cuda_kernels) - 1};
}

std::vector<std::string> kernel_names(Backend backend) {
  std::vector<std::string> names;
  for (const Kernel* kernel : kernels(backend)) names.emplace_back(kernel->name);
  return names;
}

}  // namespace tconv
