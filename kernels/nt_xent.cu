// NT-Xent over unit rows z [rows, d], f32, and their bf16 terms [terms, rows, pitch] (similarity.cu); see
// src/ops/nt_xent. The similarity matrix is computed in tiles and never stored. d > 0. Of several ranks each
// has `rows` of its own among the `all_rows` of all ranks, from place `first` of each view on.
//
// Forward: nt_xent_sums, which computes each pair once and subtracts 1 / T from every logit, or, where that
// would leave f32's range (T < 0.025) and on several ranks, nt_xent_sums_online; then nt_xent_finish and
// row_losses_mean. Backward, two: nt_xent_gradient, then split_k_reduce_f32 of matmul.cu with n = rows d,
// which also accumulates. `inv_t` is 1 / T. The columns are split by the shape alone. Workspaces: sums
// [groups, rows], or maxima and sums [splits, rows]; partial [splits, rows, d]; row_losses [rows]. lse [rows],
// of all ranks, is saved for the backward pass. No dynamic shared memory.
//
// A main-loop step of nt_xent_sums by nvcc 13.0 for sm_90a: as matmul.cu's of 128 x 128. Its exponentials,
// 16,384 per tile, take 1,024 cycles of a multiprocessor and three GEMMs of 128 x 128 x 128 at least 4,900:
// another block's mma hide them.
#include "similarity.cuh"

__device__ __forceinline__ int positive_of(int i, int rows) {
    return i < rows / 2 ? i + rows / 2 : i - rows / 2;
}

/// The places of a rank's rows, of two views, among those of all ranks.
struct Places {
    int rows, all_rows, first;

    __device__ __forceinline__ int half() const { return rows / 2; }
    __device__ __forceinline__ int of(int i) const {
        return first + i + (i < half() ? 0 : all_rows / 2 - half());
    }
    __device__ __forceinline__ int of_positive(int i) const { return of(positive_of(i, rows)); }
    /// Whether columns from `column` on may have the row itself, or its positive, for one of as many rows from
    /// `row` on, none of which need exist.
    __device__ __forceinline__ bool may_meet(int row, int column, int count, bool positive) const {
        auto meets = [&](int place) { return abs(place - column) < count; };
        int low = first + row, high = low - half() + all_rows / 2;  // a row of the first view, or of the second
        bool itself = meets(low) || meets(high);
        return itself || (positive && (meets(low + all_rows / 2) || meets(high - all_rows / 2)));
    }
};

/// sums [groups, rows], each written: rows are in groups of `tiles_per_group` tiles of 128, and sums[g][i] is
/// the sum of exp((s_ij - 1) / T) over the j != i of group g. A block for each pair of groups, groups (groups
/// + 1) / 2: it has one group as rows and the other as columns, and, as s is symmetric, writes the sums of
/// both. Each output has exactly one writer.
KERNEL BOUNDS(TILE_THREADS, 2) void nt_xent_sums(float* sums, const bf16* z, int rows, int pitch, int terms,
                                                 int tiles_per_group, double inv_t) {
    using Tile = SimilarityTile;
    constexpr int WARP_ROWS = TILE / Tile::WARP_M, WARP_COLUMNS = TILE / Tile::WARP_N;
    SplitRows all{z, rows, pitch, terms};
    int tiles = (rows + TILE - 1) / TILE, groups = (tiles + tiles_per_group - 1) / tiles_per_group;
    // blockIdx.x counts the pairs (group, other >= group) row by row of a triangle.
    int group = 0, pair = blockIdx.x;
    for (; pair >= groups - group; group++) pair -= groups - group;
    const int other = group + pair, t = threadIdx.x, first = group * tiles_per_group;
    auto end_of = [&](int g) { return min((g + 1) * tiles_per_group, tiles); };
    float *of_rows = sums + int64_t{other} * rows, *of_columns = sums + int64_t{group} * rows;
    const float scale = static_cast<float>(inv_t) * LOG2_E;
#pragma unroll 1
    for (int i = first; i < end_of(group); i++) {
        float of_row = 0.0f;  // the sum of this thread's row
#pragma unroll 1
        for (int j = group == other ? i : other * tiles_per_group; j < end_of(other); j++) {
            Tile::Accumulators s = {};
            similarity_tile(s, all, i * TILE, rows, all, j * TILE, rows);
            const bool unmasked = i != j && (max(i, j) + 1) * TILE <= rows;
            float* partial =
                reinterpret_cast<float*>(shared_memory<Tile::BYTES>());  // [WARP_COLUMNS + WARP_ROWS, TILE]
            float column_sums[Tile::MMA_N][2] = {};
            __syncthreads();
#pragma unroll
            for (int r = 0; r < Tile::MMA_M; r++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int y = Tile::row_of(r, half);
                    float sum = 0.0f;
#pragma unroll
                    for (int p = 0; p < Tile::MMA_N; p++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            int x = Tile::column_of(p, e);
                            float exponential = exp2_fast(fmaf(s[r][p][half * 2 + e], scale, -scale));
                            if (!unmasked) {
                                bool is_pair = i * TILE + y < rows && j * TILE + x < rows;
                                if (!is_pair || i * TILE + y == j * TILE + x) exponential = 0.0f;
                            }
                            sum += exponential;
                            column_sums[p][e] += exponential;
                        }
#pragma unroll
                    for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
                    if (t % 4 == 0) partial[Tile::column_of(0, 0) / Tile::WARP_N * TILE + y] = sum;
                }
#pragma unroll
            for (int p = 0; p < Tile::MMA_N; p++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
#pragma unroll
                    for (int mask = 4; mask < 32; mask *= 2)
                        column_sums[p][e] += __shfl_xor_sync(0xffffffffu, column_sums[p][e], mask);
                    if (t % 32 < 4)
                        partial[(WARP_COLUMNS + Tile::row_of(0, 0) / Tile::WARP_M) * TILE +
                                Tile::column_of(p, e)] = column_sums[p][e];
                }
            __syncthreads();
#pragma unroll
            for (int w = 0; w < WARP_COLUMNS; w++) of_row += partial[w * TILE + t];
            if (int column = j * TILE + t; i != j && column < rows) {
                float sum = i == first ? 0.0f : of_columns[column];
#pragma unroll
                for (int w = 0; w < WARP_ROWS; w++) sum += partial[(WARP_COLUMNS + w) * TILE + t];
                of_columns[column] = sum;
            }
            __syncthreads();  // before the next tile overwrites the shared memory
        }
        // Within one group, its rows have been columns of earlier tiles.
        if (int row = i * TILE + t; row < rows)
            of_rows[row] = group == other && i != first ? of_rows[row] + of_row : of_row;
    }
}

