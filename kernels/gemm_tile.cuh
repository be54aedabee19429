// A tile of C [m, n] = A B on tensor cores, bf16 to f32 sums, by one block: the one core of matmul.cu and
// conv2d.cu.
//
// Depth is walked in steps of 32. Each step has a panel of either operand in shared memory; cp.async brings
// those of the next STAGES - 1 steps meanwhile. What differs between products is how a panel is brought: an
// operand is a class (gemm_operands.cuh, conv_operands.cuh, gather.cuh) with
//
//     INNER           depth runs along the panel's lines, [EXTENT][DEPTH], not across them, [DEPTH][EXTENT]
//     issue(panel)    starts this thread's share of the copies of the next step
//
// Of 4 warps of 64 x 64 each, a step reads 128 bytes of shared memory a product and writes 64: at 128 bytes a
// cycle 1.5 cycles a product, near what a tensor core of sm_80 (2) or sm_90 (about 1.6 by mma.sync) takes for
// it. Warps of 64 x 32 move 288 bytes a product and those of 32 x 32 384, so small tiles are for problems
// that would not fill a chip otherwise. 48 KB and at most 255 registers of 128 threads: two blocks a
// multiprocessor from sm_80 on, where 64 products keep each of four schedulers busy for 410 to 512 cycles.
//
// A warp's step of a 128 x 128 tile, by nvcc 13.0 for sm_80: 64 HMMA, 16 LDSM, 8 LDGSTS, one barrier, in 197
// to 203 instructions of matmul.cu, 246 of a convolution, 257 of its data gradient and 296 of its weight
// gradient; on sm_90a 206 to 303. 238 to 255 registers, no local memory. With half the tile 32 HMMA and 12
// LDSM in 146 to 226.
// Foretold for long sums, of what mma.sync can do (312 TFLOP/s on an A100, about 610 on an H100): products
// 0.80 on sm_80 and 0.70 on sm_90, convolutions 0.75 and 0.65, weight gradients 0.70 and 0.60. Not measured.
#pragma once

#include "moments.cuh"
#include "ptx.cuh"
#include "vector.cuh"

/// Elements of depth in a step.
constexpr int DEPTH = 32;

/// The panel of an operand of which a tile has EXTENT lines or columns.
template <int EXTENT, bool INNER>
struct Panel {
    static constexpr int LINES = INNER ? EXTENT : DEPTH, WIDTH = INNER ? DEPTH : EXTENT, SIZE = LINES * WIDTH;

    /// Where an element lies. Pieces of 16 bytes change places within their line, so that the eight that
    /// ldmatrix takes at once from eight lines are in different banks, without padding.
    __device__ __forceinline__ static int place(int line, int column) {
        return line * WIDTH + (column ^ (INNER ? line / 2 % 4 : line % 8) * 8);
    }

