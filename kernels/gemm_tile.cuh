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
//     copy_async(smem)    starts this thread's share of the copies of the next step
//
// With 4 warps of 64 x 64 each, a step reads 128 bytes of shared memory per mma and writes 64. At 128 bytes a
// cycle that is 1.5 cycles per mma, close to what a tensor core of sm_80 (2) or sm_90 (about 1.6 by mma.sync)
// takes for it. Warps of 64 x 32 move 288 bytes per mma and those of 32 x 32 384, so small tiles are for
// problems that would otherwise not fill the chip. 48 KB and at most 255 registers for 128 threads: an
// occupancy of two blocks per multiprocessor from sm_80 on, where 64 mma keep each of the four schedulers
// busy for 410 to 512 cycles.
//
// One main-loop step of a warp of the 128 x 128 tile, by nvcc 13.0 for sm_80: 64 HMMA, 16 LDSM, 8 LDGSTS, one
// barrier, in 197 to 203 instructions for matmul.cu, 246 for a convolution, 257 for its data gradient and 296
// for its weight gradient; on sm_90a 206 to 303. 232 to 255 registers, no local memory. Half the tile: 32
// HMMA and 12 LDSM in 146 to 226. Predicted for large k, as a fraction of what mma.sync can do (312 TFLOP/s
// on an A100, about 610 on an H100): GEMMs 0.80 on sm_80 and 0.70 on sm_90, convolutions 0.75 and 0.65,
// weight gradients 0.70 and 0.60. Not measured.
#pragma once

#include "moments.cuh"
#include "ptx.cuh"
#include "vector.cuh"

