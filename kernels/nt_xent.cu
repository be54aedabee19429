// NT-Xent over unit rows z [rows, d], f32, and their planes [planes, rows, pitch] (similarity.cu); see
// src/ops/nt_xent. The similarity matrix is made in tiles and never stored. d > 0.
//
// Forward: nt_xent_sums, which makes each pair once and takes 1 / T out of every logit, or where that would
// leave f32's range (T < 0.025) nt_xent_sums_online; then nt_xent_finish and row_losses_mean. Backward, two:
// nt_xent_gradient, then sum_slices_f32 of matmul.cu with n = rows d, which also accumulates. `inv_t` is 1 /
// T. How columns are cut is by the shape alone. Workspaces: sums [groups, rows], or maxima and sums [slices,
// rows]; partial [slices, rows, d]; row_losses [rows]. lse [rows] is kept for the backward pass. No dynamic
// shared memory.
//
// A step of nt_xent_sums by nvcc 13.0 for sm_90a: as matmul.cu's of 128 x 128. Its exponentials, 16,384 a
// tile, take 1,024 cycles of a multiprocessor and 3 products of 128 x 128 x 128 at least 4,900: another
// block's products hide them.
#include "similarity.cuh"

__device__ __forceinline__ int positive_of(int i, int rows) {
    return i < rows / 2 ? i + rows / 2 : i - rows / 2;
}

