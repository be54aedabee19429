// Included first by every kernel file: the CUDA headers, or those of the emulator when the host compiles.
//
// An entry point is a line `KERNEL void name(arguments)`, or `KERNEL BOUNDS(threads) void name(arguments)`:
// the build generates the launch functions from these lines.
#pragma once

#ifdef SELFSUP_ON_HOST
#include "cuda_on_host.h"
#define KERNEL extern "C"
#define BOUNDS(...)
/// `name` points to the block's dynamic shared memory, whose size the launch gives; 16-byte aligned.
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(standin::dynamic_shared())
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define KERNEL extern "C" __global__
#define BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared_)
#endif

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

/// `from_float<T>(x)`: x rounded to nearest even where T is bf16.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

/// Index of this thread in a one-dimensional grid, and the number of threads in the grid: for grid-stride
/// loops.
__device__ __forceinline__ int64_t grid_rank() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t{gridDim.x} * blockDim.x; }
