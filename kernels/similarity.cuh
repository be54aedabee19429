// Inner products of f32 rows on tensor cores, tile by tile in registers and never in memory: the base of the
// contrastive losses, their gradients and nearest neighbours.
//
// Tensor cores multiply bf16, so each row is split into terms: x = Σ_t term_t, each the bf16 nearest to what
// the terms before it leave. Only those products of terms are made that f32 would notice. With two terms
// there are three products, and s_ij is within about 2^-17 / sqrt(d) of the cosine of unit rows; with three
// terms there are six, as good as f32. Products of the first terms come last: tensor cores truncate what
// their accumulators cannot hold, and the accumulators are small until then. Terms have a pitch that is a
// multiple of 8 and zeros beyond d.
//
// Columns are split among blocks so that small batches fill a GPU; the splits are combined in order. The
// number of splits must follow from the shape alone.
#pragma once

#include "gemm_tile.cuh"
#include "rows.cuh"

/// Rows that are split into bf16 terms: data [terms, rows, pitch].
struct SplitRows {
    const bf16* data;
    int rows, pitch, terms;

    __device__ __forceinline__ const bf16* row(int term, int64_t i) const {
        return data + (int64_t{term} * rows + i) * pitch;
    }
};

/// A K-major operand of a TensorTile that goes through all products of terms one after another: EXTENT rows
/// from `first` on, zeros from row `end` on.
template <int EXTENT, int THREADS, bool IS_A>
struct SplitOperand {
    static constexpr bool K_MAJOR = true;
    using Map = CopyMap<EXTENT, THREADS, 8, true>;

    const int first_chunk = kept(Map::first_chunk());
    SplitRows source;
    int first, k = 0, own = 0, other;  // the term of this operand, and of the other
    unsigned row_predicates;           // bit i: this thread's row i exists

    __device__ __forceinline__ SplitOperand(const SplitRows& rows, int first, int end)
        : source(rows), first(first), own(IS_A ? 0 : rows.terms - 1), other(rows.terms - 1 - own) {
        row_predicates = 0;
#pragma unroll
        for (int i = 0; i < Map::COPIES; i++)
            row_predicates |= static_cast<unsigned>(first + Map::row(i) < end) << i;
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
        const bf16* from = source.row(own, first + Map::row(0)) + k + Map::column();
        unsigned predicates = k + Map::column() < source.pitch ? row_predicates : 0;
#pragma unroll
        for (int i = 0; i < Map::COPIES; i++)
            Map::copy_async(smem, first_chunk, i, from + int64_t{i} * Map::ROW_STEP * source.pitch,
                            predicates >> i & 1, active);
        k += TILE_K;
        if (k < source.pitch) return;
        k = 0;
        // For each term of b, the last first, the terms of a whose product with it counts, the last first.
        int &a = IS_A ? own : other, &b = IS_A ? other : own;
        if (a > 0) a--;
        else b--, a = source.terms - 1 - b;
    }
};

/// Main-loop steps for all products of terms.
__device__ __forceinline__ int k_tiles_of(const SplitRows& rows) {
    return rows.terms * (rows.terms + 1) / 2 * k_tiles_of(rows.pitch);
}

using SimilarityTile = Tile128x128;
constexpr int TILE = SimilarityTile::M, TILE_THREADS = SimilarityTile::THREADS;
static_assert(TILE == SimilarityTile::N && TILE == TILE_THREADS, "a thread has a row and a column of a tile");

/// accumulators += <a_(row + i), b_(column + j)>, zeros for rows of a from `n` and of b from `m` on. Uses the
/// block's shared memory: the caller needs a barrier before it reuses that, and one before the next tile.
__device__ __forceinline__ void similarity_tile(SimilarityTile::Accumulators& accumulators,
                                                const SplitRows& a, int row, int n, const SplitRows& b,
                                                int column, int m) {
    SplitOperand<TILE, TILE_THREADS, true> operand_a(a, row, n);
    SplitOperand<TILE, TILE_THREADS, false> operand_b(b, column, m);
    SimilarityTile::main_loop(accumulators, operand_a, operand_b, k_tiles_of(a),
                              reinterpret_cast<bf16*>(shared_memory<SimilarityTile::BYTES>()));
}

constexpr float LOG2_E = 1.4426950408889634f;

/// A sum of exponentials, exp(max) sum. The empty sum is {-INFINITY, 0}.
struct ExpSum {
    float max, sum;

