// Rows of any length, a warp per row: shared by normalisations and losses over rows. blockDim.x is always a
// multiple of 32, so that all lanes of a warp have the same row.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

/// Eight elements as f32 in registers, whatever their type in memory.
struct Vector8 {
    float v[8];
};

/// Loads the first `count` elements and fills up with zeros; `count` may exceed eight.
__device__ __forceinline__ Vector8 load_vector8(const bf16* at, int count) {
    Vector<bf16> a = load_partial(at, count);
    return {{a.v[0], a.v[1], a.v[2], a.v[3], a.v[4], a.v[5], a.v[6], a.v[7]}};
}
__device__ __forceinline__ Vector8 load_vector8(const float* at, int count) {
    Vector<float> a = load_partial(at, count), b{};
    if (count > 4) b = load_partial(at + 4, count - 4);
    return {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
}

__device__ __forceinline__ void store_vector8(bf16* at, const Vector8& p, int count) {
    store_partial(at, Vector<bf16>{{p.v[0], p.v[1], p.v[2], p.v[3], p.v[4], p.v[5], p.v[6], p.v[7]}}, count);
}
__device__ __forceinline__ void store_vector8(float* at, const Vector8& p, int count) {
    store_partial(at, Vector<float>{{p.v[0], p.v[1], p.v[2], p.v[3]}}, count);
    if (count > 4) store_partial(at + 4, Vector<float>{{p.v[4], p.v[5], p.v[6], p.v[7]}}, count - 4);
}

/// Calls f(row) for each row, in all lanes of one warp.
template <typename F>
__device__ __forceinline__ void for_rows(int64_t n, F f) {
    for (int64_t row = grid_rank() / 32; row < n; row += grid_threads() / 32) f(row);
}

/// Calls f(first element, count) for this lane's vectors of eight elements of a row.
template <typename F>
__device__ __forceinline__ void for_vectors_of_row(int d, F f) {
    for (int j = threadIdx.x % 32 * 8; j < d; j += 256) f(j, d - j < 8 ? d - j : 8);
}

__device__ __forceinline__ bool is_first_lane() { return threadIdx.x % 32 == 0; }

/// The inner product of two rows, in f64, in every lane.
template <typename A, typename B>
__device__ __forceinline__ double row_dot(const A* a, const B* b, int d) {
    double sum = 0.0;
    for_vectors_of_row(d, [&](int j, int count) {
        Vector8 u = load_vector8(a + j, count), v = load_vector8(b + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += static_cast<double>(u.v[k]) * v.v[k];
    });
    return warp_sum(sum);
}

/// y = f(index in the row, x), element by element.
template <typename Out, typename In, typename F>
__device__ __forceinline__ void map_row(Out* y, const In* x, int d, F f) {
    for_vectors_of_row(d, [&](int j, int count) {
        Vector8 p = load_vector8(x + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) p.v[k] = f(j + k, p.v[k]);
        store_vector8(y + j, p, count);
    });
}

/// y = f(a, b), element by element.
template <typename Out, typename A, typename B, typename F>
__device__ __forceinline__ void zip_rows(Out* y, const A* a, const B* b, int d, F f) {
    for_vectors_of_row(d, [&](int j, int count) {
        Vector8 p = load_vector8(a + j, count), q = load_vector8(b + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) p.v[k] = f(p.v[k], q.v[k]);
        store_vector8(y + j, p, count);
    });
}

/// The softmax of a row of x / T: p_j = exp((x_j - max) / T) / sum. The backward pass recomputes it from x
/// instead of saving it, which is exact however large the scores are.
struct RowSoftmax {
    float max, inv_t;
    double sum;

    template <typename T>
    __device__ __forceinline__ RowSoftmax(const T* x, int k, float inverse_temperature) {
        inv_t = inverse_temperature;
        float largest = -INFINITY;
        for_vectors_of_row(k, [&](int j, int count) {
            Vector8 p = load_vector8(x + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count && p.v[i] > largest) largest = p.v[i];
        });
        max = warp_max(largest);
        double total = 0.0;
        for_vectors_of_row(k, [&](int j, int count) {
            Vector8 p = load_vector8(x + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count) total += exp_of(p.v[i]);
        });
        sum = warp_sum(total);
    }

    __device__ __forceinline__ float exp_of(float x) const { return expf((x - max) * inv_t); }
    /// -log p_j.
    __device__ __forceinline__ double loss(float x) const {
        return log(sum) - (static_cast<double>(x) - max) * inv_t;
    }
};
