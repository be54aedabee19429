// Operands of products that say where an element is and are asked for each, whatever their sizes and
// alignment; and the product of such in f32.
#pragma once

#include "gemm_tile.cuh"

/// Elements that stand next to each other in memory from each multiple of so many on: 16 bytes of them, 8, or
/// one.
template <typename T>
__device__ __forceinline__ int run_of(const T* data, int channels) {
    constexpr int W = PER_VECTOR<T>;
    return !is_aligned_16(data) ? 1 : channels % W == 0 ? W : channels % (W / 2) == 0 ? W / 2 : 1;
}

// Operands: matrices [lines, inner] that say where an element is, in two parts so that each can be kept:
// `at(line, column)` is null where the element is a zero. What has no pixel, and what lies outside of the
// matrix, is zero.

/// A matrix in memory.
template <typename T>
struct Rows {
    using Element = T;
    using Line = int64_t;
    using Column = int;
    const T* data;
    int lines, inner, run;

    __device__ __forceinline__ Rows(const T* data, int lines, int inner)
        : data(data), lines(lines), inner(inner), run(run_of(data, inner)) {}
    __device__ __forceinline__ Line line(int i) const { return i < lines ? int64_t{i} * inner : -1; }
    __device__ __forceinline__ Column column(int j) const { return j < inner ? j : -1; }
    __device__ __forceinline__ const T* at(Line line, Column column) const {
        return line >= 0 && column >= 0 ? data + line + column : nullptr;
    }
};

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }

/// The elements [from, from + 16 bytes) of a line, whatever lies between them.
template <typename Source>
__device__ __forceinline__ uint4 fetch(const Source& source, const typename Source::Line& line, int from) {
    using T = typename Source::Element;
    constexpr int W = PER_VECTOR<T>;
    if (source.run == W) {
        const T* at = source.at(line, source.column(from));
        return at ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
    }
    if (source.run == W / 2) {
        const T *low = source.at(line, source.column(from)),
                *high = source.at(line, source.column(from + W / 2));
        uint2 a = low ? *reinterpret_cast<const uint2*>(low) : make_uint2(0, 0);
        uint2 b = high ? *reinterpret_cast<const uint2*>(high) : make_uint2(0, 0);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    unsigned words[4] = {};
#pragma unroll
    for (int e = 0; e < W; e++) {
        const T* at = source.at(line, source.column(from + e));
        unsigned bits = at ? bits_of(*at) : 0;
        words[e * 4 / W] |= sizeof(T) == 2 ? bits << e % 2 * 16 : bits;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/// Which pieces of 16 bytes of a panel [LINES, INNER] of an operand a thread brings: one column, and each
/// STEP-th line. The part that does not change from step to step is found once: the lines where depth runs
/// along them, else the column.
template <typename Source, int LINES, int INNER, int THREADS, bool DEPTH_INNER>
struct Share {
    static constexpr int W = PER_VECTOR<typename Source::Element>;
    static constexpr int STEP = THREADS / (INNER / W), PASSES = LINES / STEP;
    static_assert(THREADS % (INNER / W) == 0 && LINES % STEP == 0, "every thread brings as much");
    using Line = typename Source::Line;
    using Column = typename Source::Column;

    int line, column,
        fixed;  // in the panel; first line or column of the panel in the operand, along what does not change
    Line lines[DEPTH_INNER ? PASSES : 1];
    Column columns;

    __device__ __forceinline__ Share(const Source& source, int fixed) : fixed(fixed) {
        line = threadIdx.x / (INNER / W);
        column = threadIdx.x % (INNER / W) * W;
        if constexpr (DEPTH_INNER) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) lines[i] = source.line(fixed + line + i * STEP);
        } else {
            columns = source.column(fixed + column);
        }
    }

    /// Calls f(pass, line in the panel, line of the operand, column of the operand, that column's number).
    template <typename F>
    __device__ __forceinline__ void each(const Source& source, int depth, F f) const {
        Column at = columns;
        if constexpr (DEPTH_INNER) at = source.column(depth + column);
        int number = (DEPTH_INNER ? depth : fixed) + column;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            int l = line + i * STEP;
            if constexpr (DEPTH_INNER) f(i, l, lines[i], at, number);
            else f(i, l, source.line(depth + l), at, number);
        }
    }
};

/// An operand of gemm_tile.cuh from anything that says where its elements are. Holds nothing between steps
/// but what does not change, and divides to find the rest: for problems that are small or ragged.
template <typename Source, int EXTENT, int THREADS, bool DEPTH_INNER>
struct Gathered {
    static constexpr bool INNER = DEPTH_INNER;
    using To = Panel<EXTENT, INNER>;

    const Source& source;
    Share<Source, To::LINES, To::WIDTH, THREADS, INNER> share;
    int depth;

    __device__ __forceinline__ Gathered(const Source& source, int first, int begin)
        : source(source), share(source, first), depth(begin) {}