    __device__ __forceinline__ ExpSum merge(ExpSum other) const {
        float larger = max > other.max ? max : other.max;
        if (larger == -INFINITY) return {larger, sum + other.sum};  // zeros, or NaN if all logits are
        return {larger, sum * expf(max - larger) + other.sum * expf(other.max - larger)};
    }
};

/// maxima, sums [splits, n]: for each row i of a, the sum over a split of the rows of b of exp(s_ij inv_t),
/// without the pairs that `is_masked(i, j)`; `may_mask(row, column)` says whether a tile may have such pairs.
/// Online softmax: each tile's largest logit is subtracted, so that any temperature works. Grid (n / TILE
/// rounded up, splits).
template <typename MayMask, typename IsMasked>
__device__ __forceinline__ void sum_exponentials(float* maxima, float* sums, const SplitRows& a,
                                                 const SplitRows& b, int columns_per_split, float inv_t,
                                                 MayMask may_mask, IsMasked is_masked) {
    using Tile = SimilarityTile;
    constexpr int WARP_COLUMNS = TILE / Tile::WARP_N;
    int row = blockIdx.x * TILE, begin = blockIdx.y * columns_per_split;
    int end = begin + columns_per_split < b.rows ? begin + columns_per_split : b.rows;
    ExpSum total = {-INFINITY, 0.0f};  // of this thread's row
    for (int column = begin; column < end; column += TILE) {
        Tile::Accumulators s = {};
        similarity_tile(s, a, row, a.rows, b, column, end);
        auto* partial = reinterpret_cast<ExpSum*>(shared_memory<Tile::BYTES>());  // [WARP_COLUMNS, TILE]
        bool unmasked = column + TILE <= end && !may_mask(row, column);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Tile::MMA_M; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int y = Tile::row_of(i, half);
                float max = -INFINITY, sum = 0.0f;
#pragma unroll
                for (int p = 0; p < Tile::MMA_N; p++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& logit = s[i][p][half * 2 + e];
                        int j = column + Tile::column_of(p, e);
                        logit = unmasked || (j < end && !is_masked(row + y, j)) ? logit * inv_t : -INFINITY;
                        max = fmaxf(max, logit);
                    }
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2)  // a row's four threads are neighbours
                    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, mask));
                float subtracted = max == -INFINITY ? 0.0f : max;
#pragma unroll
                for (int p = 0; p < Tile::MMA_N; p++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        sum += exp2_fast((s[i][p][half * 2 + e] - subtracted) * LOG2_E);
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
                if (threadIdx.x % 4 == 0)
                    partial[Tile::column_of(0, 0) / Tile::WARP_N * TILE + y] = {max, sum};
            }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARP_COLUMNS; w++) total = total.merge(partial[w * TILE + threadIdx.x]);
        __syncthreads();  // before the next tile overwrites the shared memory
    }
    int i = row + static_cast<int>(threadIdx.x);
    if (i < a.rows) {
        int64_t at = int64_t{blockIdx.y} * a.rows + i;
        maxima[at] = total.max, sums[at] = total.sum;
    }
}

/// log Σ exp of a row from its splits [splits, n] and from one extra logit, -INFINITY for none. If `maxima`
/// is null, `fixed_max` was subtracted from every logit.
__device__ __forceinline__ double log_sum_exp(const float* maxima, double fixed_max, const float* sums,
                                              int64_t row, int64_t n, int splits, double logit) {
    double largest = logit, sum = 0.0;
    auto max = [&](int s) { return maxima ? static_cast<double>(maxima[s * n + row]) : fixed_max; };
    for (int s = 0; s < splits; s++)
        if (max(s) > largest) largest = max(s);
    if (logit > -INFINITY) sum = exp(logit - largest);
    for (int s = 0; s < splits; s++)
        // A sum of NaN must count: it is not above zero, but neither is it at most zero.
        if (!(sums[s * n + row] <= 0.0f)) sum += sums[s * n + row] * exp(max(s) - largest);
    return log(sum) + largest;
}

/// Splits two f32 values into bf16 terms: a packed pair of each term.
template <int TERMS>
__device__ __forceinline__ void split(unsigned (&pairs)[TERMS], float low, float high) {
#pragma unroll
    for (int t = 0; t < TERMS; t++) {
        float l, h;
        pairs[t] = pack(low, high);
        unpack(l, h, pairs[t]);
        low -= l, high -= h;
    }
}

