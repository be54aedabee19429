// Kernels broken on purpose. The driver's tests run each and expect a report that names it. The sound
// variants next to some of them show that only the missing line is at fault. Blocks have 64 threads unless
// noted.
#include "collectives.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "vector.cuh"

/// Reverses x into y through shared memory.
template <bool SOUND>
__device__ void reverse(float* y, const float* x) {
    __shared__ float s[64];
    int i = threadIdx.x;
    s[i] = x[i];
    if (SOUND) __syncthreads();
    y[i] = s[63 - i];
}
KERNEL void sound_reverse(float* y, const float* x) { reverse<true>(y, x); }
KERNEL void broken_no_barrier(float* y, const float* x) { reverse<false>(y, x); }

/// Reusing shared memory needs a barrier between the reads of one round and the writes of the next.
KERNEL void broken_one_barrier_of_two(float* y, const float* x) {
    __shared__ float s[64];
    int i = threadIdx.x;
    for (int round = 0; round < 2; round++) {
        s[i] = x[64 * round + i];
        __syncthreads();
        y[64 * round + i] = s[63 - i];
    }
}

/// One warp, in which neighbours exchange values.
template <bool SOUND>
__device__ void neighbours(float* y, const float* x) {
    __shared__ float s[32];
    int i = threadIdx.x;
    s[i] = x[i];
    if (SOUND) __syncwarp();
    y[i] = s[i ^ 1];
}
KERNEL void sound_syncwarp(float* y, const float* x) { neighbours<true>(y, x); }
KERNEL void broken_no_syncwarp(float* y, const float* x) { neighbours<false>(y, x); }

/// Sixteen threads copy 64 floats.
template <bool WAITS, bool SOUND>
__device__ void copies(float* y, const float* x) {
    __shared__ __align__(16) float s[64];
    int i = threadIdx.x;
    for (int round = 0; round < 2; round++) {
        if (SOUND) __syncthreads();  // the previous round has been read
        cp_async_16(s + 4 * i, x + 64 * round + 4 * i, true);
        cp_async_commit();
        if (WAITS) cp_async_wait<0>();
        __syncthreads();
        for (int k = 0; k < 4; k++) y[64 * round + 16 * k + i] = s[16 * k + i];
    }
}
KERNEL void sound_copies(float* y, const float* x) { copies<true, true>(y, x); }
KERNEL void broken_no_wait(float* y, const float* x) { copies<false, true>(y, x); }
KERNEL void broken_copy_too_early(float* y, const float* x) { copies<true, false>(y, x); }

/// Reads and writes one element out of bounds.
KERNEL void broken_reads_too_far(float* y, const float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i + 1] - x[i];
}
KERNEL void broken_writes_too_far(float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) y[i] = 1.0f;
}
KERNEL void broken_shared_too_far(float* y) {
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x + 1] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1];
}

/// Both warps write the same elements.
KERNEL void broken_two_warps(float* y) { y[threadIdx.x % 32] = static_cast<float>(threadIdx.x / 32); }

/// Both blocks write the same elements; the sound variant has a barrier in between, which needs a cooperative
/// launch.
template <bool SOUND>
__device__ void blocks(float* y) {
    if (blockIdx.x == 0) y[threadIdx.x] = 0.0f;
    if (SOUND) grid_barrier();
    if (blockIdx.x == 1) y[threadIdx.x] = 1.0f;
}
KERNEL void sound_grid_barrier(float* y) { blocks<true>(y); }
KERNEL void broken_two_blocks(float* y) { blocks<false>(y); }

/// Broadcasts one number through shared memory without a barrier; most kernels end with such a broadcast.
KERNEL void broken_scalar(float* y, const float* x) {
    __shared__ float total;
    if (threadIdx.x == 63) total = x[0];
    y[threadIdx.x] = total;
}

/// Leaves the last element unwritten.
KERNEL void broken_unwritten(float* y, int n) {
    for (int i = threadIdx.x; i < n - 1; i += blockDim.x) y[i] = 1.0f;
}

/// Reads uninitialised shared memory.
KERNEL void broken_uninitialised(float* y) {
    __shared__ float s[64];
    if (threadIdx.x > 0) s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

KERNEL void broken_misaligned(float* y, const float* x) {
    Vector<float> v = load_vector(x + 1);
    y[threadIdx.x] = v.v[threadIdx.x % 4];
}
KERNEL void broken_misaligned_pairs(bf16* y) {
    Vector<bf16> v = {};
    store_vector(y + 2 + 8 * threadIdx.x, v);
}

/// Takes a 64-bit argument where the launch in the test passes 32 bits.
KERNEL void broken_argument(float* y, int64_t n, float value) {
    if (static_cast<int64_t>(threadIdx.x) < n) y[threadIdx.x] = value;
}

/// Half of the block skips the barrier, or waits at a different one.
KERNEL void broken_divergent_barrier(float* y) {
    if (threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = 1.0f;
}
KERNEL void broken_two_barriers(float* y) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1.0f;
}

/// Half of a warp skips the shuffle, or executes a different one.
KERNEL void broken_half_shuffle(float* y) {
    float v = 1.0f;
    if (threadIdx.x % 32 < 16) v = warp_sum(v);
    y[threadIdx.x] = v;
}
KERNEL void broken_two_shuffles(float* y) {
    float v = 1.0f;
    if (threadIdx.x % 32 < 16) {
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    } else {
        v = __shfl_xor_sync(0xffffffffu, v, 1);
    }
    y[threadIdx.x] = v;
}

/// Fails every launch.
KERNEL void broken_trap(float* y) {
    if (y) __trap();
}
