// Sinkhorn-Knopp over scores [b, k]; see src/ops/sinkhorn. Q_ij = v_i E_ij u_j with E = exp((scores - max) /
// epsilon) and the factors u [k] of prototypes and v [b] of rows in f64. E is f32 and recomputed wherever it
// is read: bf16 scores are half its size, and the special function units keep up.
//
// Launches, in order; a `Group` of several processes reduces where the list says so:
//   sinkhorn_max_*      grid G <= 1024 blocks of 256 over n = b k: maxima [G]
//   sinkhorn_max_f32    one block of 256 over n = G: max [1]; then the group's maximum of it
//   `iterations` times
//     sinkhorn_columns_*  a block of 256 for each rows_per_chunk <= MAX_ROWS rows: partial [chunks, k]. u is
//                         null in the first iteration, where v = 1; after that it is the u of the iteration
//                         before, which gives v
//     sinkhorn_column_factors
//                         (k / 32 rounded up) blocks of 32 x 8: u. A group calls it with parts = 0 for plain
//                         sums, adds those up, and calls it again with chunks = 1 and the sums as partial
//   sinkhorn_assign_*   a warp per row, (b / 8 rounded up) blocks of 256: q [b, k]
// `all_rows` counts the rows of all processes. No dynamic shared memory.
//
// Bytes: an iteration reads the scores once, and a second time from the cache, as a block's rows are at
// most 96 KB at 3,000 prototypes; partial sums are a quarter of bf16 scores, written and read. At 4,096 x
// 3,000 in bf16 that is five passes of 24.6 MB, 37 MB of partial sums and 49 MB of assignments: 209 MB, 57 us
// at 0.85 of 4.3 TB/s, without launches.
#include "rows.cuh"

constexpr int THREADS = 256;

template <typename T>
__device__ __forceinline__ void maximum(float* maxima, const T* x, int64_t n) {
    __shared__ float partial[THREADS / 32];
    float largest = -INFINITY;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Vector8 p = load_vector8(x + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < count && p.v[k] > largest) largest = p.v[k];
    }
    largest = warp_max(largest);
    if (is_first_lane()) partial[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < THREADS / 32; w++) largest = partial[w] > largest ? partial[w] : largest;
    maxima[blockIdx.x] = largest;
}

KERNEL BOUNDS(THREADS) void sinkhorn_max_f32(float* maxima, const float* scores, int64_t n) {
    maximum(maxima, scores, n);
}
KERNEL BOUNDS(THREADS) void sinkhorn_max_bf16(float* maxima, const bf16* scores, int64_t n) {
    maximum(maxima, scores, n);
}

/// The most rows that a block of sinkhorn_columns takes.
constexpr int MAX_ROWS = 16;

/// E of the first `count` scores, filled up with zeros.
template <typename T>
__device__ __forceinline__ Vector8 exponentials(const T* scores, int count, float max, float inv_epsilon) {
    Vector8 p = load_vector8(scores, count);
#pragma unroll
    for (int i = 0; i < 8; i++) p.v[i] = i < count ? expf((p.v[i] - max) * inv_epsilon) : 0.0f;
    return p;
}

/// Loads the first `count` doubles, 16 bytes at a time, and fills up with zeros. `from` is 16-byte aligned.
__device__ __forceinline__ void load_doubles(double (&to)[8], const double* from, int count) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        if (i + 1 < count) {
            double2 pair = *reinterpret_cast<const double2*>(from + i);
            to[i] = pair.x, to[i + 1] = pair.y;
        } else {
            to[i] = i < count ? from[i] : 0.0, to[i + 1] = 0.0;
        }
    }
}

/// The factor that scales a sum to 1 / parts; 0 if the sum is 0.
__device__ __forceinline__ double factor_of(double sum, double parts) {
    return sum > 0.0 ? 1.0 / (parts * sum) : 0.0;
}

/// v of a row, in every lane of a warp: factor_of(Σ_j E_ij u_j, all_rows).
template <typename T>
__device__ __forceinline__ double row_factor(const T* scores, float max, const double* u, int k,
                                             double all_rows, float inv_epsilon) {
    double sum = 0.0;
    for_vectors_of_row(k, [&](int j, int count) {
        Vector8 e = exponentials(scores + j, count, max, inv_epsilon);
        double factors[8];
        load_doubles(factors, u + j, count);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += e.v[i] * factors[i];
    });
    return factor_of(warp_sum(sum), all_rows);
}

