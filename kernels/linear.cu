// The gradient of the bias of a linear layer. Its GEMMs are in matmul.cu.
#include "selfsup.cuh"

constexpr int COLUMNS = 32, ROWS = 8;

/// sums [k] of dy [n, k] over rows, added to what `sums` holds if `accumulate`. A block of 32 x 8 threads
/// takes 32 columns, so that its loads are coalesced; each thread row takes every eighth row of dy, and the
/// eight partial sums are added in order.
template <typename T>
__device__ __forceinline__ void column_sums(float* sums, const T* dy, int64_t n, int k, bool accumulate) {
    __shared__ float partial[ROWS * COLUMNS];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < k)
        for (int64_t row = threadIdx.y; row < n; row += ROWS) sum += to_float(dy[row * k + column]);
    partial[threadIdx.y * COLUMNS + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= k) return;
    for (int y = 1; y < ROWS; y++) sum += partial[y * COLUMNS + threadIdx.x];
    sums[column] = accumulate ? sums[column] + sum : sum;
}

KERNEL BOUNDS(256) void column_sums_f32(float* sums, const float* dy, int64_t n, int k, int accumulate) {
    column_sums(sums, dy, n, k, accumulate);
}
KERNEL BOUNDS(256) void column_sums_bf16(float* sums, const bf16* dy, int64_t n, int k, int accumulate) {
    column_sums(sums, dy, n, k, accumulate);
}