/// The rows and columns of `WeightedSum`'s tile of weights, how much of d a block has, and its threads.
constexpr int WEIGHT_TILE = 64, WEIGHT_WIDTH = 128, WEIGHT_THREADS = 128;

/// out [splits, n, d] = scale Σ_j weight(i, j, s_ij) b_j over a split of the rows of b, the weights
/// recomputed from tiles of similarities. Grid (n / 64, d / 128, splits), all rounded up; block 128.
///
/// Two GEMMs back to back, as in fused attention: a warp has 16 rows, and the accumulators of the first GEMM,
/// turned into weights, are in just the registers that the second GEMM takes as its A fragments, so they need
/// only be rounded. The steps of both GEMMs share one pipeline: for each 64 columns, the steps over d (terms
/// of a and b, 64 K-major rows each), then two over the columns (terms of b, 32 MN-major rows of 128). A
/// stage is loaded once for all products of terms: with two terms an mma reads 213 bytes of shared memory
/// over d, and 171 over the columns.
///
/// `Weight` has `Row row(i)` and `Column column(j)`, what a weight depends on of a row and of a column;
/// `(Row, Column, s)`, the weight of most pairs; and `corrected(w, i, j)` for the others, which are in tiles
/// where `may_correct(row, column)`.
template <int TERMS, typename Weight>
struct WeightedSum {
    static constexpr int STAGES = TERMS == 2 ? 3 : 2, STAGE = TERMS * WEIGHT_TILE * 2 * TILE_K;
    static constexpr int BYTES = STAGES * STAGE * 2;
    using KMajorTile = SmemTile<WEIGHT_TILE, true>;
    using MnMajorTile = SmemTile<WEIGHT_WIDTH, false>;
    static_assert(2 * KMajorTile::SIZE == MnMajorTile::SIZE, "both kinds of step fill a stage");

    SplitRows a, b;
    int row, first, begin, end, d_steps;
    bf16* smem = reinterpret_cast<bf16*>(shared_memory<BYTES>());

    __device__ __forceinline__ WeightedSum(const SplitRows& a, const SplitRows& b, int columns_per_split)
        : a(a), b(b) {
        row = blockIdx.x * WEIGHT_TILE, first = blockIdx.y * WEIGHT_WIDTH;
        begin = blockIdx.z * columns_per_split;
        end = begin + columns_per_split < b.rows ? begin + columns_per_split : b.rows;
        d_steps = k_tiles_of(a.pitch);
    }

    __device__ __forceinline__ bf16* stage(int index) const { return smem + index % STAGES * STAGE; }

