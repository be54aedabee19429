// C [m, n] = A B, plus bias [n], plus what C holds if `accumulate`; any sizes. The letters of a name say how
// A and B lie in memory: `nt` A [m, k], B [n, k] (y = x W^T); `nn` A [m, k], B [k, n] (dx = dy W); `tn` A [k,
// m], B [k, n] (dW = dy^T x).
//
// A block makes a 64 x 64 tile: blockIdx.x counts tiles along m, y along n. blockIdx.z cuts k into slices of
// `k_per_slice`; with more than one, C is f32 [slices, m, n], has no bias, and sum_slices adds the slices in
// order: enough blocks for a weight gradient, whose k is all the rows, and still one order of summation.
#include "ptx.cuh"
#include "vector.cuh"

constexpr int TILE = 64;

/// One operand in shared memory, as it lies in global memory: `OUTER` lines of `INNER` contiguous elements,
/// each line 16 bytes longer than it need be, so that eight lines read at once lie in different banks.
template <int OUTER, int INNER>
struct Panel {
    static constexpr int LINE = INNER + 8, SIZE = OUTER * LINE;

    /// Copies the part of src [outer_size, inner_size] that starts at (outer, inner), zeros outside of it,
    /// without waiting. `whole` says that lines start at multiples of 16 bytes.
    __device__ __forceinline__ static void load(bf16* to, const bf16* src, int64_t outer, int64_t inner,
                                                int64_t outer_size, int64_t inner_size, bool whole) {
        for (int i = threadIdx.x; i < OUTER * INNER / 8; i += blockDim.x) {
            int line = i / (INNER / 8), column = i % (INNER / 8) * 8;
            int64_t o = outer + line, j = inner + column;
            bf16* at = to + line * LINE + column;
            if (whole) {
                bool valid = o < outer_size && j < inner_size;
                cp_async_16(at, valid ? src + o * inner_size + j : src, valid);
            } else {
                unsigned pairs[4];
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    int64_t e = j + 2 * p;
                    unsigned low = o < outer_size && e < inner_size ? bits_of(src[o * inner_size + e]) : 0;
                    unsigned high =
                        o < outer_size && e + 1 < inner_size ? bits_of(src[o * inner_size + e + 1]) : 0;
                    pairs[p] = low | high << 16;
                }
                *reinterpret_cast<uint4*>(at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
};

/// 128 threads, 2 x 2 warps of 32 x 32 each; three stages of k in flight.
template <bool A_TRANSPOSED, bool B_TRANSPOSED, typename Out>
__device__ __forceinline__ void matmul(Out* c, const bf16* a, const bf16* b, const float* bias, int64_t m,
                                       int64_t n, int64_t k, int64_t k_per_slice, bool accumulate) {
    constexpr int DEPTH = 32, STAGES = 3;
    using PanelA = Panel<A_TRANSPOSED ? DEPTH : TILE, A_TRANSPOSED ? TILE : DEPTH>;
    using PanelB = Panel<B_TRANSPOSED ? TILE : DEPTH, B_TRANSPOSED ? DEPTH : TILE>;
    __shared__ __align__(16) bf16 as[STAGES * PanelA::SIZE], bs[STAGES * PanelB::SIZE];

    int64_t row = int64_t{blockIdx.x} * TILE, column = int64_t{blockIdx.y} * TILE;
    int64_t k_begin = blockIdx.z * k_per_slice, k_end = k_begin + k_per_slice < k ? k_begin + k_per_slice : k;
    bool whole_a = (A_TRANSPOSED ? m : k) % 8 == 0 && is_aligned_16(a);
    bool whole_b = (B_TRANSPOSED ? k : n) % 8 == 0 && is_aligned_16(b);
    int steps = k_end > k_begin ? static_cast<int>((k_end - k_begin + DEPTH - 1) / DEPTH) : 0;

    // k_per_slice is a multiple of DEPTH wherever there are several slices, so that a step never reaches into
    // the next.
    auto load = [&](int step) {
        if (step < steps) {
            int64_t at = k_begin + int64_t{step} * DEPTH;
            bf16 *to_a = as + step % STAGES * PanelA::SIZE, *to_b = bs + step % STAGES * PanelB::SIZE;
            if (A_TRANSPOSED) PanelA::load(to_a, a, at, row, k, m, whole_a);
            else PanelA::load(to_a, a, row, at, m, k, whole_a);
            if (B_TRANSPOSED) PanelB::load(to_b, b, column, at, n, k, whole_b);
            else PanelB::load(to_b, b, at, column, k, n, whole_b);
        }
        cp_async_commit();  // also where there is nothing, so that the groups left count stages
    };

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    float sums[2][4][4] = {};
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the step's panels are whole, and nobody reads those that the next load overwrites
        load(step + STAGES - 1);
        const bf16 *pa = as + step % STAGES * PanelA::SIZE, *pb = bs + step % STAGES * PanelB::SIZE;
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += 16) {
            unsigned fa[2][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Matrices 0 to 3 of a: rows 0-7 and 8-15 of k 0-7, then of k 8-15.
                int r = warp_row + i * 16, outer = lane / 8 % 2 * 8, inner = lane / 16 * 8;
                if (A_TRANSPOSED)
                    ldmatrix_x4_trans(fa[i], pa + (depth + inner + lane % 8) * PanelA::LINE + r + outer);
                else ldmatrix_x4(fa[i], pa + (r + outer + lane % 8) * PanelA::LINE + depth + inner);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                // Matrices 0 to 3 of b: k 0-7 and 8-15 of columns 0-7, then of columns 8-15.
                int s = warp_column + j * 16, outer = lane / 16 * 8, inner = lane / 8 % 2 * 8;
                if (B_TRANSPOSED)
                    ldmatrix_x4(fb[j], pb + (s + outer + lane % 8) * PanelB::LINE + depth + inner);
                else ldmatrix_x4_trans(fb[j], pb + (depth + inner + lane % 8) * PanelB::LINE + s + outer);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    unsigned pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(sums[i][j], fa[i], pair);
                }
        }
    }
    cp_async_wait<0>();

    c += blockIdx.z * m * n;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int64_t r = row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
                int64_t s = column + warp_column + j * 8 + lane % 4 * 2 + e % 2;
                if (r >= m || s >= n) continue;
                float v = sums[i][j][e];
                if (bias) v += bias[s];
                if (accumulate) v += to_float(c[r * n + s]);
                c[r * n + s] = from_float<Out>(v);
            }
}

