// Inner products of f32 rows on tensor cores, tile by tile in registers and never in memory: what the
// contrastive losses, their gradients and nearest neighbours are made of.
//
// Tensor cores multiply bf16, so rows come as planes: x = Σ_p plane_p, each the bf16 nearest to what the
// planes before it have left. Of the products of planes those are made that f32 could tell: with two planes
// three, s_ij then being within 2^-17 / sqrt(d) or so of unit rows' cosine; with three planes six, as good as
// f32. Those of the first planes come last: tensor cores cut off what their sums cannot hold, and the sums
// are small until then. Planes have a pitch that is a multiple of 8 and zeros behind d.
//
// Columns are cut into slices so that small batches fill a GPU; slices are put together in order. How many
// there are must follow from the shape alone.
#pragma once

#include "gemm_tile.cuh"
#include "rows.cuh"

/// Rows as planes: data [planes, rows, pitch].
struct Planes {
    const bf16* data;
    int rows, pitch, planes;

    __device__ __forceinline__ const bf16* line(int plane, int64_t row) const {
        return data + (int64_t{plane} * rows + row) * pitch;
    }
};

/// An operand of a TensorTile that has all terms one after another: EXTENT lines from `first` on, zeros from
/// line `end` on.
template <int EXTENT, int THREADS, bool IS_A>
struct Terms {
    static constexpr bool INNER = true;
    using Of = Pieces<EXTENT, THREADS, 8, true>;

    Planes of;
    int first, depth = 0, own = 0, others;  // planes of the term: a's and b's, or b's and a's
    unsigned lines;                         // bit i: this thread's line i exists

    __device__ __forceinline__ Terms(const Planes& planes, int first, int end)
        : of(planes), first(first), own(IS_A ? 0 : planes.planes - 1), others(planes.planes - 1 - own) {
        lines = 0;
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++) lines |= static_cast<unsigned>(first + Of::line(i) < end) << i;
    }

    __device__ __forceinline__ void issue(bf16* panel) {
        const bf16* at = of.line(own, first + Of::line(0)) + depth + Of::column();
        unsigned now = depth + Of::column() < of.pitch ? lines : 0;
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++)
            Of::copy(panel, i, at + int64_t{i} * Of::STEP * of.pitch, now >> i & 1);
        depth += DEPTH;
        if (depth < of.pitch) return;
        depth = 0;
        // For each plane of b, the last first, those of a that count beside it, the last first.
        int &a = IS_A ? own : others, &b = IS_A ? others : own;
        if (a > 0) a--;
        else b--, a = of.planes - 1 - b;
    }
};

/// Steps of all terms.
__device__ __forceinline__ int steps_of(const Planes& planes) {
    return planes.planes * (planes.planes + 1) / 2 * ((planes.pitch + DEPTH - 1) / DEPTH);
}

using SimilarityTile = Tile128x128;
constexpr int TILE = SimilarityTile::M, TILE_THREADS = SimilarityTile::THREADS;
static_assert(TILE == SimilarityTile::N && TILE == TILE_THREADS, "a thread has a row and a column of a tile");

/// sums += <a_(row + i), b_(column + j)>, zeros for rows of a from `n` and of b from `m` on. The panels are
/// in the block's panel memory; a barrier before they are used otherwise, and one before the next tile.
__device__ __forceinline__ void similarity_tile(SimilarityTile::Sums& sums, const Planes& a, int row, int n,
                                                const Planes& b, int column, int m) {
    Terms<TILE, TILE_THREADS, true> of_a(a, row, n);
    Terms<TILE, TILE_THREADS, false> of_b(b, column, m);
    SimilarityTile::walk(sums, of_a, of_b, steps_of(a),
                         reinterpret_cast<bf16*>(panel_memory<SimilarityTile::BYTES>()));
}

constexpr float LOG2_E = 1.4426950408889634f;

/// A sum of exponentials: exp(max) times sum. Nothing yet is {-INFINITY, 0}.
struct ExpSum {
    float max, sum;

    __device__ __forceinline__ ExpSum and_then(ExpSum other) const {
        float most = max > other.max ? max : other.max;
        if (most == -INFINITY) return {most, 0.0f};
        return {most, sum * expf(max - most) + other.sum * expf(other.max - most)};
    }
};