    __device__ __forceinline__ void issue(bf16* panel) {
        share.each(source, depth, [&](int, int l, const auto& line, const auto& column, int number) {
            bf16* to = panel + To::place(l, share.column);
            const bf16* at = source.at(line, column);
            if (source.run == 8) cp_async_16(to, at ? at : source.data, at);
            else *reinterpret_cast<uint4*>(to) = fetch(source, line, number);
        });
        depth += DEPTH;
    }
};

/// C [m, n] = A B over depths [begin, end), by one block for one tile; row(i) is where row i of C starts.
/// A_INNER and B_INNER say that depth runs along the operand's lines (A [m, depth], B [n, depth]) and not
/// across them.
///
/// f32 throughout: a thread makes EACH_M x EACH_N sums; the next step's operands come into registers
/// meanwhile.
template <int M, int N, int STEP, int EACH_M, int EACH_N>
struct FloatTile {
    static constexpr int THREADS = M / EACH_M * (N / EACH_N);

    /// Writes a piece to a panel [depth][pitch].
    template <bool DEPTH_INNER>
    __device__ __forceinline__ static void put(float* panel, int pitch, int line, int column, uint4 v) {
        if constexpr (DEPTH_INNER) {
            const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) panel[(column + e) * pitch + line] = __uint_as_float(words[e]);
        } else {
            *reinterpret_cast<uint4*>(panel + line * pitch + column) = v;
        }
    }

    template <int COUNT>
    __device__ __forceinline__ static void take(float (&v)[COUNT], const float* from) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            Vector<float> four = load_vector(from + i);
#pragma unroll
            for (int l = 0; l < 4; l++) v[i + l] = four.v[l];
        }
    }

    template <bool A_INNER, bool B_INNER, typename A, typename B, typename Row>
    __device__ __forceinline__ static void product(const A& a, const B& b, int m, int n, int begin, int end,
                                                   const float* bias, bool accumulate, Row row) {
        static_assert(EACH_M % 4 == 0 && EACH_N % 4 == 0, "sums are made of whole vectors");
        constexpr int PITCH_A = M + 4, PITCH_B = N + 4;
        __shared__ __align__(16) float as[STEP * PITCH_A], bs[STEP * PITCH_B];
        using ShareA = Share<A, A_INNER ? M : STEP, A_INNER ? STEP : M, THREADS, A_INNER>;
        using ShareB = Share<B, B_INNER ? N : STEP, B_INNER ? STEP : N, THREADS, B_INNER>;

        int tiles_n = (n + N - 1) / N, first_m = blockIdx.x / tiles_n * M, first_n = blockIdx.x % tiles_n * N;
        if (first_m >= m) return;
        ShareA share_a(a, first_m);
        ShareB share_b(b, first_n);
        uint4 next_a[ShareA::PASSES], next_b[ShareB::PASSES];
        auto get = [&](int depth) {
            share_a.each(a, depth, [&](int pass, int, const auto& line, const auto&, int number) {
                next_a[pass] = fetch(a, line, number);
            });
            share_b.each(b, depth, [&](int pass, int, const auto& line, const auto&, int number) {
                next_b[pass] = fetch(b, line, number);
            });
        };

        int y = threadIdx.x / (N / EACH_N) * EACH_M, x = threadIdx.x % (N / EACH_N) * EACH_N;
        float sums[EACH_M][EACH_N] = {};
        if (begin < end) get(begin);
        for (int depth = begin; depth < end; depth += STEP) {
            __syncthreads();  // nobody reads the last step's panels any more
#pragma unroll
            for (int i = 0; i < ShareA::PASSES; i++)
                put<A_INNER>(as, PITCH_A, share_a.line + i * ShareA::STEP, share_a.column, next_a[i]);
#pragma unroll
            for (int i = 0; i < ShareB::PASSES; i++)
                put<B_INNER>(bs, PITCH_B, share_b.line + i * ShareB::STEP, share_b.column, next_b[i]);
            __syncthreads();
            if (depth + STEP < end) get(depth + STEP);
#pragma unroll
            for (int d = 0; d < STEP; d++) {
                float u[EACH_M], v[EACH_N];
                take(u, as + d * PITCH_A + y);
                take(v, bs + d * PITCH_B + x);
#pragma unroll
                for (int i = 0; i < EACH_M; i++)
#pragma unroll
                    for (int j = 0; j < EACH_N; j++) sums[i][j] += u[i] * v[j];
            }
        }
#pragma unroll
        for (int i = 0; i < EACH_M; i++) {
            if (first_m + y + i >= m) continue;
            float* to = row(first_m + y + i) + first_n + x;
#pragma unroll
            for (int j = 0; j < EACH_N; j += 4) {
                int count = n - first_n - x - j;
                if (count <= 0) continue;
                Vector<float> v, old{};
                if (accumulate) old = load_some(to + j, count);
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    v.v[l] = sums[i][j + l] + old.v[l];
                    if (bias && l < count) v.v[l] += bias[first_n + x + j + l];
                }
                store_some(to + j, v, count);
            }
        }
    }
};

using TileF32 = FloatTile<64, 64, 16, 4, 4>;
