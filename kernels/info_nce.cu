// InfoNCE of unit queries q [n, d] with keys k [n, d] against queue [m, d], all f32, and planes of q and the
// queue [planes, rows, pitch] (similarity.cu); see src/ops/info_nce. Logits are made in tiles and never
// stored. d > 0; m may be 0.
//
// Forward, three launches: info_nce_sums, info_nce_finish, row_losses_mean. Backward of q, two:
// info_nce_gradient, info_nce_query_finish; of k, one: info_nce_key_gradient. `inv_t` is 1 / T; `dy` points
// to the gradient of the loss. The queue is cut into slices (m / columns_per_slice, rounded up), enough that
// row tiles times slices come to some hundred blocks, and by the shape alone. With m = 0 there are no slices,
// and the launches over tiles are left out. Workspaces: maxima, sums [slices, n]; partial [slices, n, d];
// row_losses [n]. lse [n] is kept for the backward pass. No dynamic shared memory.
//
// `own` is null, or points to two numbers on the device, begin and end of the queue's rows that hold keys of
// this batch: a query i leaves out those whose place in the range is i modulo n.
#include "similarity.cuh"

/// Whether query i leaves row j of the queue out.
struct Own {
    int begin, end, n;

    __device__ __forceinline__ Own(const int* own, int queries)
        : begin(own ? own[0] : 0), end(own ? own[1] : 0), n(queries) {}
    __device__ __forceinline__ bool operator()(int i, int j) const {
        return j >= begin && j < end && (j - begin) % n == i;
    }
    /// Whether some query may leave out one of `count` rows from `first` on.
    __device__ __forceinline__ bool among(int first, int count) const {
        return first < end && first + count > begin;
    }
};

/// maxima, sums [slices, n]. Grid (n / 128 rounded up, slices), block 128; columns_per_slice is a multiple of
/// 128.
KERNEL BOUNDS(TILE_THREADS, 2) void info_nce_sums(float* maxima, float* sums, const bf16* q,
                                                  const bf16* queue, const int* own, int n, int m, int pitch,
                                                  int planes, int columns_per_slice, double inv_t) {
    Own skip(own, n);
    sum_exponentials(
        maxima, sums, Planes{q, n, pitch, planes}, Planes{queue, m, pitch, planes}, columns_per_slice,
        static_cast<float>(inv_t), [&](int, int column) { return skip.among(column, TILE); }, skip);
}

/// lse and row_losses [n], a warp a row: (n / 8 rounded up) blocks of 256.
KERNEL void info_nce_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                            const float* q, const float* k, int n, int d, int slices, double inv_t) {
    for_rows(n, [&](int64_t row) {
        double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
        double l = log_sum_exp(maxima, inv_t, sums, row, n, slices, logit);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// p_ij, which is dL / ds_ij but for its scale.
struct QueueWeight {
    const float* lse;
    float scale;  // log2(e) / T
    Own skip;

    using Row = float;  // log Σ exp in powers of 2
    struct Column {};
    __device__ __forceinline__ Row row(int i) const { return lse[i] * LOG2_E; }
    __device__ __forceinline__ Column column(int) const { return {}; }
    __device__ __forceinline__ float operator()(Row row, Column, float s) const {
        return exp2_fast(fmaf(s, scale, -row));
    }
    __device__ __forceinline__ bool corrects(int, int column) const {
        return skip.among(column, WEIGHT_TILE);
    }
    __device__ __forceinline__ float corrected(float w, int i, int j) const { return skip(i, j) ? 0.0f : w; }
};

template <int PLANES>
__device__ __forceinline__ void gradient(float* partial, const bf16* q, const bf16* queue, const int* own,
                                         const float* lse, const float* dy, int n, int m, int d, int pitch,
                                         int columns_per_slice, double inv_t) {
    WeightedSum<PLANES, QueueWeight>(Planes{q, n, pitch, PLANES}, Planes{queue, m, pitch, PLANES},
                                     columns_per_slice)
        .run(partial, d, static_cast<float>(*dy * inv_t / n),
             QueueWeight{lse, static_cast<float>(inv_t) * LOG2_E, Own(own, n)});
}

/// partial [slices, n, d]: what the queue adds to dq. By two or three planes. columns_per_slice is a multiple
/// of 64. Grid (n / 64, d / 128, slices), all rounded up; block 128.
KERNEL BOUNDS(WEIGHT_THREADS, 2) void info_nce_gradient_2(float* partial, const bf16* q, const bf16* queue,
                                                          const int* own, const float* lse, const float* dy,
                                                          int n, int m, int d, int pitch,
                                                          int columns_per_slice, double inv_t) {
    gradient<2>(partial, q, queue, own, lse, dy, n, m, d, pitch, columns_per_slice, inv_t);
}
KERNEL BOUNDS(WEIGHT_THREADS, 2) void info_nce_gradient_3(float* partial, const bf16* q, const bf16* queue,
                                                          const int* own, const float* lse, const float* dy,
                                                          int n, int m, int d, int pitch,
                                                          int columns_per_slice, double inv_t) {
    gradient<3>(partial, q, queue, own, lse, dy, n, m, d, pitch, columns_per_slice, inv_t);
}

/// dL / d<q_i, k_i>, in every lane.
__device__ __forceinline__ float key_weight(const float* q, const float* k, const float* lse, const float* dy,
                                            int64_t row, int n, int d, double inv_t) {
    double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
    return static_cast<float>(*dy * inv_t / n * expm1(logit - lse[row]));
}

/// dq from the slices, in order, and its key. A warp a row.
KERNEL void info_nce_query_finish(float* dq, const float* partial, const float* q, const float* k,
                                  const float* lse, const float* dy, int n, int d, int slices, double inv_t) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        for_pieces_of_row(d, [&](int j, int count) {
            int64_t at = row * d + j;
            Piece sum = load_piece(k + at, count);
#pragma unroll
            for (int e = 0; e < 8; e++) sum.v[e] *= weight;
            for (int s = 0; s < slices; s++) {
                Piece part = load_piece(partial + int64_t{s} * n * d + at, count);
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] += part.v[e];
            }
            store_piece(dq + at, sum, count);
        });
    });
}

/// dk. A warp a row.
KERNEL void info_nce_key_gradient(float* dk, const float* q, const float* k, const float* lse,
                                  const float* dy, int n, int d, double inv_t) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        map_row(dk + row * d, q + row * d, d, [weight](int, float v) { return weight * v; });
    });
}
