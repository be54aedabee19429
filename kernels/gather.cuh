// GEMM operands that are gathered: they give the address of each element, for any size and alignment. Used by
// the small bf16 tile, and by the f32 GEMM below, which runs without tensor cores.
#pragma once

#include "gemm_tile.cuh"

/// The alignment of each row and its start, in elements: 16 bytes of them, 8 bytes, or one element.
template <typename T>
__device__ __forceinline__ int alignment_of(const T* data, int channels) {
    constexpr int W = PER_VECTOR<T>;
    return !is_aligned_16(data) ? 1 : channels % W == 0 ? W : channels % (W / 2) == 0 ? W / 2 : 1;
}

// Sources: matrices [rows, columns] whose address computation has two parts, for the row and for the column,
// so that each can be kept. `at(row, column)` is null for a zero: padding, and what lies outside of the
// matrix.

/// A matrix in memory.
template <typename T>
struct MatrixSource {
    using Element = T;
    using Row = int64_t;
    using Column = int;
    const T* data;
    int rows, columns, alignment;

    __device__ __forceinline__ MatrixSource(const T* data, int rows, int columns)
        : data(data), rows(rows), columns(columns), alignment(alignment_of(data, columns)) {}
    __device__ __forceinline__ Row row(int i) const { return i < rows ? int64_t{i} * columns : -1; }
    __device__ __forceinline__ Column column(int j) const { return j < columns ? j : -1; }
    __device__ __forceinline__ const T* at(Row row, Column column) const {
        return row >= 0 && column >= 0 ? data + row + column : nullptr;
    }
};

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }

/// Gathers 16 bytes: the elements of a row from column `from` on.
template <typename Source>
__device__ __forceinline__ uint4 gather_16(const Source& source, const typename Source::Row& row, int from) {
    using T = typename Source::Element;
    constexpr int W = PER_VECTOR<T>;
    if (source.alignment == W) {
        const T* at = source.at(row, source.column(from));
        return at ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
    }
    if (source.alignment == W / 2) {
        const T *low = source.at(row, source.column(from)),
                *high = source.at(row, source.column(from + W / 2));
        uint2 a = low ? *reinterpret_cast<const uint2*>(low) : make_uint2(0, 0);
        uint2 b = high ? *reinterpret_cast<const uint2*>(high) : make_uint2(0, 0);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    unsigned words[4] = {};
#pragma unroll
    for (int e = 0; e < W; e++) {
        const T* at = source.at(row, source.column(from + e));
        unsigned bits = at ? bits_of(*at) : 0;
        words[e * 4 / W] |= sizeof(T) == 2 ? bits << e % 2 * 16 : bits;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/// The chunks of 16 bytes that a thread gathers of a tile [ROWS, COLUMNS] of an operand: the same columns of
/// every ROW_STEP-th row. What does not change from step to step is computed once: the rows if the operand is
/// K-major, else the column.
template <typename Source, int ROWS, int COLUMNS, int THREADS, bool K_MAJOR>
struct GatherMap {
    static constexpr int W = PER_VECTOR<typename Source::Element>;
    static constexpr int ROW_STEP = THREADS / (COLUMNS / W), COPIES = ROWS / ROW_STEP;
    static_assert(THREADS % (COLUMNS / W) == 0 && ROWS % ROW_STEP == 0,
                  "every thread gathers the same number");
    using Row = typename Source::Row;
    using Column = typename Source::Column;

    int row, column;  // in the tile
    int first;        // the tile's first row, or column, of the operand along m or n
    Row rows[K_MAJOR ? COPIES : 1];
    Column columns;

    __device__ __forceinline__ GatherMap(const Source& source, int first) : first(first) {
        row = threadIdx.x / (COLUMNS / W);
        column = threadIdx.x % (COLUMNS / W) * W;
        if constexpr (K_MAJOR) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) rows[i] = source.row(first + row + i * ROW_STEP);
        } else {
            columns = source.column(first + column);
        }
    }

    /// Calls f(copy, row in the tile, row of the operand, column of the operand, that column's index).
    template <typename F>
    __device__ __forceinline__ void for_each(const Source& source, int k, F f) const {
        Column at = columns;
        if constexpr (K_MAJOR) at = source.column(k + column);
        int index = (K_MAJOR ? k : first) + column;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int r = row + i * ROW_STEP;
            if constexpr (K_MAJOR) f(i, r, rows[i], at, index);
            else f(i, r, source.row(k + r), at, index);
        }
    }
};

/// An operand of gemm_tile.cuh from any source. Keeps only what does not change between steps and computes
/// the rest by divisions: for small or ragged problems.
template <typename Source, int EXTENT, int THREADS, bool IS_K_MAJOR>
struct GatheredOperand {
    static constexpr bool K_MAJOR = IS_K_MAJOR;
    using To = SmemTile<EXTENT, K_MAJOR>;

    const Source& source;
    GatherMap<Source, To::ROWS, To::COLUMNS, THREADS, K_MAJOR> map;
    int k;

    __device__ __forceinline__ GatheredOperand(const Source& source, int first, int k_begin)
        : source(source), map(source, first), k(k_begin) {}

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
        if (active) copy_step(smem);
        k += TILE_K;
    }

  private:
    __device__ __forceinline__ void copy_step(bf16* smem) const {
        map.for_each(source, k, [&](int, int r, const auto& row, const auto& column, int index) {
            bf16* to = smem + To::swizzle(r, map.column);
            const bf16* at = source.at(row, column);
            if (source.alignment == 8) cp_async_16(to, at ? at : source.data, at);
            else *reinterpret_cast<uint4*>(to) = gather_16(source, row, index);
        });
    }
};

