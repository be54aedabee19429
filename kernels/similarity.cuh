// Tiles of inner products of rows that live in registers and never reach memory: what the contrastive losses
// and their gradients are made of. FFMA; a block of 256 threads makes 64 x 64 products, 4 x 4 a thread.
//
// Columns are cut into slices of `columns_per_slice`, a multiple of 64, so that small batches fill a GPU;
// slices are put together in order. How many there are must follow from the shape alone.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

constexpr int TILE = 64, TILE_THREADS = 256;

/// A column of a tile in shared memory: TILE floats, and 16 bytes so that neighbours lie in different banks.
constexpr int TILE_LINE = TILE + 4;

/// This thread's place in a tile.
__device__ __forceinline__ int tile_y() { return threadIdx.x / 16 * 4; }
__device__ __forceinline__ int tile_x() { return threadIdx.x % 16 * 4; }

/// s[i][j] = <a_(row + y + i), b_(column + x + j)>, a [n, d] and b [m, d], zeros outside. Has barriers before
/// the first write and after the last, as long as d > 0.
__device__ __forceinline__ void similarity_tile(float (&s)[4][4], const float* a, int n, int row,
                                                const float* b, int m, int column, int d) {
    constexpr int DEPTH = 16;
    __shared__ __align__(16) float as[DEPTH * TILE_LINE], bs[DEPTH * TILE_LINE];
    int y = tile_y(), x = tile_x(), line = threadIdx.x / 4, inner = threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    for (int at = 0; at < d; at += DEPTH) {
        int t = at + inner;
        Vector<float> u{}, v{};
        if (row + line < n) u = load_some(a + int64_t{row + line} * d + t, d - t);
        if (column + line < m) v = load_some(b + int64_t{column + line} * d + t, d - t);
        __syncthreads();  // nobody reads the panels any more
#pragma unroll
        for (int k = 0; k < 4; k++) {
            as[(inner + k) * TILE_LINE + line] = u.v[k];
            bs[(inner + k) * TILE_LINE + line] = v.v[k];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            u = load_vector(as + k * TILE_LINE + y), v = load_vector(bs + k * TILE_LINE + x);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] += u.v[i] * v.v[j];
        }
    }
}

/// Up to this 1 / T the maximum to remove is taken to be 1 / T; above it exponentials would leave f32's
/// range.
constexpr float FIXED_MAXIMUM_UP_TO = 40.0f;

/// A sum of exponentials: exp(max) times sum.
struct ExpSum {
    float max, sum;

    __device__ __forceinline__ static ExpSum none(float inv_t) {
        return {inv_t <= FIXED_MAXIMUM_UP_TO ? inv_t : -INFINITY, 0.0f};
    }
    /// A logit above the maximum raises it; where the maximum is 1 / T only rounding does that.
    __device__ __forceinline__ void add(float logit) {
        if (logit > max) {
            sum *= expf(max - logit);
            max = logit;
        }
        sum += expf(logit - max);
    }
    __device__ __forceinline__ ExpSum and_then(ExpSum other) const {
        float most = max > other.max ? max : other.max;
        if (most == -INFINITY) return {most, 0.0f};
        return {most, sum * expf(max - most) + other.sum * expf(other.max - most)};
    }
};

/// maxima, sums [slices, n]: for each row i of a [n, d] the sum over a slice of the rows of b [m, d] of
/// exp(s_ij inv_t), without those that `skip(i, j)`. Grid (n / 64 rounded up, slices), block 256.
template <typename Skip>
__device__ __forceinline__ void sum_exponentials(float* maxima, float* sums, const float* a, int n,
                                                 const float* b, int m, int d, int columns_per_slice,
                                                 float inv_t, Skip skip) {
    int row = blockIdx.x * TILE + tile_y(), begin = blockIdx.y * columns_per_slice;
    int end = begin + columns_per_slice < m ? begin + columns_per_slice : m;
    ExpSum total[4];
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] = ExpSum::none(inv_t);
    for (int column = begin; column < end; column += TILE) {
        float s[4][4];
        similarity_tile(s, a, n, blockIdx.x * TILE, b, end, column, d);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int c = column + tile_x() + j;
                if (c < end && !skip(row + i, c)) total[i].add(s[i][j] * inv_t);
            }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // The sixteen threads of a row are neighbours. Both partners of a step put the lower lane first: one
        // result.
