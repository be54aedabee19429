// PTX instructions without a CUDA intrinsic, each behind a function. On the host,
// cuda-on-host/include/ptx_on_host.h implements them from the same sections of the PTX ISA.
#pragma once

#include "selfsup.cuh"

#ifdef SELFSUP_ON_HOST
#include "ptx_on_host.h"
#else

/// The address in the shared state space, as instructions take it.
__device__ __forceinline__ unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

/// 2^x by the special function unit: relative error 2^-22; 0 if the result is below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// d[16][8] += a[16][16] b[16][8], bf16 pairs in a and b, f32 in d; all 32 lanes must call it.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// d[16][8] += a[16][8] b[8][8] in TF32: only the upper 19 bits of a and b count; all 32 lanes must call it.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Loads four 8 x 8 matrices of 2-byte elements from shared memory; lane i passes the address of row i % 8 of
/// matrix i / 8, 16-byte aligned.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Loads two matrices; lanes 0 to 15 pass the addresses of their rows.
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Starts a copy of 16 bytes to shared memory, which writes zeros unless `predicate`; both addresses are
/// 16-byte aligned. The data is visible to this thread after cp_async_wait, and to others after a barrier
/// that follows it. Nothing happens unless `active`, a predicate of the instruction and not a branch.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool predicate,
                                            bool active = true) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                   "r"(predicate ? 16 : 0), "r"(static_cast<int>(active))
                 : "memory");
}

/// The same for 8 bytes, 8-byte aligned.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool predicate,
                                           bool active = true) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.ca.shared.global [%0], [%1], 8, %2; }"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(predicate ? 8 : 0),
                   "r"(static_cast<int>(active))
                 : "memory");
}

/// base + offset elements, by one instruction: a compiler that sees the addition keeps the offset in 64 bits.
template <typename T>
__device__ __forceinline__ const T* add_offset(const T* base, int offset) {
    const T* sum;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(offset), "n"(sizeof(T)), "l"(base));
    return sum;
}

/// blockIdx.z, read again where this is called: what follows from it takes no registers before.
__device__ __forceinline__ int block_z_again() {
    int z;
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    return z;
}

/// Commits the copies since the last call as a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most GROUPS_IN_FLIGHT of this thread's groups are pending.
template <int GROUPS_IN_FLIGHT>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_IN_FLIGHT) : "memory");
}

#endif