/// maxima, sums [slices, n]: for each row i of a the sum over a slice of the rows of b of exp(s_ij inv_t),
/// without those that `skip(i, j)`; `skips(row, column)` tells whether a tile may have such. Any temperature:
/// each tile's largest logit is taken out. Grid (n / TILE rounded up, slices).
template <typename Skips, typename Skip>
__device__ __forceinline__ void sum_exponentials(float* maxima, float* sums, const Planes& a, const Planes& b,
                                                 int columns_per_slice, float inv_t, Skips skips, Skip skip) {
    using Tile = SimilarityTile;
    constexpr int WARPS = TILE / Tile::WARP_N;
    int row = blockIdx.x * TILE, begin = blockIdx.y * columns_per_slice;
    int end = begin + columns_per_slice < b.rows ? begin + columns_per_slice : b.rows;
    ExpSum total = {-INFINITY, 0.0f};  // of this thread's row
    for (int column = begin; column < end; column += TILE) {
        Tile::Sums s = {};
        similarity_tile(s, a, row, a.rows, b, column, end);
        auto* parts = reinterpret_cast<ExpSum*>(panel_memory<Tile::BYTES>());  // [WARPS, TILE]
        bool every = column + TILE <= end && !skips(row, column);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Tile::ROWS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int y = Tile::row_of(i, half);
                float most = -INFINITY, sum = 0.0f;
#pragma unroll
                for (int p = 0; p < 2 * Tile::PAIRS; p++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& logit = s[i][p][half * 2 + e];
                        int j = column + Tile::column_of(p, e);
                        logit = every || (j < end && !skip(row + y, j)) ? logit * inv_t : -INFINITY;
                        most = fmaxf(most, logit);
                    }
#pragma unroll
                for (int by = 1; by < 4; by *= 2)  // the four threads of a row are neighbours
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, by));
                float from = most == -INFINITY ? 0.0f : most;
#pragma unroll
                for (int p = 0; p < 2 * Tile::PAIRS; p++)
#pragma unroll
                    for (int e = 0; e < 2; e++) sum += exp2_fast((s[i][p][half * 2 + e] - from) * LOG2_E);
#pragma unroll
                for (int by = 1; by < 4; by *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
                if (threadIdx.x % 4 == 0)
                    parts[Tile::column_of(0, 0) / Tile::WARP_N * TILE + y] = {most, sum};
            }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARPS; w++) total = total.and_then(parts[w * TILE + threadIdx.x]);
        __syncthreads();  // the next tile's panels take their place
    }
    int i = row + static_cast<int>(threadIdx.x);
    if (i < a.rows) {
        int64_t at = int64_t{blockIdx.y} * a.rows + i;
        maxima[at] = total.max, sums[at] = total.sum;
    }
}

/// log Σ exp of a row from its slices [slices, n] and from one logit more, -INFINITY for none. Where `maxima`
/// is null, what was taken out of every logit is `fixed`.
__device__ __forceinline__ double log_sum_exp(const float* maxima, double fixed, const float* sums,
                                              int64_t row, int64_t n, int slices, double logit) {
    double most = logit, sum = 0.0;
    auto max = [&](int s) { return maxima ? static_cast<double>(maxima[s * n + row]) : fixed; };
    for (int s = 0; s < slices; s++)
        if (max(s) > most) most = max(s);
    if (logit > -INFINITY) sum = exp(logit - most);
    for (int s = 0; s < slices; s++)
        if (sums[s * n + row] > 0.0f) sum += sums[s * n + row] * exp(max(s) - most);
    return log(sum) + most;
}

/// What two values that are f32 are in bf16 planes: a pair of each.
template <int PLANES>
__device__ __forceinline__ void split(unsigned (&pairs)[PLANES], float low, float high) {
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        float l, h;
        pairs[p] = pack(low, high);
        unpack(l, h, pairs[p]);
        low -= l, high -= h;
    }
}

/// The rows and columns of `WeightedSum`'s tile, what of d a block has, and its threads.
constexpr int WEIGHT_TILE = 64, WEIGHT_WIDTH = 128, WEIGHT_THREADS = 128;

