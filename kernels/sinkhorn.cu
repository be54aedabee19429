// Sinkhorn-Knopp over scores [b, k]; see src/ops/sinkhorn. Q_ij = v_i E_ij u_j with E [b, k] in f32 and the
// factors u [k] of prototypes and v [b] of rows in f64: an iteration reads E twice and writes nothing of its
// size.
//
// Launches, in order; a `Group` of several processes reduces where it says so:
//   sinkhorn_max_*      grid G <= 1024 blocks of 256 over n = b k: maxima [G]
//   sinkhorn_max_f32    one block of 256 over n = G: max [1]; then the group's maximum of it
//   sinkhorn_exp_*      any grid of 256: E
//   `iterations` times
//     sinkhorn_columns  grid (k / 256 rounded up, chunks of rows_per_chunk rows), block 256: partial
//                       [chunks, k]; v is null in the first iteration
//     sinkhorn_share    (k / 256 rounded up) blocks of 256: u; a group calls it with parts = 0 for plain
//                       sums, adds those up, and calls it again with chunks = 1 and the sums as partial
//     sinkhorn_rows     a warp a row, (b / 8 rounded up) blocks of 256: v
//   sinkhorn_assign     as sinkhorn_rows: q [b, k], which may be E
// `all_rows` counts those of all processes. No dynamic shared memory.
#include "rows.cuh"

constexpr int THREADS = 256;

template <typename T>
__device__ __forceinline__ void largest(float* maxima, const T* x, int64_t n) {
    __shared__ float partial[THREADS / 32];
    float most = -INFINITY;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Piece p = load_piece(x + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < count && p.v[k] > most) most = p.v[k];
    }
    most = warp_max(most);
    if (is_first_lane()) partial[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < THREADS / 32; w++) most = partial[w] > most ? partial[w] : most;
    maxima[blockIdx.x] = most;
}

KERNEL BOUNDS(THREADS) void sinkhorn_max_f32(float* maxima, const float* scores, int64_t n) {
    largest(maxima, scores, n);
}
KERNEL BOUNDS(THREADS) void sinkhorn_max_bf16(float* maxima, const bf16* scores, int64_t n) {
    largest(maxima, scores, n);
}

/// E = exp((scores - *max) / epsilon), n = b k.
template <typename T>
__device__ __forceinline__ void exponentials(float* e, const T* scores, const float* max, int64_t n,
                                             float inv_epsilon) {
    float most = *max;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Piece p = load_piece(scores + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++) p.v[k] = expf((p.v[k] - most) * inv_epsilon);
        store_piece(e + i, p, count);
    }
}

KERNEL void sinkhorn_exp_f32(float* e, const float* scores, const float* max, int64_t n, float inv_epsilon) {
    exponentials(e, scores, max, n, inv_epsilon);
}
KERNEL void sinkhorn_exp_bf16(float* e, const bf16* scores, const float* max, int64_t n, float inv_epsilon) {
    exponentials(e, scores, max, n, inv_epsilon);
}

/// partial [chunks, k]: Σ_i v_i E_ij over the rows of a chunk, v = 1 where it is null.
KERNEL BOUNDS(THREADS) void sinkhorn_columns(double* partial, const float* e, const double* v, int b, int k,
                                             int rows_per_chunk) {
    int j = blockIdx.x * THREADS + threadIdx.x;
    int begin = blockIdx.y * rows_per_chunk, end = begin + rows_per_chunk < b ? begin + rows_per_chunk : b;
    if (j >= k) return;
    double sum = 0.0;
    for (int i = begin; i < end; i++) sum += e[int64_t{i} * k + j] * (v ? v[i] : 1.0);
    partial[int64_t{blockIdx.y} * k + j] = sum;
}

/// 1 / (parts sum); nothing where there is nothing to share out.
__device__ __forceinline__ double share(double sum, double parts) {
    return sum > 0.0 ? 1.0 / (parts * sum) : 0.0;
}

/// u_j = share(Σ partial, parts), chunks in order; the sum itself where parts is 0.
KERNEL BOUNDS(THREADS) void sinkhorn_share(double* u, const double* partial, int chunks, int k,
                                           double parts) {
    int j = blockIdx.x * THREADS + threadIdx.x;
    if (j >= k) return;
    double sum = 0.0;
    for (int c = 0; c < chunks; c++) sum += partial[int64_t{c} * k + j];
    u[j] = parts > 0.0 ? share(sum, parts) : sum;
}

KERNEL void sinkhorn_rows(double* v, const float* e, const double* u, int b, int k, double all_rows) {
    for_rows(b, [&](int64_t row) {
        double sum = 0.0;
        for (int j = threadIdx.x % 32; j < k; j += 32) sum += e[row * k + j] * u[j];
        sum = warp_sum(sum);
        if (is_first_lane()) v[row] = share(sum, all_rows);
    });
}

KERNEL void sinkhorn_assign(float* q, const float* e, const double* u, const double* v, int b, int k,
                            double all_rows) {
    for_rows(b, [&](int64_t row) {
        double factor = v[row] * all_rows;
        for (int j = threadIdx.x % 32; j < k; j += 32)
            q[row * k + j] = static_cast<float>(e[row * k + j] * u[j] * factor);
    });
}
