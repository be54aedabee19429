// One block's tile of C [m, n] = A B on tensor cores, bf16 operands and f32 accumulators: the shared core of
// matmul.cu, conv2d.cu and similarity.cuh.
//
// Prologue: cp.async fills the first STAGES - 1 stages. Main loop: one step consumes TILE_K = 32 elements of
// k; each step has a stage of shared memory, which holds a tile of A and a tile of B, and cp.async fills the
// stages of the next STAGES - 1 steps meanwhile. Epilogue: the accumulators go through shared memory to C, so
// that stores are coalesced. GEMMs differ in how an operand reaches shared memory: an operand is a class
// (gemm_operands.cuh, conv_operands.cuh, gather.cuh) with
//
//     K_MAJOR             k is contiguous in shared memory, [EXTENT][TILE_K]; else MN-major, [TILE_K][EXTENT]
//     copy_async(smem, active)  starts this thread's share of the copies of the next step, unless !active
//
// With 4 warps of 64 x 64 each, a step reads 128 bytes of shared memory per mma and writes 64. At 128 bytes a
// cycle that is 1.5 cycles per mma, close to what a tensor core of sm_80 (2) or sm_90 (about 1.6 by mma.sync)
// takes for it. Warps of 64 x 32 move 288 bytes per mma and those of 32 x 32 384, so small tiles are for
// problems that would otherwise not fill the chip. 48 KB and at most 255 registers for 128 threads: an
// occupancy of two blocks per multiprocessor from sm_80 on, where 64 mma keep each of the four schedulers
// busy for 410 to 512 cycles. The tall tile, 256 x 64 for few columns, has four warps of 64 x 64, too, and
// 208 bytes per mma; its three stages take 60 KB, and a multiprocessor holds two blocks.
//
// One main-loop step of a warp of the 128 x 128 tile, by nvcc 13.0 for sm_90a: 64 HMMA, 16 LDSM, 8 LDGSTS,
// one barrier, in 146 to 156 instructions for matmul.cu, 175 for a convolution, 188 for its data gradient and
// 212 for its weight gradient; up to 4 fewer on sm_80. 220 to 254 registers, no local memory. Half the tile:
// 32 HMMA and 12 LDSM in 103 to 170. Epilogue of a whole tile for eight outputs: 14 instructions in bf16, 46
// with moments. `selfsup bench --paper` says what these should take.
#pragma once

#include "ptx.cuh"
#include "vector.cuh"

/// Elements of k per main-loop step.
constexpr int TILE_K = 32;

/// `x` in a register from here on. What ptxas can compute from the thread index, it computes anew in every
/// step of a main loop that is short of registers; what comes out of a shuffle it keeps.
__device__ __forceinline__ int kept(int x) { return __shfl_sync(0xffffffffu, x, threadIdx.x % 32); }

/// The main-loop steps that cover `k` elements.
__device__ __forceinline__ int k_tiles_of(int k) { return (k + TILE_K - 1) / TILE_K; }

/// Split-K: the range of k of split blockIdx.z, with `k_per_split` a multiple of TILE_K.
struct KSplit {
    int begin, end;
    __device__ __forceinline__ KSplit(int k, int k_per_split) {
        begin = blockIdx.z * k_per_split;
        end = k - begin < k_per_split ? k : begin + k_per_split;
    }
};

/// A tile of one operand in shared memory: EXTENT rows of A or columns of B by TILE_K of k.
template <int EXTENT, bool K_MAJOR>
struct SmemTile {
    static constexpr int ROWS = K_MAJOR ? EXTENT : TILE_K, COLUMNS = K_MAJOR ? TILE_K : EXTENT,
                         SIZE = ROWS * COLUMNS;

    /// The offset of an element. Chunks of 16 bytes are permuted within their row (xor swizzle), so that the
    /// eight that ldmatrix reads at once from eight rows are in different banks, without padding.
    __device__ __forceinline__ static int swizzle(int row, int column) {
        return row * COLUMNS + (column ^ (K_MAJOR ? row / 2 % 4 : row % 8) * 8);
    }

