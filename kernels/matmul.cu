// C [m, n] = A B, plus bias [n], plus what C holds if `accumulate`; any sizes below 2^31. The letters of a
// name say how A and B lie in memory: `nt` A [m, k], B [n, k] (y = x W^T); `nn` A [m, k], B [k, n] (dx = dy
// W); `tn` A [k, m], B [k, n] (dW = dy^T x). Convolutions of 1x1 are these, too.
//
// In bf16 C is `c`, or f32 at `wide` where c is null. `moments` of `nt`, where not null, gets mean and
// squared deviations of each column for each M rows of C, [ceil(m / M), 2, n]. The tile M x N is in the name:
// 128x128, 128x64 and 64x128 ask for operands that start and whose lines are multiples of 16 bytes, 64x64 and
// f32 (64 x 64) for nothing.
//
// grid = (ceil(m / M) ceil(n / N), 1, slices), blocks of 128 threads for bf16 and of 256 for f32. blockIdx.z
// cuts k into slices of `k_per_slice`, a multiple of 32; with more than one, C is f32 [slices, m, n], has no
// bias, and sum_slices adds the slices in order: enough blocks for a weight gradient, whose k is all the
// rows, and still one order of summation.
#include "gather.cuh"
#include "gemm_operands.cuh"

/// The part of k that is blockIdx.z's.
struct Slice {
    int begin, end;
    __device__ __forceinline__ Slice(int k, int k_per_slice) {
        begin = blockIdx.z * k_per_slice;
        end = k - begin < k_per_slice ? k : begin + k_per_slice;
    }
    __device__ __forceinline__ int steps() const {
        return end > begin ? (end - begin + DEPTH - 1) / DEPTH : 0;
    }
};

template <typename Tile, bool A_INNER, bool B_INNER>
__device__ __forceinline__ void matmul(bf16* c, float* wide, const bf16* a, const bf16* b, const float* bias,
                                       float* moments, int m, int n, int k, int k_per_slice,
                                       bool accumulate) {
    constexpr int THREADS = Tile::THREADS;
    using A = std::conditional_t<A_INNER, Lines<Tile::M, THREADS>, Across<Tile::M, THREADS>>;
    using B = std::conditional_t<B_INNER, Lines<Tile::N, THREADS>, Across<Tile::N, THREADS>>;
    Slice slice(k, k_per_slice);
    typename Tile::Corner at(n);
    Output to{c, c ? nullptr : wide + int64_t{blockIdx.z} * m * n, bias, accumulate, moments};
    Tile::template product<A_INNER && B_INNER>(A(a, A_INNER ? k : m, at.row, m, slice.begin, slice.end),
                                               B(b, B_INNER ? k : n, at.column, n, slice.begin, slice.end),
                                               slice.steps(), at, m, n, to,
                                               [&](int i) { return int64_t{i} * n; });
}

/// Any sizes and addresses, gathered where they ask for it.
template <bool A_INNER, bool B_INNER>
__device__ __forceinline__ void matmul_small(bf16* c, float* wide, const bf16* a, const bf16* b,
                                             const float* bias, float* moments, int m, int n, int k,
                                             int k_per_slice, bool accumulate) {
    using Tile = Tile64x64;
    if (run_of(a, A_INNER ? k : m) == 8 && run_of(b, B_INNER ? k : n) == 8)
        return matmul<Tile, A_INNER, B_INNER>(c, wide, a, b, bias, moments, m, n, k, k_per_slice, accumulate);
    Rows<bf16> rows_a(a, A_INNER ? m : k, A_INNER ? k : m), rows_b(b, B_INNER ? n : k, B_INNER ? k : n);
    Slice slice(k, k_per_slice);
    Tile::Corner at(n);
    Output to{c, c ? nullptr : wide + int64_t{blockIdx.z} * m * n, bias, accumulate, moments};
    Tile::product<A_INNER && B_INNER>(
        Gathered<Rows<bf16>, Tile::M, Tile::THREADS, A_INNER>(rows_a, at.row, slice.begin),
        Gathered<Rows<bf16>, Tile::N, Tile::THREADS, B_INNER>(rows_b, at.column, slice.begin), slice.steps(),
        at, m, n, to, [&](int i) { return int64_t{i} * n; });
}

KERNEL BOUNDS(128, 2) void matmul_nt_bf16_128x128(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                  const float* bias, float* moments, int m, int n, int k,
                                                  int k_per_slice, int accumulate) {
    matmul<Tile128x128, true, true>(c, wide, a, b, bias, moments, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_nt_bf16_128x64(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                 const float* bias, float* moments, int m, int n, int k,
                                                 int k_per_slice, int accumulate) {
    matmul<Tile128x64, true, true>(c, wide, a, b, bias, moments, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_nt_bf16_64x64(bf16* c, float* wide, const bf16* a, const bf16* b,
                                             const float* bias, float* moments, int m, int n, int k,
                                             int k_per_slice, int accumulate) {
    matmul_small<true, true>(c, wide, a, b, bias, moments, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_nn_bf16_128x128(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                  const float* bias, int m, int n, int k, int k_per_slice,
                                                  int accumulate) {
    matmul<Tile128x128, true, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_nn_bf16_128x64(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                 const float* bias, int m, int n, int k, int k_per_slice,
                                                 int accumulate) {
    matmul<Tile128x64, true, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_nn_bf16_64x64(bf16* c, float* wide, const bf16* a, const bf16* b,
                                             const float* bias, int m, int n, int k, int k_per_slice,
                                             int accumulate) {
    matmul_small<true, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_tn_bf16_128x128(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                  const float* bias, int m, int n, int k, int k_per_slice,
                                                  int accumulate) {
    matmul<Tile128x128, false, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void matmul_tn_bf16_64x128(bf16* c, float* wide, const bf16* a, const bf16* b,
                                                 const float* bias, int m, int n, int k, int k_per_slice,
                                                 int accumulate) {
    matmul<Tile64x128, false, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(128) void matmul_tn_bf16_64x64(bf16* c, float* wide, const bf16* a, const bf16* b,
                                             const float* bias, int m, int n, int k, int k_per_slice,
                                             int accumulate) {
    matmul_small<false, false>(c, wide, a, b, bias, nullptr, m, n, k, k_per_slice, accumulate);
}

template <bool A_INNER, bool B_INNER>
__device__ __forceinline__ void matmul_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                           int n, int k, int k_per_slice, bool accumulate) {
    Slice slice(k, k_per_slice);
    Rows<float> rows_a(a, A_INNER ? m : k, A_INNER ? k : m), rows_b(b, B_INNER ? n : k, B_INNER ? k : n);
    c += int64_t{blockIdx.z} * m * n;
    TileF32::product<A_INNER, B_INNER>(rows_a, rows_b, m, n, slice.begin, slice.end, bias, accumulate,
                                       [&](int i) { return c + int64_t{i} * n; });
}

KERNEL BOUNDS(256) void matmul_nt_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                      int n, int k, int k_per_slice, int accumulate) {
    matmul_f32<true, true>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(256) void matmul_nn_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                      int n, int k, int k_per_slice, int accumulate) {
    matmul_f32<true, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
}
KERNEL BOUNDS(256) void matmul_tn_f32(float* c, const float* a, const float* b, const float* bias, int m,
                                      int n, int k, int k_per_slice, int accumulate) {
    matmul_f32<false, false>(c, a, b, bias, m, n, k, k_per_slice, accumulate);
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
