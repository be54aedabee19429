// The k nearest neighbours of unit rows by cosine; see src/eval/knn/mod.rs, which lets them vote. Exact:
// every pair is compared, in chunks of the bank, so that the workspace is [queries, columns of a chunk].
//
// For each chunk, from the first bank row on: split_rows of similarity.cu, knn_similarities, then knn_top_k,
// which merges the chunk into what it has. Equal similarities go to the earlier bank row. k <= 256. Any
// number of queries, chunks of any size. No dynamic shared memory.
#include "similarity.cuh"

constexpr int K_MAX = 256, THREADS = 256;

/// s [n, columns] = <queries_i, bank_j>, of planes [planes, n, pitch] and [planes, columns, pitch]
/// (similarity.cu). A block of 128 for each tile of 128 x 128.
KERNEL BOUNDS(TILE_THREADS, 2) void knn_similarities(float* s, const bf16* queries, const bf16* bank, int n,
                                                     int columns, int pitch, int planes) {
    using Tile = SimilarityTile;
    Planes a{queries, n, pitch, planes}, b{bank, columns, pitch, planes};
    Tile::Corner at(columns);
    Output to{nullptr, s, nullptr, false, nullptr};
    Tile::product<false>(Terms<TILE, TILE_THREADS, true>(a, at.row, n),
                         Terms<TILE, TILE_THREADS, false>(b, at.column, columns), steps_of(a), at, n, columns,
                         to, [&](int i) { return int64_t{i} * columns; });
}

/// A similarity and its bank row as one number: the larger is the better neighbour. Floats are mapped to
/// integers of the same order; no neighbour is 0.
__device__ __forceinline__ uint64_t key_of(float similarity, int index) {
    unsigned bits = __float_as_uint(similarity);
    unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t{order} << 32 | ~static_cast<unsigned>(index);
}
__device__ __forceinline__ float similarity_of(uint64_t key) {
    unsigned order = static_cast<unsigned>(key >> 32);
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
__device__ __forceinline__ int index_of(uint64_t key) {
    return static_cast<int>(~static_cast<unsigned>(key));
}

/// Sorts 2 THREADS keys, the largest first (bitonic); a barrier before and after.
__device__ __forceinline__ void sort(uint64_t* keys) {
    for (int run = 2; run <= 2 * THREADS; run *= 2) {
        for (int apart = run / 2; apart > 0; apart /= 2) {
            __syncthreads();
            int i = threadIdx.x / apart * 2 * apart + threadIdx.x % apart, j = i + apart;
            bool falling = (i & run) == 0;
            uint64_t a = keys[i], b = keys[j];
            if (falling == (a < b)) keys[i] = b, keys[j] = a;
        }
    }
    __syncthreads();
}

/// values, indices [n, k]: the best of s [n, columns], whose first column is bank row `first`, and, if
/// `merge`, of what they hold, the best first. What is missing while the bank has shown fewer than k rows has
/// index -1. Grid: n blocks, or fewer; block 256.
KERNEL BOUNDS(THREADS) void knn_top_k(float* values, int* indices, const float* s, int n, int first,
                                      int columns, int k, int merge) {
    // The best so far, sorted, and behind them those that wait to be sorted in.
    __shared__ uint64_t keys[K_MAX + THREADS];
    __shared__ int waiting;
    int t = threadIdx.x;
    for (int row = blockIdx.x; row < n; row += gridDim.x) {
        bool known = merge && t < k && indices[int64_t{row} * k + t] >= 0;
        keys[t] = known ? key_of(values[int64_t{row} * k + t], indices[int64_t{row} * k + t]) : 0;
        keys[K_MAX + t] = 0;
        if (t == 0) waiting = 0;
        __syncthreads();
        int pending = 0;  // what `waiting` is between steps, in every thread
        uint64_t threshold = keys[k - 1];
        for (int base = 0; base < columns; base += THREADS) {
            int j = base + t;
            uint64_t key = j < columns ? key_of(s[int64_t{row} * columns + j], first + j) : 0;
            int better = __syncthreads_count(key > threshold);
            if (pending + better > THREADS) {
                sort(keys);
                threshold = keys[k - 1];
                keys[K_MAX + t] = 0;
                if (t == 0) waiting = 0;
                pending = 0;
                better = __syncthreads_count(key > threshold);
            }
            // Which place a key gets is left to chance; sorting makes it not matter.
            if (key > threshold) keys[K_MAX + atomicAdd(&waiting, 1)] = key;
            pending += better;
        }
        sort(keys);
        if (t < k) {
            uint64_t key = keys[t];
            values[int64_t{row} * k + t] = key ? similarity_of(key) : -INFINITY;
            indices[int64_t{row} * k + t] = key ? index_of(key) : -1;
        }
        __syncthreads();  // before the next row's first keys
    }
}