/// partial [chunks, k]: Σ_i v_i E_ij over the rows of a chunk.
template <typename T>
__device__ __forceinline__ void columns(double* partial, const T* scores, const float* max, const double* u,
                                        int b, int k, int rows_per_chunk, double all_rows,
                                        float inv_epsilon) {
    __shared__ double v[MAX_ROWS];
    int begin = blockIdx.x * rows_per_chunk, rows = b - begin < rows_per_chunk ? b - begin : rows_per_chunk;
    const T* first = scores + int64_t{begin} * k;
    for (int r = threadIdx.x / 32; r < rows; r += THREADS / 32) {
        double factor = u ? row_factor(first + int64_t{r} * k, *max, u, k, all_rows, inv_epsilon) : 1.0;
        if (is_first_lane()) v[r] = factor;
    }
    __syncthreads();
    for (int j = threadIdx.x * 8; j < k; j += THREADS * 8) {
        int count = k - j < 8 ? k - j : 8;
        double sums[8] = {};
#pragma unroll 4
        for (int r = 0; r < rows; r++) {
            Vector8 e = exponentials(first + int64_t{r} * k + j, count, *max, inv_epsilon);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i] += v[r] * e.v[i];
        }
        double* to = partial + int64_t{blockIdx.x} * k + j;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = sums[i];
    }
}

KERNEL BOUNDS(THREADS) void sinkhorn_columns_f32(double* partial, const float* scores, const float* max,
                                                 const double* u, int b, int k, int rows_per_chunk,
                                                 double all_rows, float inv_epsilon) {
    columns(partial, scores, max, u, b, k, rows_per_chunk, all_rows, inv_epsilon);
}
KERNEL BOUNDS(THREADS) void sinkhorn_columns_bf16(double* partial, const bf16* scores, const float* max,
                                                  const double* u, int b, int k, int rows_per_chunk,
                                                  double all_rows, float inv_epsilon) {
    columns(partial, scores, max, u, b, k, rows_per_chunk, all_rows, inv_epsilon);
}

/// u_j = factor_of(Σ partial, parts); the sum itself if parts is 0. Eight threads share a column: each adds
/// every eighth chunk in order, then the eight are added in order.
KERNEL BOUNDS(THREADS) void sinkhorn_column_factors(double* u, const double* partial, int chunks, int k,
                                                    double parts) {
    constexpr int COLUMNS = 32, THREAD_ROWS = THREADS / COLUMNS;
    __shared__ double sums[THREAD_ROWS][COLUMNS];
    int j = blockIdx.x * COLUMNS + threadIdx.x;
    double sum = 0.0;
    if (j < k)
#pragma unroll 4
        for (int c = threadIdx.y; c < chunks; c += THREAD_ROWS) sum += partial[int64_t{c} * k + j];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || j >= k) return;
    for (int d = 1; d < THREAD_ROWS; d++) sum += sums[d][threadIdx.x];
    u[j] = parts > 0.0 ? factor_of(sum, parts) : sum;
}

/// q = all_rows v_i E_ij u_j, v from u.
template <typename T>
__device__ __forceinline__ void assign(float* q, const T* scores, const float* max, const double* u, int b,
                                       int k, double all_rows, float inv_epsilon) {
    for_rows(b, [&](int64_t row) {
        const T* row_scores = scores + row * k;
        double factor = all_rows * row_factor(row_scores, *max, u, k, all_rows, inv_epsilon);
        for_vectors_of_row(k, [&](int j, int count) {
            Vector8 e = exponentials(row_scores + j, count, *max, inv_epsilon);
            double factors[8];
            load_doubles(factors, u + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++) e.v[i] = static_cast<float>(e.v[i] * factors[i] * factor);
            store_vector8(q + row * k + j, e, count);
        });
    });
}

KERNEL void sinkhorn_assign_f32(float* q, const float* scores, const float* max, const double* u, int b,
                                int k, double all_rows, float inv_epsilon) {
    assign(q, scores, max, u, b, k, all_rows, inv_epsilon);
}
KERNEL void sinkhorn_assign_bf16(float* q, const bf16* scores, const float* max, const double* u, int b,
                                 int k, double all_rows, float inv_epsilon) {
    assign(q, scores, max, u, b, k, all_rows, inv_epsilon);
}