    /// The offset of the row that this lane gives to ldmatrix for rows [m, m + 16) of A at k = 0: matrices 0
    /// to 3 are rows 0-7 and 8-15 of k 0-7, then of k 8-15.
    __device__ __forceinline__ static int lane_offset_a(int m) {
        int lane = threadIdx.x % 32;
        return K_MAJOR ? m * COLUMNS + swizzle(lane % 16, lane / 16 * 8)
                       : swizzle(lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8);
    }
    /// The same for columns [n, n + 16) of B, two fragments of mma: matrices 0 to 3 are k 0-7 and 8-15 of
    /// columns 0-7, then of columns 8-15.
    __device__ __forceinline__ static int lane_offset_b(int n) {
        int lane = threadIdx.x % 32;
        return K_MAJOR ? n * COLUMNS + swizzle(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8)
                       : swizzle(lane % 16, n + lane / 16 * 8);
    }

    /// Loads the fragments of rows or columns `extent` further, at k. Both are multiples of 16, and bits of
    /// `extent` are not set in the m or n of `lane_offset`, which may include the offset of a stage: so the
    /// swizzle is one xor away, and what a main loop keeps is one offset.
    __device__ __forceinline__ static void load_fragments(unsigned (&r)[4], const bf16* smem, int lane_offset,
                                                          int extent, int k) {
        if (K_MAJOR) ldmatrix_x4(r, smem + (lane_offset ^ k) + extent * COLUMNS);
        else ldmatrix_x4_trans(r, smem + (lane_offset ^ extent) + k * COLUMNS);
    }
    __device__ __forceinline__ static void load_fragment_a(unsigned (&r)[4], const bf16* smem, int m, int k) {
        load_fragments(r, smem, lane_offset_a(m), 0, k);
    }
    __device__ __forceinline__ static void load_fragments_b(unsigned (&r)[4], const bf16* smem, int n,
                                                            int k) {
        load_fragments(r, smem, lane_offset_b(n), 0, k);
    }
};

/// The chunks of ALIGNMENT elements of a SmemTile that a thread copies: the same columns of every ROW_STEP-th
/// row.
template <int EXTENT, int THREADS, int ALIGNMENT, bool K_MAJOR>
struct CopyMap {
    using To = SmemTile<EXTENT, K_MAJOR>;
    static constexpr int PER_ROW = To::COLUMNS / ALIGNMENT, ROW_STEP = THREADS / PER_ROW,
                         COPIES = To::ROWS / ROW_STEP;
    static_assert(THREADS % PER_ROW == 0 && To::ROWS % ROW_STEP == 0, "every thread copies the same number");
    static_assert((ROW_STEP & (ROW_STEP - 1)) == 0, "row(0) is below a power of two");

    __device__ __forceinline__ static int row(int i) { return threadIdx.x / PER_ROW + i * ROW_STEP; }
    __device__ __forceinline__ static int column() { return threadIdx.x % PER_ROW * ALIGNMENT; }
    /// The offset of this thread's first chunk in the tile.
    __device__ __forceinline__ static int first_chunk() { return To::swizzle(row(0), column()); }
    /// Starts copy `i`, which writes zeros unless `predicate`; nothing happens unless `active`. `first` is
    /// first_chunk().
    __device__ __forceinline__ static void copy_async(bf16* smem, int first, int i, const bf16* from,
                                                      bool predicate, bool active = true) {
        // Row i adds bits to the first row's number that this has not, so they change the swizzle by an xor.
        int swizzle = (K_MAJOR ? i * ROW_STEP / 2 % 4 : i * ROW_STEP % 8) * 8;
        bf16* to = smem + (first ^ swizzle) + i * ROW_STEP * To::COLUMNS;
        if (ALIGNMENT == 8) cp_async_16(to, from, predicate, active);
        else cp_async_8(to, from, predicate, active);
    }
};

/// The shared memory that a block has without asking the driver.
constexpr int STATIC_SHARED = 48 << 10;

