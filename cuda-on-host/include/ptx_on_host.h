// Host implementations of PTX instructions, from the fragment layouts of the PTX ISA (9.7.14: matrix
// multiply-accumulate, ldmatrix; 9.7.9.25: asynchronous copy), and of the functions of the engine's
// kernels/ptx.cuh by them. `group` is lane / 4 and `in_group` is lane % 4, as in that text.
#pragma once

#include "cuda_on_host.h"

namespace standin {

struct Mma {
    float* d;
    const unsigned *a, *b;
};

inline float low_bf16(unsigned pair) { return std::bit_cast<float>(pair << 16); }
inline float high_bf16(unsigned pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

/// d[16][8] += a[16][K] b[K][8], with the operands of all lanes gathered into matrices.
template <int K>
STANDIN_INTERNAL inline void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
    // d0 d1: row group; d2 d3: row group + 8; columns 2 in_group and the next.
    auto element = [&](int lane, int i) -> float& { return static_cast<Mma*>(lanes[lane])->d[i]; };
    float d[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = element(lane, i);
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < K; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) element(lane, i) = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

STANDIN_INTERNAL inline void complete_mma_bf16(void* const* lanes, unsigned mask) {
    if (mask != ~0u) fail("mma by a partial warp");
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* m = static_cast<const Mma*>(lanes[lane]);
        int group = lane / 4, in_group = lane % 4;
        for (int i = 0; i < 4; i++) {
            // a0: row group, a1: row group + 8, both in columns 2 in_group; a2, a3: the same rows, eight
            // columns further.
            int row = group + i % 2 * 8, column = in_group * 2 + i / 2 * 8;
            a[row][column] = low_bf16(m->a[i]);
            a[row][column + 1] = high_bf16(m->a[i]);
        }
        for (int i = 0; i < 2; i++) {
            int k = in_group * 2 + i * 8;
            b[k][group] = low_bf16(m->b[i]);
            b[k + 1][group] = high_bf16(m->b[i]);
        }
    }
    multiply(lanes, a, b);
}

STANDIN_INTERNAL inline void complete_mma_tf32(void* const* lanes, unsigned mask) {
    if (mask != ~0u) fail("mma by a partial warp");
    // The hardware reads a float's upper 19 bits.
    auto tf32 = [](unsigned x) { return std::bit_cast<float>(x & 0xffffe000u); };
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* m = static_cast<const Mma*>(lanes[lane]);
        int group = lane / 4, in_group = lane % 4;
        for (int i = 0; i < 4; i++) a[group + i % 2 * 8][in_group + i / 2 * 4] = tf32(m->a[i]);
        for (int i = 0; i < 2; i++) b[in_group + i * 4][group] = tf32(m->b[i]);
    }
    multiply(lanes, a, b);
}

/// Eight rows of 16 bytes form an 8 x 8 matrix of 2-byte elements; lane i provides the address of row i % 8
/// of matrix i / 8.
struct LoadMatrix {
    unsigned* r;
    const void* row;
};

template <int COUNT, bool TRANSPOSED>
STANDIN_INTERNAL inline void complete_ldmatrix(void* const* lanes, unsigned mask) {
    if (mask != ~0u) fail("ldmatrix by a partial warp");
    for (int matrix = 0; matrix < COUNT; matrix++) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; row++)
            std::memcpy(m[row], static_cast<LoadMatrix*>(lanes[matrix * 8 + row])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            int i = lane / 4, j = lane % 4 * 2;
            unsigned low = TRANSPOSED ? m[j][i] : m[i][j], high = TRANSPOSED ? m[j + 1][i] : m[i][j + 1];
            static_cast<LoadMatrix*>(lanes[lane])->r[matrix] = low | high << 16;
        }
    }
}

template <int COUNT, bool TRANSPOSED>
STANDIN_INTERNAL inline void ldmatrix(unsigned* r, const void* row, int line) {
    bool used = lane() < COUNT * 8;
    if (used && reinterpret_cast<uintptr_t>(row) % 16)
        fail("ldmatrix from an address that is not a multiple of 16");
#if STANDIN_CHECKED
    if (used) runtime->access(row, 16, READ, 16, __builtin_return_address(0));
#endif
    LoadMatrix argument{r, row};
    collective(~0u, line, complete_ldmatrix<COUNT, TRANSPOSED>, &argument, false);
}

STANDIN_INTERNAL inline void mma(Complete complete, float* d, const unsigned* a, const unsigned* b,
                                 int line) {
    Mma argument{d, a, b};
    collective(~0u, line, complete, &argument, false);
}

}  // namespace standin

#ifndef STANDIN_FOREIGN
inline float exp2_fast(float x) {
    float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     int line = __builtin_LINE()) {
    standin::mma(standin::complete_mma_bf16, d, a, b, line);
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     int line = __builtin_LINE()) {
    standin::mma(standin::complete_mma_tf32, d, a, b, line);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    standin::ldmatrix<4, false>(r, row, line);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    standin::ldmatrix<4, true>(r, row, line);
}
inline void ldmatrix_x2(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) {
    standin::ldmatrix<2, false>(r, row, line);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) {
    standin::ldmatrix<2, true>(r, row, line);
}
STANDIN_INTERNAL inline void cp_async_16(void* shared, const void* global, bool valid, bool active = true) {
    if (!active) return;
    standin::runtime->copy_issue(shared, valid ? global : nullptr, 16);
    standin::memory_clobber();
}
STANDIN_INTERNAL inline void cp_async_8(void* shared, const void* global, bool valid, bool active = true) {
    if (!active) return;
    standin::runtime->copy_issue(shared, valid ? global : nullptr, 8);
    standin::memory_clobber();
}
template <typename T>
STANDIN_INTERNAL inline const T* add_offset(const T* base, int offset) {
    return base + offset;
}
STANDIN_INTERNAL inline int block_z_again() { return static_cast<int>(blockIdx.z); }
STANDIN_INTERNAL inline void cp_async_commit() { standin::runtime->copy_commit(); }
template <int GROUPS_LEFT>
STANDIN_INTERNAL inline void cp_async_wait() {
    standin::memory_clobber();
    standin::runtime->copy_wait(GROUPS_LEFT);
    standin::memory_clobber();
}
#endif