KERNEL BOUNDS(128) void matmul_nt_bf16(bf16* c, const bf16* a, const bf16* b, const float* bias, int64_t m,
                                       int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul<false, true>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_nn_bf16(bf16* c, const bf16* a, const bf16* b, const float* bias, int64_t m,
                                       int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul<false, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_tn_bf16(bf16* c, const bf16* a, const bf16* b, const float* bias, int64_t m,
                                       int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul<true, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_nt_bf16_f32(float* c, const bf16* a, const bf16* b, const float* bias,
                                           int64_t m, int64_t n, int64_t k, int64_t k_per_slice,
                                           int accumulate) {
    matmul<false, true>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_nn_bf16_f32(float* c, const bf16* a, const bf16* b, const float* bias,
                                           int64_t m, int64_t n, int64_t k, int64_t k_per_slice,
                                           int accumulate) {
    matmul<false, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_tn_bf16_f32(float* c, const bf16* a, const bf16* b, const float* bias,
                                           int64_t m, int64_t n, int64_t k, int64_t k_per_slice,
                                           int accumulate) {
    matmul<true, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}

/// f32 throughout: 256 threads of 4 x 4 each, k in steps of 16.
template <bool A_TRANSPOSED, bool B_TRANSPOSED>
__device__ __forceinline__ void matmul_f32(float* c, const float* a, const float* b, const float* bias,
                                           int64_t m, int64_t n, int64_t k, int64_t k_per_slice,
                                           bool accumulate) {
    constexpr int DEPTH = 16, LINE = TILE + 4;
    __shared__ __align__(16) float as[DEPTH * LINE], bs[DEPTH * LINE];
    int64_t row = int64_t{blockIdx.x} * TILE, column = int64_t{blockIdx.y} * TILE;
    int64_t k_begin = blockIdx.z * k_per_slice, k_end = k_begin + k_per_slice < k ? k_begin + k_per_slice : k;
    int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (int64_t at = k_begin; at < k_end; at += DEPTH) {
        // Neighbouring threads read neighbouring elements, whichever way the operand lies.
        for (int i = threadIdx.x; i < TILE * DEPTH; i += blockDim.x) {
            int r = A_TRANSPOSED ? i % TILE : i / DEPTH, d = A_TRANSPOSED ? i / TILE : i % DEPTH;
            bool inside = row + r < m && at + d < k_end;
            as[d * LINE + r] =
                inside ? a[A_TRANSPOSED ? (at + d) * m + row + r : (row + r) * k + at + d] : 0.0f;
            int s = B_TRANSPOSED ? i / DEPTH : i % TILE, e = B_TRANSPOSED ? i % DEPTH : i / TILE;
            inside = column + s < n && at + e < k_end;
            bs[e * LINE + s] =
                inside ? b[B_TRANSPOSED ? (column + s) * k + at + e : (at + e) * n + column + s] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            Vector<float> u = load_vector(as + d * LINE + y), v = load_vector(bs + d * LINE + x);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += u.v[i] * v.v[j];
        }
        __syncthreads();
    }
    c += blockIdx.z * m * n;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int64_t r = row + y + i, s = column + x + j;
            if (r >= m || s >= n) continue;
            float v = sums[i][j];
            if (bias) v += bias[s];
            if (accumulate) v += c[r * n + s];
            c[r * n + s] = v;
        }
}

KERNEL BOUNDS(256) void matmul_nt_f32(float* c, const float* a, const float* b, const float* bias, int64_t m,
                                      int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul_f32<false, true>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(256) void matmul_nn_f32(float* c, const float* a, const float* b, const float* bias, int64_t m,
                                      int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul_f32<false, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(256) void matmul_tn_f32(float* c, const float* a, const float* b, const float* bias, int64_t m,
                                      int64_t n, int64_t k, int64_t k_per_slice, int accumulate) {
    matmul_f32<true, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}

/// y [n] = the sum of partial [slices, n] in order, plus what y holds if `accumulate`.
template <typename T>
__device__ __forceinline__ void sum_slices(T* y, const float* partial, int slices, int64_t n,
                                           bool accumulate) {
    for (int64_t i = grid_rank(); i < n; i += grid_threads()) {
        float sum = accumulate ? to_float(y[i]) : 0.0f;
        for (int s = 0; s < slices; s++) sum += partial[s * n + i];
        y[i] = from_float<T>(sum);
    }
}

KERNEL void sum_slices_f32(float* y, const float* partial, int slices, int64_t n, int accumulate) {
    sum_slices(y, partial, slices, n, accumulate);
}
KERNEL void sum_slices_bf16(bf16* y, const float* partial, int slices, int64_t n, int accumulate) {
    sum_slices(y, partial, slices, n, accumulate);
}