/// sums [groups, rows], each written: rows are in groups of `tiles_per_group` tiles of 128, and sums[g][i] is
/// the sum of exp((s_ij - 1) / T) over the j != i of group g. A block for each pair of groups, groups (groups
/// + 1) / 2: it has the rows of one and, as s is symmetric, those of the other as columns, and nobody else
/// writes what it writes.
KERNEL BOUNDS(TILE_THREADS, 2) void nt_xent_sums(float* sums, const bf16* z, int rows, int pitch, int planes,
                                                 int tiles_per_group, double inv_t) {
    using Tile = SimilarityTile;
    constexpr int DOWN = TILE / Tile::WARP_M, ACROSS = TILE / Tile::WARP_N;
    Planes all{z, rows, pitch, planes};
    int tiles = (rows + TILE - 1) / TILE, groups = (tiles + tiles_per_group - 1) / tiles_per_group;
    int group = 0, left = blockIdx.x;
    for (; left >= groups - group; group++) left -= groups - group;
    const int other = group + left, t = threadIdx.x, first = group * tiles_per_group;
    auto end_of = [&](int g) { return min((g + 1) * tiles_per_group, tiles); };
    float *of_rows = sums + int64_t{other} * rows, *of_columns = sums + int64_t{group} * rows;
    const float scale = static_cast<float>(inv_t) * LOG2_E;
#pragma unroll 1
    for (int i = first; i < end_of(group); i++) {
        float of_row = 0.0f;  // this thread's row's
#pragma unroll 1
        for (int j = group == other ? i : other * tiles_per_group; j < end_of(other); j++) {
            Tile::Sums s = {};
            similarity_tile(s, all, i * TILE, rows, all, j * TILE, rows);
            const bool every = i != j && (max(i, j) + 1) * TILE <= rows;
            float* parts = reinterpret_cast<float*>(panel_memory<Tile::BYTES>());  // [ACROSS + DOWN, TILE]
            float down[2 * Tile::PAIRS][2] = {};
            __syncthreads();
#pragma unroll
            for (int r = 0; r < Tile::ROWS; r++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int y = Tile::row_of(r, half);
                    float sum = 0.0f;
#pragma unroll
                    for (int p = 0; p < 2 * Tile::PAIRS; p++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            int x = Tile::column_of(p, e);
                            float exponential = exp2_fast(fmaf(s[r][p][half * 2 + e], scale, -scale));
                            if (!every) {
                                bool is_pair = i * TILE + y < rows && j * TILE + x < rows;
                                if (!is_pair || i * TILE + y == j * TILE + x) exponential = 0.0f;
                            }
                            sum += exponential;
                            down[p][e] += exponential;
                        }
#pragma unroll
                    for (int by = 1; by < 4; by *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
                    if (t % 4 == 0) parts[Tile::column_of(0, 0) / Tile::WARP_N * TILE + y] = sum;
                }
#pragma unroll
            for (int p = 0; p < 2 * Tile::PAIRS; p++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
#pragma unroll
                    for (int by = 4; by < 32; by *= 2)
                        down[p][e] += __shfl_xor_sync(0xffffffffu, down[p][e], by);
                    if (t % 32 < 4)
                        parts[(ACROSS + Tile::row_of(0, 0) / Tile::WARP_M) * TILE + Tile::column_of(p, e)] =
                            down[p][e];
                }
            __syncthreads();
#pragma unroll
            for (int w = 0; w < ACROSS; w++) of_row += parts[w * TILE + t];
            if (int column = j * TILE + t; i != j && column < rows) {
                float sum = i == first ? 0.0f : of_columns[column];
#pragma unroll
                for (int w = 0; w < DOWN; w++) sum += parts[(ACROSS + w) * TILE + t];
                of_columns[column] = sum;
            }
            __syncthreads();  // the next tile's panels take their place
        }
        // Within a group its rows have been columns of the tiles before.
        if (int row = i * TILE + t; row < rows)
            of_rows[row] = group == other && i != first ? of_rows[row] + of_row : of_row;
    }
}

/// maxima, sums [slices, rows]. Grid (rows / 128 rounded up, slices); columns_per_slice is a multiple of 128.
KERNEL BOUNDS(TILE_THREADS, 2) void nt_xent_sums_online(float* maxima, float* sums, const bf16* z, int rows,
                                                        int pitch, int planes, int columns_per_slice,
                                                        double inv_t) {
    Planes all{z, rows, pitch, planes};
    sum_exponentials(
        maxima, sums, all, all, columns_per_slice, static_cast<float>(inv_t),
        [](int row, int column) { return row == column; }, [](int i, int j) { return i == j; });
}

/// lse and row_losses [rows], a warp a row: (rows / 8 rounded up) blocks of 256. `maxima` is null after
/// nt_xent_sums.
KERNEL void nt_xent_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                           const float* z, int rows, int d, int slices, double inv_t) {
    for_rows(rows, [&](int64_t row) {
        int64_t positive = positive_of(static_cast<int>(row), rows);
        double logit = row_dot(z + row * d, z + positive * d, d) * inv_t;
        double l = log_sum_exp(maxima, inv_t, sums, row, rows, slices, -INFINITY);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// dL / ds_ij but for its scale: p_ij + p_ji, less 2 for a positive.
struct PairWeight {
    const float* lse;
    float scale;  // log2(e) / T
    int rows;

    using Row = float;  // log Σ exp in powers of 2
    using Column = float;
    __device__ __forceinline__ Row row(int i) const { return lse[i] * LOG2_E; }
    __device__ __forceinline__ Column column(int j) const { return lse[j] * LOG2_E; }
    __device__ __forceinline__ float operator()(Row row, Column column, float s) const {
        return exp2_fast(fmaf(s, scale, -row)) + exp2_fast(fmaf(s, scale, -column));
    }
    __device__ __forceinline__ bool corrects(int row, int column) const {
        int apart = abs(row - column);
        return apart < WEIGHT_TILE || abs(apart - rows / 2) < WEIGHT_TILE;
    }
    __device__ __forceinline__ float corrected(float w, int i, int j) const {
        return i == j ? 0.0f : j == positive_of(i, rows) ? w - 2.0f : w;
    }
};

template <int PLANES>
__device__ __forceinline__ void gradient(float* partial, const bf16* z, const float* lse, const float* dy,
                                         int rows, int d, int pitch, int columns_per_slice, double inv_t) {
    Planes all{z, rows, pitch, PLANES};
    WeightedSum<PLANES, PairWeight>(all, all, columns_per_slice)
        .run(partial, d, static_cast<float>(*dy * inv_t / rows),
             PairWeight{lse, static_cast<float>(inv_t) * LOG2_E, rows});
}

/// partial [slices, rows, d], whose sum over slices is dz; `dy` points to the gradient of the loss, on the
/// device. By two or three planes. columns_per_slice is a multiple of 64. Grid (rows / 64, d / 128, slices),
/// all rounded up; block 128.
KERNEL BOUNDS(WEIGHT_THREADS, 2) void nt_xent_gradient_2(float* partial, const bf16* z, const float* lse,
                                                         const float* dy, int rows, int d, int pitch,
                                                         int columns_per_slice, double inv_t) {
    gradient<2>(partial, z, lse, dy, rows, d, pitch, columns_per_slice, inv_t);
}
KERNEL BOUNDS(WEIGHT_THREADS, 2) void nt_xent_gradient_3(float* partial, const bf16* z, const float* lse,
                                                         const float* dy, int rows, int d, int pitch,
                                                         int columns_per_slice, double inv_t) {
    gradient<3>(partial, z, lse, dy, rows, d, pitch, columns_per_slice, inv_t);
}
