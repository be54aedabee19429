// Reductions over a warp and over a block, in an order that depends only on the number of threads.
#pragma once

#include "selfsup.cuh"

/// The sum over the warp, in every lane. All 32 lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

/// The maximum over the warp, in every lane. All 32 lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        T other = __shfl_xor_sync(0xffffffffu, x, mask);
        x = other > x ? other : x;
    }
    return x;
}

/// The sum over a one-dimensional block of a multiple of 32 threads, in every thread. All threads must call
/// it: it has barriers.
template <typename T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T partial[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    T total = lane < warps ? partial[lane] : T{};
    __syncthreads();  // before the next call overwrites the partial sums
    return warp_sum(total);
}
