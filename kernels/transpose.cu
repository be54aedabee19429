// The transpose of a matrix; see src/ops/transpose.
#include "selfsup.cuh"

constexpr int SIDE = 32, ROWS = 8;

/// y [columns, rows] = the transpose of x [rows, columns]. A block of 32 x 8 threads moves a tile of 32 x 32
/// through shared memory, so that loads and stores are both coalesced; the odd pitch avoids bank conflicts.
/// Needs a grid of (rows / 32, columns / 32), rounded up.
template <typename T>
__device__ __forceinline__ void transpose(T* y, const T* x, int64_t rows, int64_t columns) {
    __shared__ float tile[SIDE][SIDE + 1];
    int64_t first_row = int64_t{blockIdx.x} * SIDE, first_column = int64_t{blockIdx.y} * SIDE;
    int64_t column = first_column + threadIdx.x;
    for (int i = threadIdx.y; i < SIDE; i += ROWS)
        if (first_row + i < rows && column < columns)
            tile[i][threadIdx.x] = to_float(x[(first_row + i) * columns + column]);
    __syncthreads();
    int64_t row = first_row + threadIdx.x;
    for (int i = threadIdx.y; i < SIDE; i += ROWS)
        if (first_column + i < columns && row < rows)
            y[(first_column + i) * rows + row] = from_float<T>(tile[threadIdx.x][i]);
}

KERNEL BOUNDS(256) void transpose_f32(float* y, const float* x, int64_t rows, int64_t columns) {
    transpose(y, x, rows, columns);
}
KERNEL BOUNDS(256) void transpose_bf16(bf16* y, const bf16* x, int64_t rows, int64_t columns) {
    transpose(y, x, rows, columns);
}
