// Sums over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once

#include "selfsup.cuh"

/// The sum over the warp, in every lane; all 32 lanes call it.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        T other = __shfl_xor_sync(0xffffffffu, x, by);
        x = other > x ? other : x;
    }
    return x;
}

/// The sum over a block of a multiple of 32 threads in one dimension, in every thread; all call it. Has
/// barriers.
template <typename T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T partial[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    T total = lane < warps ? partial[lane] : T{};
    __syncthreads();  // before the next sum writes
    return warp_sum(total);
}