#pragma unroll
        for (int by = 1; by < 16; by *= 2) {
            ExpSum other = {__shfl_xor_sync(0xffffffffu, total[i].max, by),
                            __shfl_xor_sync(0xffffffffu, total[i].sum, by)};
            total[i] = threadIdx.x & by ? other.and_then(total[i]) : total[i].and_then(other);
        }
        if (threadIdx.x % 16 == 0 && row + i < n) {
            int64_t at = int64_t{blockIdx.y} * n + row + i;
            maxima[at] = total[i].max, sums[at] = total[i].sum;
        }
    }
}

/// log Σ exp of a row from its slices and from one logit more, -INFINITY for none.
__device__ __forceinline__ double log_sum_exp(const float* maxima, const float* sums, int64_t row, int64_t n,
                                              int slices, double logit) {
    double most = logit, sum = 0.0;
    for (int s = 0; s < slices; s++)
        if (maxima[s * n + row] > most) most = maxima[s * n + row];
    if (logit > -INFINITY) sum = exp(logit - most);
    for (int s = 0; s < slices; s++)
        if (sums[s * n + row] > 0.0f) sum += sums[s * n + row] * exp(maxima[s * n + row] - most);
    return log(sum) + most;
}

/// out [slices, n, d] = Σ_j weight(i, j, s_ij) b_j over a slice of the rows of b, the weights made anew from
/// the tiles. Grid (n / 64, d / 128, slices), all rounded up; block 256.
template <typename Weight>
__device__ __forceinline__ void sum_weighted_rows(float* out, const float* a, int n, const float* b, int m,
                                                  int d, int columns_per_slice, Weight weight) {
    constexpr int WIDTH = 128, STEP = 16;
    __shared__ __align__(16) float weights[TILE * TILE_LINE], panel[STEP * WIDTH];
    int row = blockIdx.x * TILE, first = blockIdx.y * WIDTH, begin = blockIdx.z * columns_per_slice;
    int end = begin + columns_per_slice < m ? begin + columns_per_slice : m, y = tile_y(), x = tile_x();
    float sums[4][8] = {};
    for (int column = begin; column < end; column += TILE) {
        float s[4][4];
        similarity_tile(s, a, n, row, b, end, column, d);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Vector<float> w;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool inside = row + y + i < n && column + x + j < end;
                w.v[i] = inside ? weight(row + y + i, column + x + j, s[i][j]) : 0.0f;
            }
            store_vector(weights + (x + j) * TILE_LINE + y, w);
        }
        for (int step = 0; step < TILE && column + step < end; step += STEP) {
            __syncthreads();  // the weights are whole, and nobody reads the panel any more
#pragma unroll
            for (int i = threadIdx.x; i < STEP * WIDTH / 4; i += TILE_THREADS) {
                int r = column + step + i / (WIDTH / 4), t = first + i % (WIDTH / 4) * 4;
                Vector<float> v{};
                if (r < end) v = load_some(b + int64_t{r} * d + t, d - t);
                store_vector(panel + i * 4, v);
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < STEP; k++) {
                Vector<float> w = load_vector(weights + (step + k) * TILE_LINE + y);
                Vector<float> u = load_vector(panel + k * WIDTH + x),
                              v = load_vector(panel + k * WIDTH + 64 + x);
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sums[i][j] += w.v[i] * u.v[j];
                        sums[i][j + 4] += w.v[i] * v.v[j];
                    }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (row + y + i >= n) continue;
        float* to = out + (int64_t{blockIdx.z} * n + row + y + i) * d + first + x;
        int left = d - first - x;
        store_some(to, Vector<float>{{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}}, left);
        store_some(to + 64, Vector<float>{{sums[i][4], sums[i][5], sums[i][6], sums[i][7]}}, left - 64);
    }
}
