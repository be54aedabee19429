// The k nearest neighbours of unit rows by cosine; see src/eval/knn/mod.rs, where they vote. Exact: every
// pair is compared, in chunks of the bank, so that the workspace is [queries, columns of a chunk].
//
// For each chunk, from the first bank row on: split_rows of similarity.cu, knn_similarities, then knn_top_k,
// which merges the chunk into the best so far. Of equal similarities, the earlier bank row wins. k <= 256.
// Any number of queries, chunks of any size. No dynamic shared memory.
#include "similarity.cuh"

constexpr int K_MAX = 256, THREADS = 256;

/// s [n, columns] = <queries_i, bank_j>, of terms [terms, n, pitch] and [terms, columns, pitch]
/// (similarity.cu). A block of 128 for each tile of 128 x 128.
KERNEL BOUNDS(TILE_THREADS, 2) void knn_similarities(float* s, const bf16* queries, const bf16* bank, int n,
                                                     int columns, int pitch, int terms) {
    using Tile = SimilarityTile;
    SplitRows a{queries, n, pitch, terms}, b{bank, columns, pitch, terms};
    Tile::TileCoord coord(columns);
    Tile::gemm<false>(SplitOperand<TILE, TILE_THREADS, true>(a, coord.row, n),
                      SplitOperand<TILE, TILE_THREADS, false>(b, coord.column, columns), k_tiles_of(a), coord,
                      n, columns, {.out_f32 = s}, DenseRows{columns});
}

/// A sort key of a similarity and its bank row: the larger key is the better neighbour. Floats are mapped to
/// integers of the same order; 0 marks an empty slot.
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

/// Bitonic sort of 2 THREADS keys, the largest first; a barrier before and after.
__device__ __forceinline__ void sort(uint64_t* keys) {
    for (int run = 2; run <= 2 * THREADS; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            int i = threadIdx.x / distance * 2 * distance + threadIdx.x % distance, j = i + distance;
            bool descending = (i & run) == 0;
            uint64_t a = keys[i], b = keys[j];
            if (descending == (a < b)) keys[i] = b, keys[j] = a;
        }
    }
    __syncthreads();
}

/// values, indices [n, k]: the best of s [n, columns], whose first column is bank row `first`, and, if
/// `merge`, of what they hold; the best first. The index is -1 where the bank has had fewer than k rows so
/// far. Grid: n blocks, or fewer; block 256.
KERNEL BOUNDS(THREADS) void knn_top_k(float* values, int* indices, const float* s, int n, int first,
                                      int columns, int k, int merge) {
    // The best so far, sorted, followed by the candidates that are not sorted in yet.
    __shared__ uint64_t keys[K_MAX + THREADS];
    __shared__ int candidates;
    int t = threadIdx.x;
    for (int row = blockIdx.x; row < n; row += gridDim.x) {
        bool valid = merge && t < k && indices[int64_t{row} * k + t] >= 0;
        keys[t] = valid ? key_of(values[int64_t{row} * k + t], indices[int64_t{row} * k + t]) : 0;
        keys[K_MAX + t] = 0;
        if (t == 0) candidates = 0;
        __syncthreads();
        int pending = 0;  // `candidates` between steps, known to every thread
        uint64_t threshold = keys[k - 1];
        for (int base = 0; base < columns; base += THREADS) {
            int j = base + t;
            uint64_t key = j < columns ? key_of(s[int64_t{row} * columns + j], first + j) : 0;
            int better = __syncthreads_count(key > threshold);
            if (pending + better > THREADS) {
                sort(keys);
                threshold = keys[k - 1];
                keys[K_MAX + t] = 0;
                if (t == 0) candidates = 0;
                pending = 0;
                better = __syncthreads_count(key > threshold);
            }
            // The place of a key depends on the order of threads; sorting removes that.
            if (key > threshold) keys[K_MAX + atomicAdd(&candidates, 1)] = key;
            pending += better;
        }
        sort(keys);
        if (t < k) {
            uint64_t key = keys[t];
            values[int64_t{row} * k + t] = key ? similarity_of(key) : -INFINITY;
            indices[int64_t{row} * k + t] = key ? index_of(key) : -1;
        }
        __syncthreads();  // before the next row overwrites the keys
    }
}