/// out [slices, n, d] = scale Σ_j weight(i, j, s_ij) b_j over a slice of the rows of b, the weights made anew
/// from the tiles. Grid (n / 64, d / 128, slices), all rounded up; block 128.
///
/// A warp has 16 rows. Its weights are the sums of one product in just the registers that the next wants them
/// in, so they need only be rounded. Both products are steps of one pipeline: for each 64 columns, those over
/// d (planes of a and b, 64 lines each), then two over the columns (planes of b, 32 lines of 128). Panels are
/// fetched once for all terms: with two planes a product reads 213 bytes of shared memory over d, and 171
/// over the columns.
///
/// `Weight` has `Row row(i)` and `Column column(j)`, what a weight needs to know of a row and of a column;
/// `(Row, Column, s)`, the weight of most pairs; and for the others, in tiles of which `corrects(row,
/// column)`, `corrected(w, i, j)`.
template <int PLANES, typename Weight>
struct WeightedSum {
    static constexpr int STAGES = PLANES == 2 ? 3 : 2, STAGE = PLANES * WEIGHT_TILE * 2 * DEPTH;
    static constexpr int BYTES = STAGES * STAGE * 2;
    using Lines = Panel<WEIGHT_TILE, true>;
    using Across = Panel<WEIGHT_WIDTH, false>;
    static_assert(2 * Lines::SIZE == Across::SIZE, "both kinds of step take a stage");

    Planes a, b;
    int row, first, begin, end, per_tile;  // steps over d
    bf16* panels = reinterpret_cast<bf16*>(panel_memory<BYTES>());

    __device__ __forceinline__ WeightedSum(const Planes& a, const Planes& b, int columns_per_slice)
        : a(a), b(b) {
        row = blockIdx.x * WEIGHT_TILE, first = blockIdx.y * WEIGHT_WIDTH;
        begin = blockIdx.z * columns_per_slice;
        end = begin + columns_per_slice < b.rows ? begin + columns_per_slice : b.rows;
        per_tile = (a.pitch + DEPTH - 1) / DEPTH;
    }

    __device__ __forceinline__ bf16* stage(int step) const { return panels + step % STAGES * STAGE; }