/// maxima, sums [splits, rows]; `all` are the terms of all ranks' rows. Grid (rows / 128 rounded up, splits);
/// columns_per_split is a multiple of 128.
KERNEL BOUNDS(TILE_THREADS, 2) void nt_xent_sums_online(float* maxima, float* sums, const bf16* z,
                                                        const bf16* all, int rows, int all_rows, int first,
                                                        int pitch, int terms, int columns_per_split,
                                                        double inv_t) {
    Places places{rows, all_rows, first};
    sum_exponentials(
        maxima, sums, SplitRows{z, rows, pitch, terms}, SplitRows{all, all_rows, pitch, terms},
        columns_per_split, static_cast<float>(inv_t),
        [&](int row, int column) { return places.may_meet(row, column, TILE, false); },
        [&](int row, int column) { return places.of(row) == column; });
}

/// lse and row_losses [rows], a warp per row: (rows / 8 rounded up) blocks of 256. `maxima` is null after
/// nt_xent_sums.
KERNEL void nt_xent_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                           const float* z, int rows, int d, int splits, double inv_t) {
    for_rows(rows, [&](int64_t row) {
        int64_t positive = positive_of(static_cast<int>(row), rows);
        double logit = row_dot(z + row * d, z + positive * d, d) * inv_t;
        double l = log_sum_exp(maxima, inv_t, sums, row, rows, splits, -INFINITY);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// dL / ds_ij up to a scale: p_ij + p_ji, minus 2 for a positive.
struct PairWeight {
    const float* lse;  // of all ranks' rows
    float scale;       // log2(e) / T
    Places places;

    using Row = float;  // log2 Σ exp
    using Column = float;
    __device__ __forceinline__ Row row(int i) const { return lse[places.of(i)] * LOG2_E; }
    __device__ __forceinline__ Column column(int j) const { return lse[j] * LOG2_E; }
    __device__ __forceinline__ float operator()(Row row, Column column, float s) const {
        return exp2_fast(fmaf(s, scale, -row)) + exp2_fast(fmaf(s, scale, -column));
    }
    __device__ __forceinline__ bool may_correct(int row, int column) const {
        return places.may_meet(row, column, WEIGHT_TILE, true);
    }
    __device__ __forceinline__ float corrected(float w, int i, int j) const {
        return j == places.of(i) ? 0.0f : j == places.of_positive(i) ? w - 2.0f : w;
    }
};

template <int TERMS>
__device__ __forceinline__ void gradient(float* partial, const bf16* z, const bf16* all, const float* lse,
                                         const float* dy, const Places& places, int d, int pitch,
                                         int columns_per_split, double inv_t) {
    SplitRows own{z, places.rows, pitch, TERMS}, others{all, places.all_rows, pitch, TERMS};
    WeightedSum<TERMS, PairWeight>(own, others, columns_per_split)
        .run(partial, d, static_cast<float>(*dy * inv_t / places.rows),
             PairWeight{lse, static_cast<float>(inv_t) * LOG2_E, places});
}

/// partial [splits, rows, d], whose sum over splits is dz, with two or three terms; `all` are the terms of all
/// ranks' rows and lse [all_rows] theirs; `dy` points to the gradient of the loss, on the device.
/// columns_per_split is a multiple of 64. Grid (rows / 64, d / 128, splits), all rounded up; block 128.
KERNEL BOUNDS(WEIGHT_THREADS, 2) void nt_xent_gradient_2(float* partial, const bf16* z, const bf16* all,
                                                         const float* lse, const float* dy, int rows,
                                                         int all_rows, int first, int d, int pitch,
                                                         int columns_per_split, double inv_t) {
    gradient<2>(partial, z, all, lse, dy, Places{rows, all_rows, first}, d, pitch, columns_per_split, inv_t);
}
KERNEL BOUNDS(WEIGHT_THREADS, 2) void nt_xent_gradient_3(float* partial, const bf16* z, const bf16* all,
                                                         const float* lse, const float* dy, int rows,
                                                         int all_rows, int first, int d, int pitch,
                                                         int columns_per_split, double inv_t) {
    gradient<3>(partial, z, all, lse, dy, Places{rows, all_rows, first}, d, pitch, columns_per_split, inv_t);
}
