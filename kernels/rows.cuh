// Rows of any length, a warp to each: what normalisations and losses over rows share. blockDim.x is a
// multiple of 32 throughout, so that the lanes of a warp always have one row.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

/// Eight elements in registers, of whatever type in memory.
struct Piece {
    float v[8];
};

/// Up to eight elements, zeros behind them.
__device__ __forceinline__ Piece load_piece(const bf16* at, int count) {
    Vector<bf16> a = load_some(at, count);
    return {{a.v[0], a.v[1], a.v[2], a.v[3], a.v[4], a.v[5], a.v[6], a.v[7]}};
}
__device__ __forceinline__ Piece load_piece(const float* at, int count) {
    Vector<float> a = load_some(at, count), b{};
    if (count > 4) b = load_some(at + 4, count - 4);
    return {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
}

__device__ __forceinline__ void store_piece(bf16* at, const Piece& p, int count) {
    store_some(at, Vector<bf16>{{p.v[0], p.v[1], p.v[2], p.v[3], p.v[4], p.v[5], p.v[6], p.v[7]}}, count);
}
__device__ __forceinline__ void store_piece(float* at, const Piece& p, int count) {
    store_some(at, Vector<float>{{p.v[0], p.v[1], p.v[2], p.v[3]}}, count);
    if (count > 4) store_some(at + 4, Vector<float>{{p.v[4], p.v[5], p.v[6], p.v[7]}}, count - 4);
}

/// Calls f(row) for each row, from all lanes of one warp.
template <typename F>
__device__ __forceinline__ void for_rows(int64_t n, F f) {
    for (int64_t row = grid_rank() / 32; row < n; row += grid_threads() / 32) f(row);
}

/// Calls f(first element, count) for the pieces of a row that this lane has.
template <typename F>
__device__ __forceinline__ void for_pieces_of_row(int d, F f) {
    for (int j = threadIdx.x % 32 * 8; j < d; j += 256) f(j, d - j < 8 ? d - j : 8);
}

__device__ __forceinline__ bool is_first_lane() { return threadIdx.x % 32 == 0; }

/// The inner product of two rows, in f64, in every lane.
template <typename A, typename B>
__device__ __forceinline__ double row_dot(const A* a, const B* b, int d) {
    double sum = 0.0;
    for_pieces_of_row(d, [&](int j, int count) {
        Piece u = load_piece(a + j, count), v = load_piece(b + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += static_cast<double>(u.v[k]) * v.v[k];
    });
    return warp_sum(sum);
}

/// y = f(index in the row, x), element by element.
template <typename Out, typename In, typename F>
__device__ __forceinline__ void map_row(Out* y, const In* x, int d, F f) {
    for_pieces_of_row(d, [&](int j, int count) {
        Piece p = load_piece(x + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) p.v[k] = f(j + k, p.v[k]);
        store_piece(y + j, p, count);
    });
}

/// y = f(a, b), element by element.
template <typename Out, typename A, typename B, typename F>
__device__ __forceinline__ void zip_rows(Out* y, const A* a, const B* b, int d, F f) {
    for_pieces_of_row(d, [&](int j, int count) {
        Piece p = load_piece(a + j, count), q = load_piece(b + j, count);
#pragma unroll
        for (int k = 0; k < 8; k++) p.v[k] = f(p.v[k], q.v[k]);
        store_piece(y + j, p, count);
    });
}

/// The softmax of a row of x / T: p_j = exp((x_j - max) / T) / sum. Nothing of it is saved for the backward
/// pass: read again, it is exact however large the scores are.
struct RowSoftmax {
    float max, inv_t;
    double sum;

    template <typename T>
    __device__ __forceinline__ RowSoftmax(const T* x, int k, float inverse_temperature) {
        inv_t = inverse_temperature;
        float most = -INFINITY;
        for_pieces_of_row(k, [&](int j, int count) {
            Piece p = load_piece(x + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count && p.v[i] > most) most = p.v[i];
        });
        max = warp_max(most);
        double total = 0.0;
        for_pieces_of_row(k, [&](int j, int count) {
            Piece p = load_piece(x + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count) total += exp_of(p.v[i]);
        });
        sum = warp_sum(total);
    }

    __device__ __forceinline__ float exp_of(float x) const { return expf((x - max) * inv_t); }
    /// log p_j is this much below zero.
    __device__ __forceinline__ double loss(float x) const {
        return log(sum) - (static_cast<double>(x) - max) * inv_t;
    }
};
