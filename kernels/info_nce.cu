// InfoNCE of unit queries q [n, d] with keys k [n, d] against queue [m, d], all f32, and the bf16 terms of q
// and of the queue [terms, rows, pitch] (similarity.cu); see src/ops/info_nce. Logits are computed in tiles
// and never stored. d > 0; m may be 0.
//
// Forward, three launches: info_nce_sums, info_nce_finish, row_losses_mean. Backward of q, two:
// info_nce_gradient, info_nce_query_finish; of k, one: info_nce_key_gradient. `inv_t` is 1 / T; `dy` points
// to the gradient of the loss. The queue is divided into splits (m / columns_per_split, rounded up), enough
// that row tiles times splits come to some hundred blocks, and by the shape alone. With m = 0 there are no
// splits, and the launches over tiles are omitted. Workspaces: maxima, sums [splits, n]; partial [splits, n,
// d]; row_losses [n]. lse [n] is saved for the backward pass. No dynamic shared memory.
//
// `own` is null, or points to two numbers on the device: begin and end of the queue's rows that hold keys of
// this batch, of all ranks. Its query number `first + i` of `batch`, this rank's query i, masks those whose
// position in the range is that number modulo `batch`.
#include "similarity.cuh"

/// The mask of a query's own keys: whether query i ignores row j of the queue.
struct OwnKeys {
    int begin, end, batch, first;

    __device__ __forceinline__ OwnKeys(const int* own, int batch, int first)
        : begin(own ? own[0] : 0), end(own ? own[1] : 0), batch(batch), first(first) {}
    __device__ __forceinline__ bool operator()(int i, int j) const {
        return j >= begin && j < end && (j - begin) % batch == first + i;
    }
    /// Whether some query may mask one of `count` rows from `first` on.
    __device__ __forceinline__ bool overlaps(int first, int count) const {
        return first < end && first + count > begin;
    }
};

/// maxima, sums [splits, n]. Grid (n / 128 rounded up, splits), block 128; columns_per_split is a multiple of
/// 128.
KERNEL BOUNDS(TILE_THREADS, 2) void info_nce_sums(float* maxima, float* sums, const bf16* q,
                                                  const bf16* queue, const int* own, int n, int m, int batch,
                                                  int first, int pitch, int terms, int columns_per_split,
                                                  double inv_t) {
    OwnKeys is_masked(own, batch, first);
    sum_exponentials(
        maxima, sums, SplitRows{q, n, pitch, terms}, SplitRows{queue, m, pitch, terms}, columns_per_split,
        static_cast<float>(inv_t), [&](int, int column) { return is_masked.overlaps(column, TILE); },
        is_masked);
}

/// lse and row_losses [n], a warp per row: (n / 8 rounded up) blocks of 256.
KERNEL void info_nce_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                            const float* q, const float* k, int n, int d, int splits, double inv_t) {
    for_rows(n, [&](int64_t row) {
        double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
        double l = log_sum_exp(maxima, inv_t, sums, row, n, splits, logit);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// p_ij, which is dL / ds_ij up to a scale.
struct QueueWeight {
    const float* lse;
    float scale;  // log2(e) / T
    OwnKeys is_masked;

    using Row = float;  // log2 Σ exp
    struct Column {};
    __device__ __forceinline__ Row row(int i) const { return lse[i] * LOG2_E; }
    __device__ __forceinline__ Column column(int) const { return {}; }
    __device__ __forceinline__ float operator()(Row row, Column, float s) const {
        return exp2_fast(fmaf(s, scale, -row));
    }
    __device__ __forceinline__ bool may_correct(int, int column) const {
        return is_masked.overlaps(column, WEIGHT_TILE);
    }
    __device__ __forceinline__ float corrected(float w, int i, int j) const {
        return is_masked(i, j) ? 0.0f : w;
    }
};

template <int TERMS>
__device__ __forceinline__ void gradient(float* partial, const bf16* q, const bf16* queue, const int* own,
                                         const float* lse, const float* dy, int n, int m, int batch,
                                         int first, int d, int pitch, int columns_per_split, double inv_t) {
    WeightedSum<TERMS, QueueWeight>(SplitRows{q, n, pitch, TERMS}, SplitRows{queue, m, pitch, TERMS},
                                    columns_per_split)
        .run(partial, d, static_cast<float>(*dy * inv_t / n),
             QueueWeight{lse, static_cast<float>(inv_t) * LOG2_E, OwnKeys(own, batch, first)});
}

/// partial [splits, n, d]: the queue's contribution to dq, with two or three terms. columns_per_split is a
/// multiple of
/// 64. Grid (n / 64, d / 128, splits), all rounded up; block 128.
KERNEL BOUNDS(WEIGHT_THREADS, 2) void info_nce_gradient_2(float* partial, const bf16* q, const bf16* queue,
                                                          const int* own, const float* lse, const float* dy,
                                                          int n, int m, int batch, int first, int d,
                                                          int pitch, int columns_per_split, double inv_t) {
    gradient<2>(partial, q, queue, own, lse, dy, n, m, batch, first, d, pitch, columns_per_split, inv_t);
}
KERNEL BOUNDS(WEIGHT_THREADS, 2) void info_nce_gradient_3(float* partial, const bf16* q, const bf16* queue,
                                                          const int* own, const float* lse, const float* dy,
                                                          int n, int m, int batch, int first, int d,
                                                          int pitch, int columns_per_split, double inv_t) {
    gradient<3>(partial, q, queue, own, lse, dy, n, m, batch, first, d, pitch, columns_per_split, inv_t);
}

/// dL / d<q_i, k_i>, in every lane.
__device__ __forceinline__ float key_weight(const float* q, const float* k, const float* lse, const float* dy,
                                            int64_t row, int n, int d, double inv_t) {
    double logit = row_dot(q + row * d, k + row * d, d) * inv_t;
    return static_cast<float>(*dy * inv_t / n * expm1(logit - lse[row]));
}

/// dq: the contributions of its key and of the splits, in order. A warp per row.
KERNEL void info_nce_query_finish(float* dq, const float* partial, const float* q, const float* k,
                                  const float* lse, const float* dy, int n, int d, int splits, double inv_t) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        for_vectors_of_row(d, [&](int j, int count) {
            int64_t at = row * d + j;
            Vector8 sum = load_vector8(k + at, count);
#pragma unroll
            for (int e = 0; e < 8; e++) sum.v[e] *= weight;
            for (int s = 0; s < splits; s++) {
                Vector8 part = load_vector8(partial + int64_t{s} * n * d + at, count);
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] += part.v[e];
            }
            store_vector8(dq + at, sum, count);
        });
    });
}

/// dk. A warp per row.
KERNEL void info_nce_key_gradient(float* dk, const float* q, const float* k, const float* lse,
                                  const float* dy, int n, int d, double inv_t) {
    for_rows(n, [&](int64_t row) {
        float weight = key_weight(q, k, lse, dy, row, n, d, inv_t);
        map_row(dk + row * d, q + row * d, d, [weight](int, float v) { return weight * v; });
    });
}