    /// Starts this thread's share of the copies of one step: the `index`-th in all, the `step`-th of the tile
    /// at `column`.
    __device__ __forceinline__ void copy_async(int index, int column, int step) const {
        if (column < end) {
            bf16* to = stage(index);
            if (step < d_steps) {
                copy_k_major(to, a, row, a.rows, step * TILE_K);
                copy_k_major(to + TERMS * KMajorTile::SIZE, b, column, end, step * TILE_K);
            } else {
                copy_mn_major(to, column + (step - d_steps) * TILE_K);
            }
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void copy_k_major(bf16* to, const SplitRows& from, int first_row, int end_row,
                                                 int k) const {
        using Map = CopyMap<WEIGHT_TILE, WEIGHT_THREADS, 8, true>;
        copy_terms<Map, KMajorTile>(to, from, first_row + Map::row(0), end_row, k + Map::column());
    }

    __device__ __forceinline__ void copy_mn_major(bf16* to, int first_row) const {
        using Map = CopyMap<WEIGHT_WIDTH, WEIGHT_THREADS, 8, false>;
        copy_terms<Map, MnMajorTile>(to, b, first_row + Map::row(0), end, first + Map::column());
    }

    /// This thread's chunks of all terms of a tile: those at `column` of row `row` and of the rows that
    /// follow.
    template <typename Map, typename Tile>
    __device__ __forceinline__ static void copy_terms(bf16* to, const SplitRows& rows, int row, int end_row,
                                                      int column) {
        const bf16* term = rows.data + int64_t{row} * rows.pitch + column;
        if (column >= rows.pitch) end_row = 0;
#pragma unroll
        for (int t = 0; t < TERMS; t++) {
            const bf16* from = term;
#pragma unroll
            for (int i = 0; i < Map::COPIES; i++) {
                Map::copy_async(to + t * Tile::SIZE, Map::first_chunk(), i, from,
                                row + i * Map::ROW_STEP < end_row);
                from += Map::ROW_STEP * rows.pitch;
            }
            term += int64_t{rows.rows} * rows.pitch;
        }
    }

    __device__ __forceinline__ void run(float* out, int d, float scale, const Weight& weight) const {
        const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
        const int y = row + warp_row + lane / 4;  // and eight below
        float accumulators[16][4] = {};
        // The step whose copies start next: STAGES - 1 ahead of the one that is computed.
        int ahead = 0, ahead_column = begin, ahead_step = 0;
        auto prefetch = [&] {
            copy_async(ahead++, ahead_column, ahead_step);
            if (++ahead_step == d_steps + 2) ahead_step = 0, ahead_column += WEIGHT_TILE;
        };
        for (int i = 0; i < STAGES - 1; i++) prefetch();
        auto wait_for_stage = [&](int index) -> const bf16* {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the step's stage is complete, and every warp has read that of the step before
            prefetch();
            return stage(index);
        };
        int index = 0;
#pragma unroll 1
        for (int column = begin; column < end; column += WEIGHT_TILE) {
            float s[8][4] = {};
#pragma unroll 1
            for (int step = 0; step < d_steps; step++) {
                const bf16* tile = wait_for_stage(index++);
#pragma unroll
                for (int k = 0; k < TILE_K; k += 16) {
                    unsigned fragments_a[TERMS][4];
#pragma unroll
                    for (int t = 0; t < TERMS; t++)
                        KMajorTile::load_fragment_a(fragments_a[t], tile + t * KMajorTile::SIZE, warp_row, k);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
#pragma unroll
                        for (int t = TERMS - 1; t >= 0; t--) {
                            unsigned pair[4];
                            KMajorTile::load_fragments_b(pair, tile + (TERMS + t) * KMajorTile::SIZE, j * 16,
                                                         k);
                            mma_terms(s[2 * j], s[2 * j + 1], fragments_a, pair, t);
                        }
                    }
                }
            }
            similarities_to_weights(s, column, y, weight);
#pragma unroll
            for (int step = 0; step < WEIGHT_TILE / TILE_K; step++) {
                const bf16* tile = wait_for_stage(index++);
#pragma unroll
                for (int k = 0; k < TILE_K; k += 16) {
                    const float (&low)[4] = s[(step * TILE_K + k) / 8],
                                (&high)[4] = s[(step * TILE_K + k) / 8 + 1];
                    unsigned fragments_a[TERMS][4], pairs[TERMS];
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        const float (&from)[4] = r < 2 ? low : high;
                        split(pairs, from[r % 2 * 2], from[r % 2 * 2 + 1]);
#pragma unroll
                        for (int t = 0; t < TERMS; t++) fragments_a[t][r] = pairs[t];
                    }
#pragma unroll
                    for (int j = 0; j < 8; j++) {
#pragma unroll
                        for (int t = TERMS - 1; t >= 0; t--) {
                            unsigned pair[4];
                            MnMajorTile::load_fragments_b(pair, tile + t * MnMajorTile::SIZE, j * 16, k);
                            mma_terms(accumulators[2 * j], accumulators[2 * j + 1], fragments_a, pair, t);
                        }
                    }
                }
            }
        }
        cp_async_wait<0>();
        // Epilogue.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (y + half * 8 >= a.rows) continue;
            float* to = out + (int64_t{blockIdx.z} * a.rows + y + half * 8) * d;
#pragma unroll
            for (int p = 0; p < 16; p++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int t = first + p * 8 + lane % 4 * 2 + e;
                    if (t < d) to[t] = scale * accumulators[p][half * 2 + e];
                }
        }
    }

    __device__ __forceinline__ void similarities_to_weights(float (&s)[8][4], int column, int y,
                                                            const Weight& weight) const {
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
        if (column + WEIGHT_TILE <= end && !weight.may_correct(row, column)) return;
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

    /// Multiplies the pair of fragments of b's term `t`, sixteen columns, by those terms of a whose product
    /// with it counts.
    __device__ __forceinline__ static void mma_terms(float (&low)[4], float (&high)[4],
                                                     const unsigned (&fragments_a)[TERMS][4],
                                                     const unsigned (&pair)[4], int t) {
        const unsigned left[2] = {pair[0], pair[1]}, right[2] = {pair[2], pair[3]};
#pragma unroll
        for (int q = TERMS - 1 - t; q >= 0; q--) {
            mma_bf16(low, fragments_a[q], left);
            mma_bf16(high, fragments_a[q], right);
        }
    }
};