    /// Rows [row, row + 16) of A at depths [depth, depth + 16): matrices 0 to 3 are rows 0-7 and 8-15 of
    /// depths 0-7, then of depths 8-15. `row` is a multiple of 16, so that it does not change who swaps
    /// places.
    __device__ __forceinline__ static void fragment_a(unsigned (&r)[4], const bf16* panel, int row,
                                                      int depth) {
        int lane = threadIdx.x % 32;
        if (INNER) ldmatrix_x4(r, panel + row * WIDTH + place(lane % 16, depth + lane / 16 * 8));
        else
            ldmatrix_x4_trans(
                r, panel + depth * WIDTH + place(lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
    }

    /// Columns [column, column + 16) of B: matrices 0 to 3 are depths 0-7 and 8-15 of columns 0-7, then of
    /// columns 8-15.
    __device__ __forceinline__ static void fragment_b(unsigned (&r)[4], const bf16* panel, int column,
                                                      int depth) {
        int lane = threadIdx.x % 32;
        if (INNER)
            ldmatrix_x4(r,
                        panel + column * WIDTH + place(lane / 16 * 8 + lane % 8, depth + lane / 8 % 2 * 8));
        else ldmatrix_x4_trans(r, panel + depth * WIDTH + place(lane % 16, column + lane / 16 * 8));
    }
};

/// Which pieces of RUN elements of a panel a thread brings: those of one column, in each STEP-th line.
template <int EXTENT, int THREADS, int RUN, bool INNER>
struct Pieces {
    using To = Panel<EXTENT, INNER>;
    static constexpr int PER_LINE = To::WIDTH / RUN, STEP = THREADS / PER_LINE, COUNT = To::LINES / STEP;
    static_assert(THREADS % PER_LINE == 0 && To::LINES % STEP == 0, "every thread brings as much");

    __device__ __forceinline__ static int line(int i) { return threadIdx.x / PER_LINE + i * STEP; }
    __device__ __forceinline__ static int column() { return threadIdx.x % PER_LINE * RUN; }
    __device__ __forceinline__ static void copy(bf16* panel, int i, const bf16* from, bool valid) {
        bf16* to = panel + To::place(line(i), column());
        if (RUN == 8) cp_async_16(to, from, valid);
        else cp_async_8(to, from, valid);
    }
};

/// The block's shared memory: one place, however many products a kernel chooses from.
template <int BYTES>
__device__ __forceinline__ unsigned char* panel_memory() {
    __shared__ __align__(128) unsigned char memory[BYTES];
    return memory;
}

/// Where the sums go.
struct Output {
    bf16* narrow;       // the one of these
    float* wide;        // that is not null
    const float* bias;  // [n] or null
    bool accumulate;    // adds to what is there
    float* moments;     // [tiles of m, 2, n] or null: mean and squared deviations of each column of each tile
};

template <int M_, int N_, int WARPS_M, int WARPS_N, int STAGES>
struct TensorTile {
    static constexpr int M = M_, N = N_, THREADS = WARPS_M * WARPS_N * 32;
    static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N, ROWS = WARP_M / 16, PAIRS = WARP_N / 16;
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "whole fragments");
    static constexpr int STAGE = (M + N) * DEPTH, BYTES = STAGES * STAGE * 2;
    static_assert(BYTES <= 48 << 10, "static shared memory");
    // Sums leave in slabs of so many fragments of each warp's rows, as many as fit where the panels were.
    // Lines are 8 floats longer than they need be: four rows of a fragment are in different banks.
    static constexpr int PITCH = N + 8;
    static constexpr int fragments(int count) {
        return WARPS_M * 16 * count * PITCH * 4 <= BYTES ? count : fragments(count / 2);
    }
    static constexpr int FRAGMENTS = fragments(ROWS), SLAB = WARPS_M * 16 * FRAGMENTS;
    // Of the threads that write a slab, those of one column.
    static constexpr int DOWN = THREADS * 8 / N;
    static_assert(THREADS * 8 % N == 0 && SLAB % DOWN == 0 && THREADS >= N, "a thread keeps its columns");

    using Sums = float[ROWS][2 * PAIRS][4];

    /// First row and column of this block's tile. Tiles with the same rows follow one another: they share A
    /// in the cache.
    struct Corner {
        int row, column;
        __device__ __forceinline__ Corner(int n) {
            int across = (n + N - 1) / N;
            row = blockIdx.x / across * M;
            column = blockIdx.x % across * N;
        }
    };

    /// The sums over `steps` steps into `to`; `row(i)` is how far before C's row i lies.
    template <bool MOMENTS, typename A, typename B, typename Row>
    __device__ __forceinline__ static void product(A a, B b, int steps, Corner at, int m, int n,
                                                   const Output& to, Row row) {
        unsigned char* memory = panel_memory<BYTES>();
        Sums sums = {};
        walk(sums, a, b, steps, reinterpret_cast<bf16*>(memory));
        write<MOMENTS>(sums, at, m, n, to, row, reinterpret_cast<float*>(memory));
    }

    /// Where in the tile sums[i][.][half * 2 + .] and sums[.][p][. + e] lie.
    __device__ __forceinline__ static int row_of(int i, int half) {
        return threadIdx.x / 32 / WARPS_N * WARP_M + i * 16 + half * 8 + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ static int column_of(int p, int e) {
        return threadIdx.x / 32 % WARPS_N * WARP_N + p * 8 + threadIdx.x % 4 * 2 + e;
    }

    /// Adds the products of `steps` steps to `sums`. The panels, BYTES of shared memory, are free after it
    /// and a barrier.
    template <typename A, typename B>
    __device__ __forceinline__ static void walk(Sums& sums, A& a, B& b, int steps, bf16* panels) {
        using PanelA = Panel<M, A::INNER>;
        using PanelB = Panel<N, B::INNER>;
        const int warp = threadIdx.x / 32, warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
        auto issue = [&](int step) {
            if (step < steps) {
                bf16* stage = panels + step % STAGES * STAGE;
                a.issue(stage);
                b.issue(stage + PanelA::SIZE);
            }
            cp_async_commit();  // also where there is nothing, so that the groups left count stages
        };
        unsigned fa[2][ROWS][4], fb[2][PAIRS][4];
        auto take = [&](int which, int step) {
            const bf16* stage = panels + step % STAGES * STAGE;
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                PanelA::fragment_a(fa[which][i], stage, warp_m + i * 16, which * 16);
#pragma unroll
            for (int j = 0; j < PAIRS; j++)
                PanelB::fragment_b(fb[which][j], stage + PanelA::SIZE, warp_n + j * 16, which * 16);
        };
        auto multiply = [&](int which) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < 2 * PAIRS; j++) {
                    const unsigned* four = fb[which][j / 2];
                    unsigned pair[2] = {four[j % 2 * 2], four[j % 2 * 2 + 1]};
                    mma_bf16(sums[i][j], fa[which][i], pair);
                }
        };
        for (int step = 0; step < STAGES - 1; step++) issue(step);
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (steps > 0) take(0, 0);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            take(1, step);
            issue(step + STAGES -
                  1);  // over the panels of step - 1, which all have read before the last barrier
            multiply(0);
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the next step's panels are whole
            if (step + 1 < steps) take(0, step + 1);
            multiply(1);
        }
        cp_async_wait<0>();
    }

  private:
    /// What a thread knows of the rows that it has seen of its eight columns: sums of what lies above the
    /// first.
    struct Seen {
        float first[8], sum[8] = {}, square[8] = {}, count = 0.0f;

        __device__ __forceinline__ void add(const float (&v)[8]) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (count == 0.0f) first[k] = v[k];
                float d = v[k] - first[k];
                sum[k] += d;
                square[k] += d * d;
            }
            count += 1.0f;
        }
    };

    template <bool MOMENTS, typename Row>
    __device__ __forceinline__ static void write(const Sums& sums, Corner at, int m, int n, const Output& to,
                                                 Row row, float* slab) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_m = warp / WARPS_N,
                  warp_n = warp % WARPS_N * WARP_N;
        const int j = threadIdx.x * 8 % N, down = threadIdx.x * 8 / N, count = n - at.column - j;
        float bias[8] = {};
        if (to.bias)