/// The block's shared memory: static, one allocation, however many tiles a kernel chooses from; or, of more
/// than STATIC_SHARED bytes, what the launch gives.
template <int BYTES>
__device__ __forceinline__ unsigned char* shared_memory() {
    if constexpr (BYTES > STATIC_SHARED) {
        DYNAMIC_SHARED(unsigned char, memory);
        return memory;
    } else {
        __shared__ __align__(128) unsigned char memory[BYTES];
        return memory;
    }
}

/// Where the epilogue writes.
struct Output {
    bf16* out_bf16 = nullptr;     // exactly one of these two
    float* out_f32 = nullptr;     // is not null
    const float* bias = nullptr;  // [n], or null
    bool accumulate = false;      // adds to what the output holds
    // [tiles of m, 2, n], or null: mean and sum of squared deviations of each column of each tile, of the
    // values that are stored. Only with out_bf16 and without `accumulate`.
    float* moments = nullptr;
};

/// Rows of C that follow each other in memory.
struct DenseRows {
    int pitch;
    __device__ __forceinline__ DenseRows after_main_loop() const { return *this; }
    __device__ __forceinline__ constexpr bool is_dense() const { return true; }
    __device__ __forceinline__ int64_t offset(int i) const { return int64_t{i} * pitch; }
    __device__ __forceinline__ int64_t distance(int count) const { return int64_t{count} * pitch; }
};

