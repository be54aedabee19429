// Sums over one axis and their gradients; see src/ops/sum. A tensor is x [outer, n, inner], its sums are
// y [outer, inner], f32 whatever x is, multiplied by `factor` (1 / n for a mean). The sums themselves are in
// f64, in an order that depends only on the shape. The last axis (inner = 1) has its own kernels.
#include "rows.cuh"

constexpr int COLUMNS = 32, ROWS = 8;

/// y [outer] = factor * the sum over each row of x [outer, n], a warp per row.
template <typename T>
__device__ __forceinline__ void sum_rows(float* y, const T* x, float factor, int64_t outer, int n) {
    for_rows(outer, [&](int64_t row) {
        double sum = 0.0;
        for_vectors_of_row(n, [&](int j, int count) {
            Vector8 p = load_vector8(x + row * n + j, count);
#pragma unroll
            for (int k = 0; k < 8; k++) sum += p.v[k];
        });
        sum = warp_sum(sum);
        if (is_first_lane()) y[row] = static_cast<float>(sum * factor);
    });
}

/// dx [outer, n] = factor * dy [outer], repeated along each row.
template <typename T>
__device__ __forceinline__ void sum_rows_backward(T* dx, const float* dy, float factor, int64_t outer,
                                                  int n) {
    for_rows(outer, [&](int64_t row) {
        float d = factor * dy[row];
        Vector8 all = {{d, d, d, d, d, d, d, d}};
        for_vectors_of_row(n, [&](int j, int count) { store_vector8(dx + row * n + j, all, count); });
    });
}

/// y [outer, inner] = factor * the sum over n of x [outer, n, inner]. A block of 32 x 8 threads takes 32
/// columns, so that its loads are coalesced; each thread row takes every eighth row of x, and the eight
/// partial sums are added in order.
template <typename T>
__device__ __forceinline__ void sum_columns(float* y, const T* x, float factor, int64_t outer, int64_t n,
                                            int64_t inner) {
    __shared__ double partial[ROWS * COLUMNS];
    int64_t column = int64_t{blockIdx.x} * COLUMNS + threadIdx.x;
    for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
        double sum = 0.0;
        if (column < inner)
            for (int64_t row = threadIdx.y; row < n; row += ROWS)
                sum += to_float(x[(o * n + row) * inner + column]);
        partial[threadIdx.y * COLUMNS + threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y == 0 && column < inner) {
            for (int i = 1; i < ROWS; i++) sum += partial[i * COLUMNS + threadIdx.x];
            y[o * inner + column] = static_cast<float>(sum * factor);
        }
        __syncthreads();  // before the next sum overwrites the partial ones
    }
}

/// dx [outer, n, inner] = factor * dy [outer, inner], repeated along n.
template <typename T>
__device__ __forceinline__ void sum_columns_backward(T* dx, const float* dy, float factor, int64_t outer,
                                                     int64_t n, int inner) {
    for_rows(outer * n, [&](int64_t row) {
        const float* from = dy + row / n * inner;
        map_row(dx + row * inner, from, inner, [factor](int, float d) { return factor * d; });
    });
}

KERNEL void sum_rows_f32(float* y, const float* x, float factor, int64_t outer, int n) {
    sum_rows(y, x, factor, outer, n);
}
KERNEL void sum_rows_bf16(float* y, const bf16* x, float factor, int64_t outer, int n) {
    sum_rows(y, x, factor, outer, n);
}

KERNEL void sum_rows_backward_f32(float* dx, const float* dy, float factor, int64_t outer, int n) {
    sum_rows_backward(dx, dy, factor, outer, n);
}
KERNEL void sum_rows_backward_bf16(bf16* dx, const float* dy, float factor, int64_t outer, int n) {
    sum_rows_backward(dx, dy, factor, outer, n);
}

KERNEL BOUNDS(256) void sum_columns_f32(float* y, const float* x, float factor, int64_t outer, int64_t n,
                                        int64_t inner) {
    sum_columns(y, x, factor, outer, n, inner);
}
KERNEL BOUNDS(256) void sum_columns_bf16(float* y, const bf16* x, float factor, int64_t outer, int64_t n,
                                         int64_t inner) {
    sum_columns(y, x, factor, outer, n, inner);
}

KERNEL void sum_columns_backward_f32(float* dx, const float* dy, float factor, int64_t outer, int64_t n,
                                   int inner) {
    sum_columns_backward(dx, dy, factor, outer, n, inner);
}
KERNEL void sum_columns_backward_bf16(bf16* dx, const float* dy, float factor, int64_t outer, int64_t n,
                                    int inner) {
    sum_columns_backward(dx, dy, factor, outer, n, inner);
}

/// partial [gridDim.x] = each block's share of the sum of (x - y)^2 over n elements, in f64; of x^2 if y is null. A share
/// depends on the grid alone.
KERNEL BOUNDS(256) void sum_squares(double* partial, const float* x, const float* y, int64_t n) {
    double sum = 0.0;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Vector8 a = load_vector8(x + i, count), b{};
        if (y) b = load_vector8(y + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            double d = static_cast<double>(a.v[k]) - b.v[k];
            sum += d * d;
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