/// One block's tile of C [m, n] = A B over k in [k_begin, k_end), f32 throughout; `row_pointer(i)` is where
/// row i of C starts. A_K_MAJOR and B_K_MAJOR: k is contiguous in the operand (A [m, k], B [n, k]), else m or
/// n is (A [k, m], B [k, n]).
///
/// A thread has THREAD_M x THREAD_N accumulators; the operands of the next step are prefetched into
/// registers.
template <int M, int N, int K_STEP, int THREAD_M, int THREAD_N>
struct FloatTile {
    static constexpr int THREADS = M / THREAD_M * (N / THREAD_N);

    /// Stores a chunk to shared memory [k][pitch].
    template <bool K_MAJOR>
    __device__ __forceinline__ static void store_chunk(float* smem, int pitch, int row, int column, uint4 v) {
        if constexpr (K_MAJOR) {
            const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) smem[(column + e) * pitch + row] = __uint_as_float(words[e]);
        } else {
            *reinterpret_cast<uint4*>(smem + row * pitch + column) = v;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ static void load_fragment(float (&v)[COUNT], const float* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            Vector<float> four = load_vector(from + i);
#pragma unroll
            for (int e = 0; e < 4; e++) v[i + e] = four.v[e];
        }
    }

    template <bool A_K_MAJOR, bool B_K_MAJOR, typename A, typename B, typename RowPointer>
    __device__ __forceinline__ static void gemm(const A& a, const B& b, int m, int n, int k_begin, int k_end,
                                                const float* bias, bool accumulate, RowPointer row_pointer) {
        static_assert(THREAD_M % 4 == 0 && THREAD_N % 4 == 0, "fragments are whole vectors");
        constexpr int PITCH_A = M + 4, PITCH_B = N + 4;
        __shared__ __align__(16) float smem_a[K_STEP * PITCH_A], smem_b[K_STEP * PITCH_B];
        using MapA = GatherMap<A, A_K_MAJOR ? M : K_STEP, A_K_MAJOR ? K_STEP : M, THREADS, A_K_MAJOR>;
        using MapB = GatherMap<B, B_K_MAJOR ? N : K_STEP, B_K_MAJOR ? K_STEP : N, THREADS, B_K_MAJOR>;

        int tiles_n = (n + N - 1) / N, first_m = blockIdx.x / tiles_n * M, first_n = blockIdx.x % tiles_n * N;
        if (first_m >= m) return;
        MapA map_a(a, first_m);
        MapB map_b(b, first_n);
        uint4 next_a[MapA::COPIES], next_b[MapB::COPIES];
        auto prefetch = [&](int k) {
            map_a.for_each(a, k, [&](int copy, int, const auto& row, const auto&, int index) {
                next_a[copy] = gather_16(a, row, index);
            });
            map_b.for_each(b, k, [&](int copy, int, const auto& row, const auto&, int index) {
                next_b[copy] = gather_16(b, row, index);
            });
        };

        int y = threadIdx.x / (N / THREAD_N) * THREAD_M, x = threadIdx.x % (N / THREAD_N) * THREAD_N;
        float accumulators[THREAD_M][THREAD_N] = {};
        if (k_begin < k_end) prefetch(k_begin);
        for (int k = k_begin; k < k_end; k += K_STEP) {
            __syncthreads();  // every thread has read the last step's tiles
#pragma unroll
            for (int i = 0; i < MapA::COPIES; i++)
                store_chunk<A_K_MAJOR>(smem_a, PITCH_A, map_a.row + i * MapA::ROW_STEP, map_a.column,
                                       next_a[i]);
#pragma unroll
            for (int i = 0; i < MapB::COPIES; i++)
                store_chunk<B_K_MAJOR>(smem_b, PITCH_B, map_b.row + i * MapB::ROW_STEP, map_b.column,
                                       next_b[i]);
            __syncthreads();
            if (k + K_STEP < k_end) prefetch(k + K_STEP);
#pragma unroll
            for (int l = 0; l < K_STEP; l++) {
                float u[THREAD_M], v[THREAD_N];
                load_fragment(u, smem_a + l * PITCH_A + y);
                load_fragment(v, smem_b + l * PITCH_B + x);
#pragma unroll
                for (int i = 0; i < THREAD_M; i++)
#pragma unroll
                    for (int j = 0; j < THREAD_N; j++) accumulators[i][j] += u[i] * v[j];
            }
        }
        // Epilogue.
#pragma unroll
        for (int i = 0; i < THREAD_M; i++) {
            if (first_m + y + i >= m) continue;
            float* to = row_pointer(first_m + y + i) + first_n + x;
#pragma unroll
            for (int j = 0; j < THREAD_N; j += 4) {
                int count = n - first_n - x - j;
                if (count <= 0) continue;
                Vector<float> v, old{};
                if (accumulate) old = load_partial(to + j, count);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    v.v[e] = accumulators[i][j + e] + old.v[e];
                    if (bias && e < count) v.v[e] += bias[first_n + x + j + e];
                }
                store_partial(to + j, v, count);
            }
        }
    }
};

using TileF32 = FloatTile<64, 64, 16, 4, 4>;