template <int M_, int N_, int WARPS_M, int WARPS_N, int STAGES>
struct TensorTile {
    static constexpr int M = M_, N = N_, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
    // The mma (16 x 8 x 16) of a warp's tile.
    static constexpr int MMA_M = WARP_M / 16, MMA_N = WARP_N / 8;
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "fragments of B are loaded in pairs");
    static constexpr int STAGE = (M + N) * TILE_K, BYTES = STAGES * STAGE * 2;
    // The epilogue stages bf16 results in one pass, rounded, and f32 ones STAGED of each warp's MMA_M rows of
    // fragments at a time, as many as fit in the memory of the main loop. Rows are padded by 8 elements: the
    // rows of a fragment that are written at once are in different banks.
    static constexpr int PITCH = N + 8;
    static_assert(M * PITCH * 2 <= BYTES, "a tile of bf16 is staged in one pass");
    static constexpr int staged(int count) {
        return WARPS_M * 16 * count * PITCH * 4 <= BYTES ? count : staged(count / 2);
    }
    static constexpr int STAGED = staged(MMA_M), STAGED_ROWS = WARPS_M * 16 * STAGED;
    // Threads that share eight columns in the epilogue; each takes every THREAD_ROWS-th staged row.
    static constexpr int THREAD_ROWS = THREADS * 8 / N;
    static_assert(THREADS * 8 % N == 0 && STAGED_ROWS % THREAD_ROWS == 0 && THREADS >= N,
                  "a thread keeps its columns");
    static_assert(16 * STAGED % THREAD_ROWS == 0,
                  "a thread's next row is at the same distance in every warp");

    using Accumulators = float[MMA_M][MMA_N][4];

    /// First row and column of this block's tile. Consecutive blocks have the same rows: they share A in the
    /// cache.
    struct TileCoord {
        int row, column;
        __device__ __forceinline__ TileCoord(int n) {
            int tiles_n = (n + N - 1) / N;
            row = blockIdx.x / tiles_n * M;
            column = blockIdx.x % tiles_n * N;
        }
    };

    /// Runs the main loop over `k_tiles` steps and the epilogue. `rows.after_main_loop()` gives what knows
    /// where rows of C are: `offset(i)` is the offset of row i; if `is_dense()`, then `distance(count)` is
    /// that from any row to the `count`th after it.
    template <bool MOMENTS, typename A, typename B, typename Rows>
    __device__ __forceinline__ static void gemm(A a, B b, int k_tiles, TileCoord coord, int m, int n,
                                                const Output& to, const Rows& rows) {
        unsigned char* memory = shared_memory<BYTES>();
        Accumulators accumulators = {};
        main_loop(accumulators, a, b, k_tiles, reinterpret_cast<bf16*>(memory));
        epilogue<MOMENTS>(accumulators, coord, m, n, to, rows.after_main_loop(), memory);
    }

    /// Stores zeros to this block's tile.
    template <typename Rows>
    __device__ __forceinline__ static void clear(TileCoord coord, int m, int n, bf16* out, const Rows& rows) {
        const int column = coord.column + threadIdx.x * 8 % N, first = coord.row + threadIdx.x * 8 / N;
        if (column >= n) return;
        for (int r = 0; r < M && first + r < m; r += THREAD_ROWS)
            store_partial(out + rows.offset(first + r) + column, Vector<bf16>{}, n - column);
    }

    /// Row in the tile of accumulators[i][.][half * 2 + .], and column of accumulators[.][j][. + e].
    __device__ __forceinline__ static int row_of(int i, int half) {
        return threadIdx.x / 32 / WARPS_N * WARP_M + i * 16 + half * 8 + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ static int column_of(int j, int e) {
        return threadIdx.x / 32 % WARPS_N * WARP_N + j * 8 + threadIdx.x % 4 * 2 + e;
    }

    /// Adds `k_tiles` steps to the accumulators. `smem` has BYTES of shared memory, which may be reused after
    /// a barrier.
    template <typename A, typename B>
    __device__ __forceinline__ static void main_loop(Accumulators& accumulators, A& a, B& b, int k_tiles,
                                                     bf16* smem) {
        using TileA = SmemTile<M, A::K_MAJOR>;
        using TileB = SmemTile<N, B::K_MAJOR>;
        const int warp = threadIdx.x / 32;
        const int lane_a = kept(TileA::lane_offset_a(warp / WARPS_N * WARP_M)),
                  lane_b = kept(TileA::SIZE + TileB::lane_offset_b(warp % WARPS_N * WARP_N));
        static_assert(STAGE % 64 == 0 && TileA::SIZE % 64 == 0 && WARP_M <= 64 && WARP_N <= 64,
                      "stages and warps do not change a swizzle");
        auto copy_async = [&](int stage, bool active) {
            a.copy_async(smem + stage, active);
            b.copy_async(smem + stage + TileA::SIZE, active);
            cp_async_commit();  // also an empty group, so that the groups in flight count stages
        };
        // Double-buffered: the fragments of one half of a step are loaded while the other half is multiplied.
        unsigned fragments_a[2][MMA_M][4], fragments_b[2][MMA_N / 2][4];
        auto load_fragments = [&](int half, int stage) {
#pragma unroll
            for (int i = 0; i < MMA_M; i++)
                TileA::load_fragments(fragments_a[half][i], smem, stage + lane_a, i * 16, half * 16);
#pragma unroll
            for (int j = 0; j < MMA_N / 2; j++)
                TileB::load_fragments(fragments_b[half][j], smem, stage + lane_b, j * 16, half * 16);
        };
        auto mma = [&](int half) {
#pragma unroll
            for (int i = 0; i < MMA_M; i++)
#pragma unroll
                for (int j = 0; j < MMA_N; j++) {
                    const unsigned* pair = fragments_b[half][j / 2];
                    unsigned fragment_b[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
                    mma_bf16(accumulators[i][j], fragments_a[half][i], fragment_b);
                }
        };
        // Prologue.
#pragma unroll
        for (int step = 0; step < STAGES - 1; step++) copy_async(step * STAGE, step < k_tiles);
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        // Offsets of the stages that are read and filled: no division, no multiplication.
        int stage = 0, next_copy = (STAGES - 1) * STAGE;
        if (k_tiles > 0) load_fragments(0, 0);
#pragma unroll 1
        for (int step = 0; step < k_tiles; step++) {
            load_fragments(1, stage);
            // Overwrites the stage of step - 1, which every warp had read before the last barrier.
            copy_async(next_copy, step + STAGES - 1 < k_tiles);
            mma(0);
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the next step's stage is complete
            next_copy = stage;
            // The last step loads its own stage again: a branch around the loads would keep them behind the
            // mma.
            if (step + 1 < k_tiles) stage = stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
            load_fragments(0, stage);
            mma(1);
        }
        cp_async_wait<0>();
    }

  private:
    /// Sums over the rows that a thread has stored, for its eight columns: of the differences of the stored
    /// values from a pivot, and of their squares. The pivot is the tile's first row: the same for all threads
    /// of a column, so that their sums only need to be added, and a sample, so that no digits are lost where
    /// the mean is far from zero.
    struct ColumnSums {
        float pivot[8], sum[8] = {}, square[8] = {};

        __device__ __forceinline__ void add(const Vector<bf16>& row) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                float d = row.v[k] - pivot[k];
                sum[k] += d;
                square[k] += d * d;
            }
        }
    };

    /// Eight columns of a row of C in f32, and how they reach an output of type T.
    struct Row {
        float v[8];

        __device__ __forceinline__ explicit Row(const float* from) {
#pragma unroll
            for (int k = 0; k < 8; k += 4) {
                Vector<float> four = load_vector(from + k);
#pragma unroll
                for (int e = 0; e < 4; e++) v[k + e] = four.v[e];
            }
        }
        /// Stores the first `count` columns, and adds what is there before if `accumulate`.
        template <typename T>
        __device__ __forceinline__ void store(T* to, int count, bool accumulate) const {
#pragma unroll
            for (int k = 0; k < 8; k += PER_VECTOR<T>) {
                if (count <= k) return;
                Vector<T> part, old = {};
                if (accumulate) old = load_partial(to + k, count - k);
#pragma unroll
                for (int e = 0; e < PER_VECTOR<T>; e++) part.v[e] = v[k + e] + old.v[e];
                store_partial(to + k, part, count - k);
            }
        }
        /// The same for all eight columns at an aligned address.
        template <bool ACCUMULATE, typename T>
        __device__ __forceinline__ void store(T* to) const {
#pragma unroll
            for (int k = 0; k < 8; k += PER_VECTOR<T>) {
                Vector<T> part, old = {};
                if (ACCUMULATE) old = load_vector(to + k);
#pragma unroll
                for (int e = 0; e < PER_VECTOR<T>; e++)
                    part.v[e] = ACCUMULATE ? v[k + e] + old.v[e] : v[k + e];
                store_vector(to + k, part);
            }
        }
    };

    template <bool MOMENTS, typename Rows>
    __device__ __forceinline__ static void epilogue(const Accumulators& accumulators, TileCoord coord, int m,
                                                    int n, const Output& to, const Rows& rows,
                                                    unsigned char* memory) {
        // Every row and column of the tile exists, and stores of 16 bytes are aligned: decided here, so that
        // the loops over rows need not ask.
        const bool whole = m - coord.row >= M && n - coord.column >= N && n % 8 == 0 &&
                           (to.out_f32 ? is_aligned_16(to.out_f32) : is_aligned_16(to.out_bf16));
        if (to.out_f32 || to.accumulate)
            store_f32(accumulators, coord, m, n, to, rows, reinterpret_cast<float*>(memory), whole);
        else store_bf16<MOMENTS>(accumulators, coord, m, n, to, rows, memory, whole);
    }

    /// The epilogue for a result in bf16 that adds to nothing: staged as it is stored, all rows at once.
    template <bool MOMENTS, typename Rows>
    __device__ __forceinline__ static void store_bf16(const Accumulators& accumulators, TileCoord coord,
                                                      int m, int n, const Output& to, const Rows& rows,
                                                      unsigned char* memory, bool whole) {
        bf16* staging = reinterpret_cast<bf16*>(memory);
        __syncthreads();  // every warp has left the main loop
#pragma unroll
        for (int p = 0; p < MMA_N; p++) {
            const int column = column_of(p, 0);
            float bias[2] = {};
            if (to.bias)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (coord.column + column + e < n) bias[e] = to.bias[coord.column + column + e];
#pragma unroll
            for (int i = 0; i < MMA_M; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float low = accumulators[i][p][half * 2], high = accumulators[i][p][half * 2 + 1];
                    if (to.bias) low += bias[0], high += bias[1];
                    *reinterpret_cast<unsigned*>(staging + row_of(i, half) * PITCH + column) =
                        pack(low, high);
                }
        }
        __syncthreads();
        const int j = threadIdx.x * 8 % N, thread_row = threadIdx.x * 8 / N;
        const int first = coord.row + thread_row, count = n - coord.column - j;
        const bf16* from = staging + thread_row * PITCH + j;
        bf16* out = to.out_bf16 + coord.column + j;
        const bool moments = MOMENTS && to.moments;
        ColumnSums sums;
        if (moments) {
            Vector<bf16> pivot = load_vector(staging + j);
#pragma unroll
            for (int k = 0; k < 8; k++) sums.pivot[k] = pivot.v[k];
        }
        if (!whole) {
#pragma unroll 1
            for (int r = 0; r < M && first + r < m && count > 0; r += THREAD_ROWS) {
                Vector<bf16> row = load_vector(from + r * PITCH);
                store_partial(out + rows.offset(first + r), row, count);
                if (moments) sums.add(row);
            }
        } else if (moments) {
            copy_rows(first, out, rows, from, [&](uint4 row) { sums.add(unpack_vector(row)); });
        } else {
            copy_rows(first, out, rows, from, [](uint4) {});
        }
        if (moments) store_moments(sums, coord, m, n, to.moments, reinterpret_cast<float*>(memory));
    }

    /// Copies a thread's rows of a whole tile, and calls each(row).
    template <typename Rows, typename Each>
    __device__ __forceinline__ static void copy_rows(int first, bf16* out, const Rows& rows, const bf16* from,
                                                     Each each) {
        auto copy = [&](int r, bf16* at) {
            uint4 row = *reinterpret_cast<const uint4*>(from + r * PITCH);
            *reinterpret_cast<uint4*>(at) = row;
            each(row);
        };
        if (rows.is_dense()) {
            const int64_t step = rows.distance(THREAD_ROWS);
            bf16* at = out + rows.offset(first);
#pragma unroll 4
            for (int r = 0; r < M; r += THREAD_ROWS, at += step) copy(r, at);
        } else {
#pragma unroll 4
            for (int r = 0; r < M; r += THREAD_ROWS) copy(r, out + rows.offset(first + r));
        }
    }

    /// The epilogue for a result in f32, or one that adds to what the output holds.
    template <typename Rows>
    __device__ __forceinline__ static void store_f32(const Accumulators& accumulators, TileCoord coord, int m,
                                                     int n, const Output& to, const Rows& rows,
                                                     float* staging, bool whole) {
        const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 / WARPS_N;
        const int j = threadIdx.x * 8 % N, thread_row = threadIdx.x * 8 / N, column = coord.column + j,
                  count = n - column;
        float bias[8] = {};
        if (to.bias)
#pragma unroll
            for (int k = 0; k < 8; k++) bias[k] = k < count ? to.bias[column + k] : 0.0f;
#pragma unroll
        for (int first = 0; first < MMA_M; first += STAGED) {
            __syncthreads();  // every warp has left the main loop, or has read what was staged before
#pragma unroll
            for (int i = 0; i < STAGED; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float* row = staging + ((warp_m * STAGED + i) * 16 + half * 8 + lane / 4) * PITCH;
#pragma unroll
                    for (int p = 0; p < MMA_N; p++)
                        *reinterpret_cast<float2*>(row + column_of(p, 0)) = make_float2(
                            accumulators[first + i][p][half * 2], accumulators[first + i][p][half * 2 + 1]);
                }
            __syncthreads();
            // Calls store(row of C, its columns) for each staged row of this thread.
            auto for_each_row = [&](auto unrolled, auto store) {
                constexpr int UNROLLED = decltype(unrolled)::value;
#pragma unroll 1
                for (int w = 0; w < WARPS_M; w++) {
                    const float* from = staging + (w * 16 * STAGED + thread_row) * PITCH + j;
                    const int i = coord.row + w * WARP_M + first * 16 + thread_row;
#pragma unroll UNROLLED
                    for (int r = 0; r < 16 * STAGED; r += THREAD_ROWS) {
                        Row row(from + r * PITCH);
                        if (to.bias)
#pragma unroll
                            for (int k = 0; k < 8; k++) row.v[k] += bias[k];
                        store(i + r, row);
                    }
                }
            };
            auto offset = [&](int i) { return rows.offset(i) + column; };
            constexpr std::integral_constant<int, 1> ONE;
            constexpr std::integral_constant<int, 16 * STAGED / THREAD_ROWS> ALL;
            if (!whole)
                for_each_row(ONE, [&](int i, const Row& row) {
                    if (i >= m) return;
                    if (to.out_f32) row.store(to.out_f32 + offset(i), count, to.accumulate);
                    else row.store(to.out_bf16 + offset(i), count, to.accumulate);
                });
            else if (!to.out_f32)
                for_each_row(
                    ALL, [&](int i, const Row& row) { row.template store<true>(to.out_bf16 + offset(i)); });
            else if (to.accumulate)
                for_each_row(
                    ALL, [&](int i, const Row& row) { row.template store<true>(to.out_f32 + offset(i)); });
            else
                for_each_row(
                    ALL, [&](int i, const Row& row) { row.template store<false>(to.out_f32 + offset(i)); });
        }
    }

    /// Adds the sums of a column's THREAD_ROWS threads in order, and stores its moments.
    __device__ __forceinline__ static void store_moments(const ColumnSums& own, TileCoord coord, int m, int n,
                                                         float* moments, float* staging) {
        static_assert((2 * THREAD_ROWS + 1) * N * 4 <= BYTES, "fits in the memory of the main loop");
        float *sums = staging, *squares = staging + THREAD_ROWS * N, *pivots = squares + THREAD_ROWS * N;
        const int j = threadIdx.x * 8 % N, thread_row = threadIdx.x * 8 / N;
        __syncthreads();  // every thread has read what was staged
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            store_vector(sums + thread_row * N + j + k,
                         {own.sum[k], own.sum[k + 1], own.sum[k + 2], own.sum[k + 3]});
            store_vector(squares + thread_row * N + j + k,
                         {own.square[k], own.square[k + 1], own.square[k + 2], own.square[k + 3]});
            if (thread_row == 0)
                store_vector(pivots + j + k,
                             {own.pivot[k], own.pivot[k + 1], own.pivot[k + 2], own.pivot[k + 3]});
        }
        __syncthreads();
        const int of_tile = threadIdx.x, column = coord.column + of_tile;
        if (of_tile >= N || column >= n) return;
        float sum = 0.0f, square = 0.0f;
#pragma unroll
        for (int t = 0; t < THREAD_ROWS; t++) {
            sum += sums[t * N + of_tile];
            square += squares[t * N + of_tile];
        }
        float difference = sum / static_cast<float>(min(M, m - coord.row)), m2 = square - difference * sum;
        float* to = moments + int64_t{coord.row / M} * 2 * n + column;
        to[0] = pivots[of_tile] + difference;
        to[n] = m2 < 0.0f ? 0.0f : m2;  // and NaN stays
    }
};

// The tiles that kernels are instantiated for; the host's table of tile shapes lists the same. Three stages
// of the large one are all the static shared memory that a block may have; those of the tall one are dynamic.
using Tile128x128 = TensorTile<128, 128, 2, 2, 3>;
using Tile256x64 = TensorTile<256, 64, 4, 1, 3>;
using Tile128x64 = TensorTile<128, 64, 2, 2, 4>;
using Tile64x128 = TensorTile<64, 128, 2, 2, 4>;
using Tile64x64 = TensorTile<64, 64, 2, 2, 4>;
