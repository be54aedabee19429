// One kernel per function of ptx.cuh and per warp and block primitive, each a warp or two that move known
// bits: the first thing to run on a new device, and the check that the emulator means the same as the device.
// The registers of lane i are r[COUNT i ..].
#include "collectives.cuh"
#include "ptx.cuh"

KERNEL void conform_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    int i = threadIdx.x;
    float accumulators[4] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
    unsigned fragment_a[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]},
             fragment_b[2] = {b[2 * i], b[2 * i + 1]};
    mma_bf16(accumulators, fragment_a, fragment_b);
    for (int e = 0; e < 4; e++) d[4 * i + e] = accumulators[e];
}

KERNEL void conform_mma_tf32(float* d, const unsigned* a, const unsigned* b) {
    int i = threadIdx.x;
    float accumulators[4] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
    unsigned fragment_a[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]},
             fragment_b[2] = {b[2 * i], b[2 * i + 1]};
    mma_tf32(accumulators, fragment_a, fragment_b);
    for (int e = 0; e < 4; e++) d[4 * i + e] = accumulators[e];
}

/// r [32, 4, 4]: registers of x4, x4_trans, x2 and x2_trans over the matrices m [4, 8, 8] of 2-byte elements;
/// those that x2 does not have are zero.
KERNEL void conform_ldmatrix(unsigned* r, const unsigned* m) {
    __shared__ __align__(16) unsigned rows[4 * 8 * 4];
    int i = threadIdx.x;
    for (int k = 0; k < 4; k++) rows[4 * i + k] = m[4 * i + k];
    __syncthreads();
    const void* own_row = rows + 4 * i;
    unsigned loaded[4][4] = {};
    ldmatrix_x4(loaded[0], own_row);
    ldmatrix_x4_trans(loaded[1], own_row);
    unsigned two[2];
    ldmatrix_x2(two, own_row);
    loaded[2][0] = two[0], loaded[2][1] = two[1];
    ldmatrix_x2_trans(two, own_row);
    loaded[3][0] = two[0], loaded[3][1] = two[1];
    for (int k = 0; k < 4; k++)
        for (int e = 0; e < 4; e++) r[(i * 4 + k) * 4 + e] = loaded[k][e];
}

/// y [2, 32, 4]: two groups of copies of x [2, 32, 4], whose odd lanes have a false predicate. Each lane
/// reads its neighbour's copy of the first group, 16 bytes, while the second, of 8 and 8, is in flight.
KERNEL void conform_cp_async(unsigned* y, const unsigned* x) {
    __shared__ __align__(16) unsigned copied[2 * 32 * 4];
    int i = threadIdx.x;
    for (int group = 0; group < 2; group++) {
        int at = (group * 32 + i) * 4;
        if (group == 0) {
            cp_async_16(copied + at, x + at, i % 2 == 0);
        } else {
            cp_async_8(copied + at, x + at, i % 2 == 0);
            cp_async_8(copied + at + 2, x + at + 2, i % 2 == 0);
        }
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    for (int k = 0; k < 4; k++) y[4 * i + k] = copied[4 * (i ^ 1) + k];
    cp_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 4; k++) y[128 + 4 * i + k] = copied[128 + 4 * (i ^ 1) + k];
}

/// y [8, 32]: xor by 5, down by 3, up by 3, broadcast of lane 7, xor by 1 in groups of 8, down by 3 in groups
/// of 8, the ballot of odd values, and whether any and all are odd.
KERNEL void conform_warp(unsigned* y, const unsigned* x) {
    constexpr unsigned ALL = 0xffffffffu;
    int i = threadIdx.x;
    unsigned v = x[i], odd = v % 2;
    y[i] = __shfl_xor_sync(ALL, v, 5);
    y[32 + i] = __shfl_down_sync(ALL, v, 3);
    y[64 + i] = __shfl_up_sync(ALL, v, 3);
    y[96 + i] = __shfl_sync(ALL, v, 7);
    y[128 + i] = __shfl_xor_sync(ALL, v, 1, 8);
    y[160 + i] = __shfl_down_sync(ALL, v, 3, 8);
    y[192 + i] = __ballot_sync(ALL, odd);
    y[224 + i] = (__any_sync(ALL, odd) != 0) + 2 * (__all_sync(ALL, odd) != 0);
}

/// Each half of a warp shuffles on its own, with its mask: y [32] is x from the other end of the half.
KERNEL void conform_half_warp(unsigned* y, const unsigned* x) {
    int i = threadIdx.x;
    unsigned v = x[i];
    if (i < 16) v = __shfl_xor_sync(0x0000ffffu, v, 15);
    else v = __shfl_xor_sync(0xffff0000u, v, 15);
    y[i] = v;
}

/// sums [4] over the grid: atomicAdd of int, of u64 (low half), atomicMax and atomicMin; counts [blocks] of
/// odd values.
KERNEL void conform_block(int* counts, uint64_t* sums, unsigned* extremes, const unsigned* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned v = x[i];
    atomicAdd(reinterpret_cast<unsigned long long*>(sums), static_cast<unsigned long long>(v));
    atomicMax(extremes, v);
    atomicMin(extremes + 1, v);
    int odd = __syncthreads_count(v % 2);
    if (threadIdx.x == 0) counts[blockIdx.x] = odd;
}

/// y [blocks]: each block's x after every block has written its own; in a cooperative launch.
KERNEL void conform_grid(unsigned* y, unsigned* between, const unsigned* x) {
    __shared__ unsigned own[1];
    if (threadIdx.x == 0) {
        between[blockIdx.x] = x[blockIdx.x];
        own[0] = x[blockIdx.x];  // a block's shared memory survives the barrier
    }
    grid_barrier();
    if (threadIdx.x == 1) y[blockIdx.x] = between[(blockIdx.x + 1) % gridDim.x] + own[0];
}