#pragma unroll
            for (int k = 0; k < 8; k++) bias[k] = k < count ? to.bias[at.column + j + k] : 0.0f;
        Seen seen;
#pragma unroll
        for (int first = 0; first < ROWS; first += FRAGMENTS) {
            __syncthreads();  // nobody reads the panels any more, or the slab before
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float* line =
                        slab + ((warp_m * FRAGMENTS + i) * 16 + half * 8 + lane / 4) * PITCH + warp_n;
#pragma unroll
                    for (int p = 0; p < 2 * PAIRS; p++)
                        *reinterpret_cast<float2*>(line + p * 8 + lane % 4 * 2) =
                            make_float2(sums[first + i][p][half * 2], sums[first + i][p][half * 2 + 1]);
                }
            __syncthreads();
#pragma unroll 1
            for (int s = down; s < SLAB; s += DOWN) {
                int i = at.row + s / (16 * FRAGMENTS) * WARP_M + first * 16 + s % (16 * FRAGMENTS);
                if (i >= m || count <= 0) continue;
                Vector<float> low = load_vector(slab + s * PITCH + j),
                              high = load_vector(slab + s * PITCH + j + 4);
                Vector<bf16> v;
#pragma unroll
                for (int k = 0; k < 4; k++) v.v[k] = low.v[k] + bias[k], v.v[k + 4] = high.v[k] + bias[k + 4];
                int64_t place = row(i) + at.column + j;
                if (to.wide) {
                    put<float>(to.wide + place, {v.v[0], v.v[1], v.v[2], v.v[3]}, count, to.accumulate);
                    put<float>(to.wide + place + 4, {v.v[4], v.v[5], v.v[6], v.v[7]}, count - 4,
                               to.accumulate);
                } else {
                    put<bf16>(to.narrow + place, v, count, to.accumulate);
                }
                if (MOMENTS && to.moments) {
                    // Of what is stored: as if it had been read back.
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        v.v[k] = to.wide ? v.v[k] : to_float(from_float<bf16>(v.v[k]));
                    seen.add(v.v);
                }
            }
        }
        if (MOMENTS && to.moments) merge_columns(seen, at, n, to.moments, slab);
    }

    template <typename T>
    __device__ __forceinline__ static void put(T* to, Vector<T> v, int count, bool accumulate) {
        if (count <= 0) return;
        if (accumulate) {
            Vector<T> old = load_some(to, count);
#pragma unroll
            for (int k = 0; k < PER_VECTOR<T>; k++) v.v[k] += old.v[k];
        }
        store_some(to, v, count);
    }

    /// A column's DOWN parts, in order.
    __device__ __forceinline__ static void merge_columns(const Seen& seen, Corner at, int n, float* moments,
                                                         float* slab) {
        static_assert((2 * N + 1) * DOWN * 4 <= BYTES, "the parts fit where the panels were");
        float *means = slab, *squares = slab + DOWN * N, *counts = slab + 2 * DOWN * N;
        int j = threadIdx.x * 8 % N, down = threadIdx.x * 8 / N;
        __syncthreads();  // the slab has been read
        float inverse = seen.count > 0.0f ? 1.0f / seen.count : 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float mean = seen.sum[k] * inverse;
            means[down * N + j + k] = seen.count > 0.0f ? seen.first[k] + mean : 0.0f;
            squares[down * N + j + k] = fmaxf(seen.square[k] - mean * seen.sum[k], 0.0f);
        }
        // Whole vectors of columns have rows or not; a vector beyond n has none, and is not looked at.
        if (j == 0) counts[down] = seen.count;
        __syncthreads();
        int column = at.column + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) >= N || column >= n) return;
        Moments all = {};
        float rows = 0.0f;
        for (int d = 0; d < DOWN; d++) {
            all = merge(all, rows, {means[d * N + threadIdx.x], squares[d * N + threadIdx.x]}, counts[d]);
            rows += counts[d];
        }
        float* of_tile = moments + int64_t{at.row / M} * 2 * n + column;
        of_tile[0] = all.mean;
        of_tile[n] = all.m2;
    }
};

// The tiles that kernels are made for, as src/ops/tiles.rs has them. Three stages of the large one are all
// the static shared memory there is.
using Tile128x128 = TensorTile<128, 128, 2, 2, 3>;
using Tile128x64 = TensorTile<128, 64, 2, 2, 4>;
using Tile64x128 = TensorTile<64, 128, 2, 2, 4>;
using Tile64x64 = TensorTile<64, 64, 2, 2, 4>;