/// Elements of k per main-loop step.
constexpr int TILE_K = 32;

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

    /// Loads rows [m, m + 16) of A at [k, k + 16): matrices 0 to 3 are rows 0-7 and 8-15 of k 0-7, then of k
    /// 8-15. `m` is a multiple of 16, so that adding it does not change the swizzle.
    __device__ __forceinline__ static void load_fragment_a(unsigned (&r)[4], const bf16* smem, int m, int k) {
        int lane = threadIdx.x % 32;
        if (K_MAJOR) ldmatrix_x4(r, smem + m * COLUMNS + swizzle(lane % 16, k + lane / 16 * 8));
        else
            ldmatrix_x4_trans(r,
                              smem + k * COLUMNS + swizzle(lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8));
    }

    /// Loads columns [n, n + 16) of B, two fragments of mma: matrices 0 to 3 are k 0-7 and 8-15 of columns
    /// 0-7, then of columns 8-15.
    __device__ __forceinline__ static void load_fragments_b(unsigned (&r)[4], const bf16* smem, int n,
                                                            int k) {
        int lane = threadIdx.x % 32;
        if (K_MAJOR)
            ldmatrix_x4(r, smem + n * COLUMNS + swizzle(lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        else ldmatrix_x4_trans(r, smem + k * COLUMNS + swizzle(lane % 16, n + lane / 16 * 8));
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

    __device__ __forceinline__ static int row(int i) { return threadIdx.x / PER_ROW + i * ROW_STEP; }
    __device__ __forceinline__ static int column() { return threadIdx.x % PER_ROW * ALIGNMENT; }
    /// Starts copy `i`, which writes zeros unless `predicate`.
    __device__ __forceinline__ static void copy_async(bf16* smem, int i, const bf16* from, bool predicate) {
        bf16* to = smem + To::swizzle(row(i), column());
        if (ALIGNMENT == 8) cp_async_16(to, from, predicate);
        else cp_async_8(to, from, predicate);
    }
};

/// The block's static shared memory: one allocation, however many tiles a kernel chooses from.
template <int BYTES>
__device__ __forceinline__ unsigned char* shared_memory() {
    __shared__ __align__(128) unsigned char memory[BYTES];
    return memory;
}

/// Where the epilogue writes.
struct Output {
    bf16* out_bf16 = nullptr;     // exactly one of these two
    float* out_f32 = nullptr;     // is not null
    const float* bias = nullptr;  // [n], or null
    bool accumulate = false;      // adds to what the output holds
    // [tiles of m, 2, n], or null: mean and sum of squared deviations of each column of each tile.
    float* moments = nullptr;
};

template <int M_, int N_, int WARPS_M, int WARPS_N, int STAGES>
struct TensorTile {
    static constexpr int M = M_, N = N_, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
    // The mma (16 x 8 x 16) of a warp's tile.
    static constexpr int MMA_M = WARP_M / 16, MMA_N = WARP_N / 8;
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "fragments of B are loaded in pairs");
    static constexpr int STAGE = (M + N) * TILE_K, BYTES = STAGES * STAGE * 2;
    static_assert(BYTES <= 48 << 10, "static shared memory");
    // The epilogue stages STAGED of each warp's MMA_M rows of fragments at a time, as many as fit in the
    // memory of the main loop. Rows are padded by 8 floats: the four rows of a fragment are in different
    // banks.
    static constexpr int PITCH = N + 8;
    static constexpr int staged(int count) {
        return WARPS_M * 16 * count * PITCH * 4 <= BYTES ? count : staged(count / 2);
    }
    static constexpr int STAGED = staged(MMA_M), STAGED_ROWS = WARPS_M * 16 * STAGED;
    // Threads that share eight columns in the epilogue; each takes every THREAD_ROWS-th staged row.
    static constexpr int THREAD_ROWS = THREADS * 8 / N;
    static_assert(THREADS * 8 % N == 0 && STAGED_ROWS % THREAD_ROWS == 0 && THREADS >= N,
                  "a thread keeps its columns");

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

    /// Runs the main loop over `k_tiles` steps and the epilogue; `row_offset(i)` is the offset of row i of C.
    template <bool MOMENTS, typename A, typename B, typename RowOffset>
    __device__ __forceinline__ static void gemm(A a, B b, int k_tiles, TileCoord coord, int m, int n,
                                                const Output& to, RowOffset row_offset) {
        unsigned char* memory = shared_memory<BYTES>();
        Accumulators accumulators = {};
        main_loop(accumulators, a, b, k_tiles, reinterpret_cast<bf16*>(memory));
        epilogue<MOMENTS>(accumulators, coord, m, n, to, row_offset, reinterpret_cast<float*>(memory));
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
        const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
        auto copy_async = [&](int step) {
            if (step < k_tiles) {
                bf16* stage = smem + step % STAGES * STAGE;
                a.copy_async(stage);
                b.copy_async(stage + TileA::SIZE);
            }
            cp_async_commit();  // also an empty group, so that the groups in flight count stages
        };
        // Double-buffered: the fragments of one half of a step are loaded while the other half is multiplied.
        unsigned fragments_a[2][MMA_M][4], fragments_b[2][MMA_N / 2][4];
        auto load_fragments = [&](int half, int step) {
            const bf16* stage = smem + step % STAGES * STAGE;
#pragma unroll
            for (int i = 0; i < MMA_M; i++)
                TileA::load_fragment_a(fragments_a[half][i], stage, warp_m + i * 16, half * 16);
#pragma unroll
            for (int j = 0; j < MMA_N / 2; j++)
                TileB::load_fragments_b(fragments_b[half][j], stage + TileA::SIZE, warp_n + j * 16,
                                        half * 16);
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
        for (int step = 0; step < STAGES - 1; step++) copy_async(step);
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (k_tiles > 0) load_fragments(0, 0);
#pragma unroll 1
        for (int step = 0; step < k_tiles; step++) {
            load_fragments(1, step);
            // Overwrites the stage of step - 1, which every warp had read before the last barrier.
            copy_async(step + STAGES - 1);
            mma(0);
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the next step's stage is complete
            if (step + 1 < k_tiles) load_fragments(0, step + 1);
            mma(1);
        }
        cp_async_wait<0>();
    }

  private:
    /// Moments of the rows that a thread has stored, for its eight columns. Shifted by the first row's value,
    /// so that no digits are lost where the mean is far from zero.
    struct ColumnMoments {
        float shift[8], sum[8] = {}, square[8] = {}, count = 0.0f;

        __device__ __forceinline__ void add(const float (&v)[8]) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (count == 0.0f) shift[k] = v[k];
                float d = v[k] - shift[k];
                sum[k] += d;
                square[k] += d * d;
            }
            count += 1.0f;
        }
    };

    template <bool MOMENTS, typename RowOffset>
    __device__ __forceinline__ static void epilogue(const Accumulators& accumulators, TileCoord coord, int m,
                                                    int n, const Output& to, RowOffset row_offset,
                                                    float* staging) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / WARPS_N,
                  warp_n = warp % WARPS_N * WARP_N;
        const int j = threadIdx.x * 8 % N, thread_row = threadIdx.x * 8 / N, count = n - coord.column - j;
        float bias[8] = {};
        if (to.bias)
#pragma unroll
            for (int k = 0; k < 8; k++) bias[k] = k < count ? to.bias[coord.column + j + k] : 0.0f;
        ColumnMoments moments;
#pragma unroll
        for (int first = 0; first < MMA_M; first += STAGED) {
            __syncthreads();  // every warp has left the main loop, or has read what was staged before
#pragma unroll
            for (int i = 0; i < STAGED; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float* row =
                        staging + ((warp_m * STAGED + i) * 16 + half * 8 + lane / 4) * PITCH + warp_n;
#pragma unroll
                    for (int p = 0; p < MMA_N; p++)
                        *reinterpret_cast<float2*>(row + p * 8 + lane % 4 * 2) = make_float2(
                            accumulators[first + i][p][half * 2], accumulators[first + i][p][half * 2 + 1]);
                }
            __syncthreads();
#pragma unroll 1
            for (int s = thread_row; s < STAGED_ROWS; s += THREAD_ROWS) {
                int i = coord.row + s / (16 * STAGED) * WARP_M + first * 16 + s % (16 * STAGED);
                if (i >= m || count <= 0) continue;
                Vector<float> low = load_vector(staging + s * PITCH + j),
                              high = load_vector(staging + s * PITCH + j + 4);
                Vector<bf16> v;
#pragma unroll
                for (int k = 0; k < 4; k++) v.v[k] = low.v[k] + bias[k], v.v[k + 4] = high.v[k] + bias[k + 4];
                int64_t offset = row_offset(i) + coord.column + j;
                if (to.out_f32) {
                    store<float>(to.out_f32 + offset, {v.v[0], v.v[1], v.v[2], v.v[3]}, count, to.accumulate);
                    store<float>(to.out_f32 + offset + 4, {v.v[4], v.v[5], v.v[6], v.v[7]}, count - 4,
                                 to.accumulate);
                } else {
                    store<bf16>(to.out_bf16 + offset, v, count, to.accumulate);
                }
                if (MOMENTS && to.moments) {
                    // Of the stored values, as if they had been read back.
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        v.v[k] = to.out_f32 ? v.v[k] : to_float(from_float<bf16>(v.v[k]));
                    moments.add(v.v);
                }
            }
        }
        if (MOMENTS && to.moments) store_moments(moments, coord, n, to.moments, staging);
    }

    template <typename T>
    __device__ __forceinline__ static void store(T* to, Vector<T> v, int count, bool accumulate) {
        if (count <= 0) return;
        if (accumulate) {
            Vector<T> old = load_partial(to, count);
#pragma unroll
            for (int k = 0; k < PER_VECTOR<T>; k++) v.v[k] += old.v[k];
        }
        store_partial(to, v, count);
    }

    /// Merges the moments of a column's THREAD_ROWS threads, in order.
    __device__ __forceinline__ static void store_moments(const ColumnMoments& own, TileCoord coord, int n,
                                                         float* moments, float* staging) {
        static_assert((2 * N + 1) * THREAD_ROWS * 4 <= BYTES, "fits in the memory of the main loop");
        float *means = staging, *squares = staging + THREAD_ROWS * N, *counts = staging + 2 * THREAD_ROWS * N;
        int j = threadIdx.x * 8 % N, thread_row = threadIdx.x * 8 / N;
        __syncthreads();  // every thread has read what was staged
        float inverse = own.count > 0.0f ? 1.0f / own.count : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float mean = own.sum[k] * inverse;
            means[thread_row * N + j + k] = own.count > 0.0f ? own.shift[k] + mean : 0.0f;
            squares[thread_row * N + j + k] = fmaxf(own.square[k] - mean * own.sum[k], 0.0f);
        }
        // The count is that of a thread row's first vector. Vectors beyond n have seen no rows, and are not
        // read.
        if (j == 0) counts[thread_row] = own.count;
        __syncthreads();
        int column = coord.column + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) >= N || column >= n) return;
        Moments merged = {};
        float rows = 0.0f;
        for (int t = 0; t < THREAD_ROWS; t++) {
            merged =
                merge(merged, rows, {means[t * N + threadIdx.x], squares[t * N + threadIdx.x]}, counts[t]);
            rows += counts[t];
        }
        float* of_tile = moments + int64_t{coord.row / M} * 2 * n + column;
        of_tile[0] = merged.mean;
        of_tile[n] = merged.m2;
    }
};

// The tiles that kernels are instantiated for; the host's table of tile shapes lists the same. Three stages
// of the large one are all the static shared memory that a block may have.
using Tile128x128 = TensorTile<128, 128, 2, 2, 3>;
using Tile128x64 = TensorTile<128, 64, 2, 2, 4>;
using Tile64x128 = TensorTile<64, 128, 2, 2, 4>;
using Tile64x64 = TensorTile<64, 64, 2, 2, 4>;
