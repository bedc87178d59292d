// libcuda.h — the part of the CUDA driver's interface that tconv calls, declared by hand.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tconv::cuda {

using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUdeviceptr = unsigned long long;

#define TCONV_LIBCUDA(X)                      \
  X(cuInit, init)                             \
  X(cuDriverGetVersion, driver_version_of)    \
  X(cuGetErrorString, error_text)             \
  X(cuDeviceGetCount, device_count)           \
  X(cuDeviceGet, device_get)                  \
  X(cuDeviceGetName, device_name)             \
  X(cuDeviceGetAttribute, device_attribute)   \
  X(cuDevicePrimaryCtxRetain, primary_retain) \
  X(cuCtxGetCurrent, context_get)             \
  X(cuCtxPushCurrent_v2, context_push)        \
  X(cuCtxPopCurrent_v2, context_pop)          \
  X(cuCtxSynchronize, synchronize)            \
  X(cuModuleLoadData, module_load)            \
  X(cuModuleGetFunction, module_function)     \
  X(cuFuncSetAttribute, function_attribute)   \
  X(cuLaunchKernel, launch)                   \
  X(cuMemsetD8Async, memset)                  \
  X(cuMemAlloc_v2, allocate)                  \
  X(cuMemFree_v2, release)                    \
  X(cuMemcpyHtoD_v2, copy_in)                 \
  X(cuMemcpyDtoH_v2, copy_out)                \
  X(cuEventCreate, event_create)              \
  X(cuEventDestroy_v2, event_destroy)         \
  X(cuEventRecord, event_record)              \
  X(cuEventSynchronize, event_wait)           \
  X(cuEventElapsedTime, event_elapsed)

// As the driver lays them out.
struct LaunchAttribute {
  int id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  int padding = 0;
  int value[16] = {1};
};
struct LaunchConfig {
  unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, shared_bytes = 0;
  CUstream stream = nullptr;
  void* attributes = nullptr;
  unsigned num_attributes = 0;
};

// Every function returns a CUresult: 0 is success. tensor_map is null before CUDA 12.0, active_clusters and launch_with
// before 11.8; all others are always there.
struct Libcuda {
  std::string failure;  // empty: usable
  int driver_version = 0;
  int (*init)(unsigned) = nullptr;
  int (*driver_version_of)(int*) = nullptr;
  int (*error_text)(int, const char**) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device_get)(int*, int) = nullptr;
  int (*device_name)(char*, int, int) = nullptr;
  int (*device_attribute)(int*, int, int) = nullptr;
  int (*primary_retain)(CUcontext*, int) = nullptr;
  int (*context_get)(CUcontext*) = nullptr;
  int (*context_push)(CUcontext) = nullptr;
  int (*context_pop)(CUcontext*) = nullptr;
  int (*synchronize)() = nullptr;
  int (*module_load)(CUmodule*, const void*) = nullptr;
  int (*module_function)(CUfunction*, CUmodule, const char*) = nullptr;
  int (*function_attribute)(CUfunction, int, int) = nullptr;
  int (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**,
                void**) = nullptr;
  int (*memset)(CUdeviceptr, unsigned char, std::size_t, CUstream) = nullptr;
  int (*allocate)(CUdeviceptr*, std::size_t) = nullptr;
  int (*release)(CUdeviceptr) = nullptr;
  int (*copy_in)(CUdeviceptr, const void*, std::size_t) = nullptr;
  int (*copy_out)(void*, CUdeviceptr, std::size_t) = nullptr;
  int (*event_create)(void**, unsigned) = nullptr;
  int (*event_destroy)(void*) = nullptr;
  int (*event_record)(void*, CUstream) = nullptr;
  int (*event_wait)(void*) = nullptr;
  int (*event_elapsed)(float*, void*, void*) = nullptr;
  int (*tensor_map)(void*, int, unsigned, void*, const std::uint64_t*, const std::uint64_t*, const unsigned*,
                    const unsigned*, int, int, int, int) = nullptr;
  int (*active_clusters)(int*, CUfunction, const LaunchConfig*) = nullptr;
  int (*launch_with)(const LaunchConfig*, CUfunction, void**, void**) = nullptr;
};

// Opened at the first call. The first form throws std::runtime_error when the driver is missing or too old.
const Libcuda& libcuda();
const Libcuda& libcuda_or_failure() noexcept;

// Throws std::runtime_error with the driver's text unless code is 0.
void check(int code, std::string_view call);

}  // namespace tconv::cuda
