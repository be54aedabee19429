// Copies and moves of rows; see src/ops/rows. `length` is the number of elements of a row, which may be an
// image as well as an embedding; copies are 16 bytes wide where both addresses are aligned.
//
// Unless said otherwise, the block is (x, y): x threads along a row, y rows; the grid has any number of
// blocks in x, and (rows / y rounded up) are efficient. x y <= 256; x is the next power of two of the row's
// 16-byte vectors, up to 256. No dynamic shared memory. Row indices and the position in a queue are read from
// device memory.
#include "vector.cuh"

constexpr int THREADS = 256;

/// Calls f(row) for this thread's share of n rows.
template <typename F>
__device__ __forceinline__ void for_thread_rows(int n, F f) {
    for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < n; row += gridDim.x * blockDim.y) f(row);
}

/// Copies this thread's part of a row, bit by bit.
template <typename T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int64_t length) {
    constexpr int W = PER_VECTOR<T>;
    for (int64_t i = threadIdx.x * W; i < length; i += blockDim.x * W) {
        if (length - i >= W && is_aligned_16(to + i) && is_aligned_16(from + i)) {
            *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
        } else {
            for (int k = 0; k < W && i + k < length; k++) to[i + k] = from[i + k];
        }
    }
}

/// NaN, with all bits set.
__device__ __forceinline__ float all_ones_nan(float) { return __uint_as_float(0xffffffffu); }
__device__ __forceinline__ bf16 all_ones_nan(bf16) { return from_float<bf16>(__uint_as_float(0xffffffffu)); }

/// y [n, length], y_i = x_index[i], x [m, length]. The host cannot check the indices: one out of range gives
/// a row of NaN.
template <typename T>
__device__ __forceinline__ void gather(T* y, const T* x, const int* index, int n, int m, int64_t length) {
    for_thread_rows(n, [&](int row) {
        int from = index[row];
        if (from >= 0 && from < m) return copy_row(y + row * length, x + from * length, length);
        for (int64_t i = threadIdx.x; i < length; i += blockDim.x) y[row * length + i] = all_ones_nan(T{});
    });
}

KERNEL BOUNDS(THREADS) void gather_rows_f32(float* y, const float* x, const int* index, int n, int m,
                                            int64_t length) {
    gather(y, x, index, n, m, length);
}
KERNEL BOUNDS(THREADS) void gather_rows_bf16(bf16* y, const bf16* x, const int* index, int n, int m,
                                             int64_t length) {
    gather(y, x, index, n, m, length);
}

/// The gradient of gather: dx [m, length], dx_r = the sum of dy_i over index[i] = r in order of i.
/// One-dimensional blocks of a multiple of 32 threads; a block takes a row of dx: m blocks are efficient.
template <typename T>
__device__ __forceinline__ void scatter(T* dx, const T* dy, const int* index, int n, int m, int64_t length) {
    constexpr int W = PER_VECTOR<T>;
    int lane = threadIdx.x % 32;
    for (int row = blockIdx.x; row < m; row += gridDim.x) {
        for (int64_t first = 0; first < length; first += blockDim.x * W) {
            int64_t at = first + threadIdx.x * W, rest = length - at;
            int count = rest < W ? static_cast<int>(rest) : W;
            Vector<T> sum{};
            for (int first_index = 0; first_index < n; first_index += 32) {
                bool is_match = first_index + lane < n && index[first_index + lane] == row;
                for (unsigned matches = __ballot_sync(0xffffffffu, is_match); matches;
                     matches &= matches - 1) {
                    Vector<T> v = load_partial(dy + (first_index + __ffs(matches) - 1) * length + at, count);
#pragma unroll
                    for (int k = 0; k < W; k++) sum.v[k] += v.v[k];
                }
            }
            store_partial(dx + row * length + at, sum, count);
        }
    }
}

KERNEL BOUNDS(THREADS) void scatter_rows_f32(float* dx, const float* dy, const int* index, int n, int m,
                                             int64_t length) {
    scatter(dx, dy, index, n, m, length);
}
KERNEL BOUNDS(THREADS) void scatter_rows_bf16(bf16* dx, const bf16* dy, const int* index, int n, int m,
                                              int64_t length) {
    scatter(dx, dy, index, n, m, length);
}

/// (at + i) mod m in 0..m, also of an `at` that the host did not check.
__device__ __forceinline__ int64_t wrapped(int at, int i, int m) { return ((int64_t{at} + i) % m + m) % m; }

/// queue [m, length]: row (*at + i) mod m = rows_i, i < n <= m.
KERNEL BOUNDS(THREADS) void write_rows_f32(float* queue, const float* rows, const int* at, int n, int m,
                                           int64_t length) {
    for_thread_rows(n, [&](int i) { copy_row(queue + wrapped(*at, i, m) * length, rows + i * length, length); });
}
KERNEL BOUNDS(THREADS) void write_rows_bf16(bf16* queue, const bf16* rows, const int* at, int n, int m,
                                            int64_t length) {
    for_thread_rows(n, [&](int i) { copy_row(queue + wrapped(*at, i, m) * length, rows + i * length, length); });
}

/// Moves the rows of queue [m, length] back by n and puts rows [n, length] in front; n <= m. In place: a
/// thread moves row r, r + n, r + 2 n, ... of its columns, the last first, and has these to itself; the
/// "rows" of the layout above are the n residues r.
template <typename T>
__device__ __forceinline__ void push(T* queue, const T* rows, int n, int m, int64_t length) {
    for_thread_rows(n, [&](int r) {
        int last = r + (m - 1 - r) / n * n;
        for (int to = last; to > r; to -= n) copy_row(queue + to * length, queue + (to - n) * length, length);
        copy_row(queue + r * length, rows + r * length, length);
    });
}

KERNEL BOUNDS(THREADS) void push_rows_f32(float* queue, const float* rows, int n, int m, int64_t length) {
    push(queue, rows, n, m, length);
}
KERNEL BOUNDS(THREADS) void push_rows_bf16(bf16* queue, const bf16* rows, int n, int m, int64_t length) {
    push(queue, rows, n, m, length);
}
