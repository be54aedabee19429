// InfoNCE of unit queries q [n, d] with keys k [n, d] against queue [m, d], all f32; see src/ops/info_nce.
// Logits are made in tiles and never stored. d > 0; m may be 0.
//
// Forward, three launches: info_nce_sums, info_nce_finish, row_losses_mean. Backward of q, two:
// info_nce_gradient, info_nce_query_finish; of k, one: info_nce_key_gradient. `inv_t` is 1 / T; `dy` points
// to the gradient of the loss. The queue is cut into slices (m / columns_per_slice, rounded up;
// columns_per_slice is a multiple of 64): enough that row tiles times slices come to some hundred blocks, and
// by the shape alone. With m = 0 there are no slices, and the launches over tiles are left out. Workspaces:
// maxima, sums [slices, n]; partial [slices, n, d]; row_losses [n]. lse [n] is kept for the backward pass. No
// dynamic shared memory.
//
// `own` is null, or points to two numbers on the device, begin and end of the queue's rows that hold keys of
// this batch: a query i leaves out those whose place in the range is i modulo n.
#include "rows.cuh"
#include "similarity.cuh"

/// Whether query i leaves row j of the queue out.
struct Own {
    int begin, end, n;

    __device__ __forceinline__ Own(const int* own, int queries)
        : begin(own ? own[0] : 0), end(own ? own[1] : 0), n(queries) {}
    __device__ __forceinline__ bool operator()(int i, int j) const {
        return j >= begin && j < end && (j - begin) % n == i;
    }
};

/// maxima, sums [slices, n]. Grid (n / 64 rounded up, slices), block 256.
KERNEL BOUNDS(TILE_THREADS) void info_nce_sums(float* maxima, float* sums, const float* q, const float* queue,
                                               const int* own, int n, int m, int d, int columns_per_slice,
                                               double inv_t) {
    sum_exponentials(maxima, sums, q, n, queue, m, d, columns_per_slice, static_cast<float>(inv_t),
                     Own(own, n));
}

/// lse and row_losses [n], a warp a row: (n / 8 rounded up) blocks of 256.
KERNEL void info_nce_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                            const float* q, const float* k, int n, int d, int slices, double inv_t) {
    for_rows(n, [&](int64_t row) {
        double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
        double l = log_sum_exp(maxima, sums, row, n, slices, logit);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// partial [slices, n, d]: what the queue adds to dq. Grid (n / 64, d / 128, slices), all rounded up; block
/// 256.
KERNEL BOUNDS(TILE_THREADS) void info_nce_gradient(float* partial, const float* q, const float* queue,
                                                   const int* own, const float* lse, const float* dy, int n,
                                                   int m, int d, int columns_per_slice, double inv_t) {
    float scale = static_cast<float>(*dy * inv_t / n), t = static_cast<float>(inv_t);
    Own skip(own, n);
    sum_weighted_rows(partial, q, n, queue, m, d, columns_per_slice, [=](int i, int j, float s) {
        return skip(i, j) ? 0.0f : scale * expf(s * t - lse[i]);
    });
}

/// dL / d<q_i, k_i>, in every lane.
__device__ __forceinline__ float key_weight(const float* q, const float* k, const float* lse, const float* dy,
                                            int64_t row, int n, int d, double inv_t) {
    double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
    return static_cast<float>(*dy * inv_t / n * expm1(logit - lse[row]));
}

/// dq from the slices, in order, and its key; added to dq if `accumulate`. A warp a row.
KERNEL void info_nce_query_finish(float* dq, const float* partial, const float* q, const float* k,
                                  const float* lse, const float* dy, int n, int d, int slices, double inv_t,
                                  int accumulate) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        for_pieces_of_row(d, [&](int j, int count) {
            int64_t at = row * d + j;
            Piece sum = load_piece(k + at, count), old{};
#pragma unroll
            for (int e = 0; e < 8; e++) sum.v[e] *= weight;
            for (int s = 0; s < slices; s++) {
                Piece part = load_piece(partial + int64_t{s} * n * d + at, count);
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] += part.v[e];
            }
            if (accumulate) old = load_piece(dq + at, count);
#pragma unroll
            for (int e = 0; e < 8; e++) sum.v[e] += old.v[e];
            store_piece(dq + at, sum, count);
        });
    });
}

/// dk, added to what it holds if `accumulate`. A warp a row.
KERNEL void info_nce_key_gradient(float* dk, const float* q, const float* k, const float* lse,
                                  const float* dy, int n, int d, double inv_t, int accumulate) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        map_row(dk + row * d, q + row * d, d, accumulate, [weight](int, float v) { return weight * v; });
    });
}