    /// This thread's share of the copies of the `step`-th step, of those over `column`, in all steps the
    /// `at`-th.
    __device__ __forceinline__ void issue(int at, int column, int step) const {
        if (column < end) {
            bf16* to = stage(at);
            if (step < per_tile) {
                lines(to, a, row, a.rows, step * DEPTH);
                lines(to + PLANES * Lines::SIZE, b, column, end, step * DEPTH);
            } else {
                across(to, column + (step - per_tile) * DEPTH);
            }
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void lines(bf16* to, const Planes& of, int from, int until, int depth) const {
        using Each = Pieces<WEIGHT_TILE, WEIGHT_THREADS, 8, true>;
        copy<Each, Lines>(to, of, from + Each::line(0), until, depth + Each::column());
    }

    __device__ __forceinline__ void across(bf16* to, int from) const {
        using Each = Pieces<WEIGHT_WIDTH, WEIGHT_THREADS, 8, false>;
        copy<Each, Across>(to, b, from + Each::line(0), end, first + Each::column());
    }

    /// This thread's pieces of all planes of a panel: those at `at` of the line `line` and of those behind
    /// it.
    template <typename Each, typename To>
    __device__ __forceinline__ static void copy(bf16* to, const Planes& of, int line, int until, int at) {
        const bf16* plane = of.data + int64_t{line} * of.pitch + at;
        if (at >= of.pitch) until = 0;
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const bf16* from = plane;
#pragma unroll
            for (int i = 0; i < Each::COUNT; i++) {
                Each::copy(to + p * To::SIZE, i, from, line + i * Each::STEP < until);
                from += Each::STEP * of.pitch;
            }
            plane += int64_t{of.rows} * of.pitch;
        }
    }

    __device__ __forceinline__ void run(float* out, int d, float scale, const Weight& weight) const {
        const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
        const int y = row + warp_row + lane / 4;  // and eight below
        float sums[16][4] = {};
        // The step that is fetched: STAGES - 1 ahead.
        int ahead = 0, ahead_column = begin, ahead_step = 0;
        auto fetch = [&] {
            issue(ahead++, ahead_column, ahead_step);
            if (++ahead_step == per_tile + WEIGHT_TILE / DEPTH) ahead_step = 0, ahead_column += WEIGHT_TILE;
        };
        for (int i = 0; i < STAGES - 1; i++) fetch();
        auto next = [&](int at) -> const bf16* {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the step's panels are whole, and nobody reads those of the step before
            fetch();
            return stage(at);
        };
        int at = 0;
#pragma unroll 1
        for (int column = begin; column < end; column += WEIGHT_TILE) {
            float s[8][4] = {};
#pragma unroll 1
            for (int step = 0; step < per_tile; step++) {
                const bf16* panel = next(at++);
#pragma unroll
                for (int k = 0; k < DEPTH; k += 16) {
                    unsigned fa[PLANES][4];
#pragma unroll
                    for (int p = 0; p < PLANES; p++)
                        Lines::fragment_a(fa[p], panel + p * Lines::SIZE, warp_row, k);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
#pragma unroll
                        for (int p = PLANES - 1; p >= 0; p--) {
                            unsigned four[4];
                            Lines::fragment_b(four, panel + (PLANES + p) * Lines::SIZE, j * 16, k);
                            multiply(s[2 * j], s[2 * j + 1], fa, four, p);
                        }
                    }
                }
            }
            weigh(s, column, y, weight);
#pragma unroll
            for (int step = 0; step < WEIGHT_TILE / DEPTH; step++) {
                const bf16* panel = next(at++);
#pragma unroll
                for (int k = 0; k < DEPTH; k += 16) {
                    const float (&low)[4] = s[(step * DEPTH + k) / 8],
                                (&high)[4] = s[(step * DEPTH + k) / 8 + 1];
                    unsigned fa[PLANES][4], pairs[PLANES];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        const float (&from)[4] = r < 2 ? low : high;
                        split(pairs, from[r % 2 * 2], from[r % 2 * 2 + 1]);
#pragma unroll
                        for (int p = 0; p < PLANES; p++) fa[p][r] = pairs[p];
                    }
#pragma unroll
                    for (int j = 0; j < 8; j++) {
#pragma unroll
                        for (int p = PLANES - 1; p >= 0; p--) {
                            unsigned four[4];
                            Across::fragment_b(four, panel + p * Across::SIZE, j * 16, k);
                            multiply(sums[2 * j], sums[2 * j + 1], fa, four, p);
                        }
                    }
                }
            }
        }
        cp_async_wait<0>();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (y + half * 8 >= a.rows) continue;
            float* to = out + (int64_t{blockIdx.z} * a.rows + y + half * 8) * d;
#pragma unroll
            for (int p = 0; p < 16; p++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int t = first + p * 8 + lane % 4 * 2 + e;
                    if (t < d) to[t] = scale * sums[p][half * 2 + e];
                }
        }
    }

    /// Similarities become weights.
    __device__ __forceinline__ void weigh(float (&s)[8][4], int column, int y, const Weight& weight) const {
        const int x = column + threadIdx.x % 4 * 2;
        const typename Weight::Row of_row[2] = {weight.row(min(y, a.rows - 1)),
                                                weight.row(min(y + 8, a.rows - 1))};
#pragma unroll
        for (int p = 0; p < 8; p++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                typename Weight::Column of_column = weight.column(min(x + p * 8 + e, end - 1));
#pragma unroll
                for (int half = 0; half < 2; half++)
                    s[p][half * 2 + e] = weight(of_row[half], of_column, s[p][half * 2 + e]);
            }
        if (column + WEIGHT_TILE <= end && !weight.corrects(row, column)) return;
#pragma unroll
        for (int p = 0; p < 8; p++)
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& w = s[p][half * 2 + e];
                    int j = x + p * 8 + e;
                    w = j < end ? weight.corrected(w, y + half * 8, j) : 0.0f;
                }
    }

    /// The products of sixteen columns of b's plane p with the planes of a that count beside it.
    __device__ __forceinline__ static void multiply(float (&low)[4], float (&high)[4],
                                                    const unsigned (&fa)[PLANES][4],
                                                    const unsigned (&four)[4], int p) {
        const unsigned left[2] = {four[0], four[1]}, right[2] = {four[2], four[3]};
#pragma unroll
        for (int q = PLANES - 1 - p; q >= 0; q--) {
            mma_bf16(low, fa[q], left);
            mma_bf16(high, fa[q], right);
        }
    }
};
