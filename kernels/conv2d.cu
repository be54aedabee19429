// Convolution of images x [n, h, w, c] with filters [k, r, s, c] into y [n, p, q, k]; see src/ops/conv2d. Three directions,
// each a matrix product of which one operand, the patches of an image, is not in memory but gathered while it is read:
//
//     conv2d                  y [n p q, k] = patches of x, filters
//     conv2d_data_gradient    dx [pixels of a phase, c] = patches of dy, filters of the phase's taps
//     conv2d_weight_gradient  dw [k, r s c] = dy, patches of x; the sum runs over n p q
//
// A stride of d makes d d phases of the data gradient: pixels (i, j) of one phase have the same i % d and j % d, so the
// same taps reach them, and no zero is multiplied.
//
// Launch, in tiles of 64 x 64, by blocks of (128, 1, 1) for bf16 and (256, 1, 1) for f32, without dynamic shared memory
// (/ rounds down):
//     conv2d                  grid = (ceil(n p q / 64) ceil(k / 64), 1, 1)
//     conv2d_data_gradient    grid = (ceil(n ceil(h / stride) ceil(w / stride) / 64) ceil(c / 64), 1, stride stride)
//     conv2d_weight_gradient  grid = (ceil(k / 64) ceil(r s c / 64), 1, slices)
//         tiles = ceil(k / 64) ceil(r s c / 64)
//         most = max(1, min(512 / tiles, n p q / 256))            slices wanted: a rule of the shape
//         pixels_per_slice = ceil(ceil(n p q / most) / 32) 32     a multiple of 32
//         slices = ceil(n p q / pixels_per_slice)
//       With one slice `out` is dw, and accumulate != 0 adds to it. With more, `out` is a workspace f32 [slices, k, r,
//       s, c] (never above 8 MiB), accumulate is 0, and sum_slices_f32(dw, out, slices, k r s c, accumulate) of
//       matmul.cu follows.
// Arguments: output, inputs, the eleven sizes in the order of Conv2dDims, then what the direction needs. `accumulate` != 0
// of the data gradient adds dx to what it holds. n h w, n p q, and the elements of one image and of the filters, are below
// 2^31. bf16: all operands bf16, sums f32, y and dx bf16, dw f32. f32: f32 throughout.
#include "ptx.cuh"
#include "vector.cuh"

/// The sizes, as Conv2dDims.
struct Dims {
    int n, h, w, c, k, r, s, p, q, stride, pad;
};

/// Quotients of numbers below 2^31 by one divisor above 0, as a product (Granlund and Montgomery 1994).
struct Divisor {
    int by, shift;
    unsigned factor;

    __device__ __forceinline__ explicit Divisor(int by) : by(by) {
        shift = 31 - __clz(by - 1);  // ceil(log2 by) - 1
        factor = static_cast<unsigned>(((uint64_t{1} << (shift + 32)) + by - 1) / by);
    }
    __device__ __forceinline__ int quotient(int x) const {
        return by == 1 ? x : static_cast<int>(__umulhi(static_cast<unsigned>(x), factor) >> shift);
    }
};

/// A place that is outside of every image, also after a tap is added.
constexpr int NOWHERE = -(1 << 30);

/// Elements that stand next to each other in memory from each multiple of so many on: 16 bytes of them, 8, or one.
template <typename T>
__device__ __forceinline__ int run_of(const T* data, int channels) {
    constexpr int W = PER_VECTOR<T>;
    return !is_aligned_16(data) ? 1 : channels % W == 0 ? W : channels % (W / 2) == 0 ? W / 2 : 1;
}

// Operands: matrices [lines, inner] that say where an element is, in two parts so that each can be kept: `at(line, column)`
// is null where the element is a zero. What has no pixel, and what lies outside of the matrix, is zero.

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

/// Filters [k, r, s, c] as [taps k, c], of the taps (r0 + a stride, s0 + b stride).
template <typename T>
struct FilterTaps : Rows<T> {
    int r, s, r0, s0, stride;
    Divisor per_tap, per_row;

    __device__ __forceinline__ FilterTaps(const T* data, const Dims& d, int r0, int s0, int rows, int columns)
        : Rows<T>(data, rows * columns * d.k, d.c), r(d.r), s(d.s), r0(r0), s0(s0), stride(d.stride), per_tap(d.k),
          per_row(columns > 0 ? columns : 1) {}
    __device__ __forceinline__ int64_t line(int i) const {
        if (i >= this->lines) return -1;
        int tap = per_tap.quotient(i), k = i - tap * per_tap.by;
        int a = per_row.quotient(tap), b = tap - a * per_row.by;
        return int64_t{(k * r + r0 + a * stride) * s + s0 + b * stride} * this->inner;
    }
};

/// Patches of images [n, height, width, channels]: line (n, i, j) of `lines_i` x `lines_j` to an image holds, for each
/// tap (a, b) of `taps_i` x `taps_j`, the channels of pixel (i step + from_i + a direction, j step + from_j + b
/// direction).
template <typename T>
struct Patches {
    using Element = T;
    struct Line {
        int64_t offset;
        int i, j;
    };
    struct Column {
        int offset, i, j;
    };
    const T* data;
    int lines, inner, run;
    int height, width, channels, step, from_i, from_j, direction;
    Divisor per_image, per_row, per_tap, per_tap_row;

    __device__ __forceinline__ Patches(const T* data, int n, int height, int width, int channels, int lines_i, int lines_j,
                                       int taps_i, int taps_j, int step, int from_i, int from_j, int direction)
        : data(data), lines(n * lines_i * lines_j), inner(taps_i * taps_j * channels), run(run_of(data, channels)),
          height(height), width(width), channels(channels), step(step), from_i(from_i), from_j(from_j),
          direction(direction), per_image(lines_i * lines_j), per_row(lines_j), per_tap(channels),
          per_tap_row(taps_j > 0 ? taps_j : 1) {}
    __device__ __forceinline__ Line line(int at) const {
        if (at >= lines) return {0, NOWHERE, NOWHERE};
        int image = per_image.quotient(at), o = at - image * per_image.by, row = per_row.quotient(o);
        int i = row * step + from_i, j = (o - row * per_row.by) * step + from_j;
        return {((int64_t{image} * height + i) * width + j) * channels, i, j};
    }
    __device__ __forceinline__ Column column(int at) const {
        if (at >= inner) return {0, NOWHERE, NOWHERE};
        int tap = per_tap.quotient(at), row = per_tap_row.quotient(tap);
        int i = row * direction, j = (tap - row * per_tap_row.by) * direction;
        return {(i * width + j) * channels + at - tap * channels, i, j};
    }
    __device__ __forceinline__ const T* at(const Line& line, const Column& column) const {
        // Unsigned: what is negative is too large as well.
        bool inside = static_cast<unsigned>(line.i + column.i) < static_cast<unsigned>(height) &&
                      static_cast<unsigned>(line.j + column.j) < static_cast<unsigned>(width);
        return inside ? data + line.offset + column.offset : nullptr;
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
        const T *low = source.at(line, source.column(from)), *high = source.at(line, source.column(from + W / 2));
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

/// Which pieces of 16 bytes of a panel [LINES, INNER] of an operand a thread brings: one column, and each STEP-th line.
/// The part that does not change from step to step is found once: the lines where depth runs along them, else the
/// column.
template <typename Source, int LINES, int INNER, int THREADS, bool DEPTH_INNER>
struct Share {
    static constexpr int W = PER_VECTOR<typename Source::Element>;
    static constexpr int STEP = THREADS / (INNER / W), PASSES = LINES / STEP;
    static_assert(THREADS % (INNER / W) == 0 && LINES % STEP == 0, "every thread brings as much");
    using Line = typename Source::Line;
    using Column = typename Source::Column;

    int line, column, fixed;  // in the panel; first line or column of the panel in the operand, along what does not change
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

/// C [m, n] = A B over depths [begin, end), by one block for one tile; row(i) is where row i of C starts. Both tiles
/// have the same call: A_INNER and B_INNER say that depth runs along the operand's lines (A [m, depth], B [n, depth]) and
/// not across them (A [depth, m], B [depth, n]).
///
/// Tensor cores, bf16 to f32; WARPS_M x WARPS_N warps, STAGES steps of depth in flight.
template <int M, int N, int DEPTH, int STAGES, int WARPS_M, int WARPS_N>
struct TensorTile {
    static constexpr int THREADS = WARPS_M * WARPS_N * 32;

    template <bool A_INNER, bool B_INNER, typename A, typename B, typename Row>
    __device__ __forceinline__ static void product(const A& a, const B& b, int m, int n, int begin, int end,
                                                   bool accumulate, Row row) {
        constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
        static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && DEPTH % 16 == 0, "whole fragments");
        // Lines are 16 bytes longer than they need be, so that eight read at once lie in different banks.
        constexpr int LINES_A = A_INNER ? M : DEPTH, INNER_A = A_INNER ? DEPTH : M, PITCH_A = INNER_A + 8;
        constexpr int LINES_B = B_INNER ? N : DEPTH, INNER_B = B_INNER ? DEPTH : N, PITCH_B = INNER_B + 8;
        constexpr int SIZE_A = LINES_A * PITCH_A, SIZE_B = LINES_B * PITCH_B, PITCH_C = N + 8;
        constexpr int PANEL_BYTES = STAGES * (SIZE_A + SIZE_B) * 2, C_BYTES = M * PITCH_C * 4;
        __shared__ __align__(16) unsigned char memory[PANEL_BYTES > C_BYTES ? PANEL_BYTES : C_BYTES];
        bf16 *as = reinterpret_cast<bf16*>(memory), *bs = as + STAGES * SIZE_A;

        int tiles_n = (n + N - 1) / N, first_m = blockIdx.x / tiles_n * M, first_n = blockIdx.x % tiles_n * N;
        if (first_m >= m) return;
        int steps = end > begin ? (end - begin + DEPTH - 1) / DEPTH : 0;
        Share<A, LINES_A, INNER_A, THREADS, A_INNER> share_a(a, first_m);
        Share<B, LINES_B, INNER_B, THREADS, B_INNER> share_b(b, first_n);

        auto bring = [](bf16* to, const auto& source, const auto& line, const auto& column, int number) {
            const bf16* at = source.at(line, column);
            if (source.run == 8) cp_async_16(to, at ? at : source.data, at);
            else *reinterpret_cast<uint4*>(to) = fetch(source, line, number);
        };
        auto load = [&](int step) {
            if (step < steps) {
                int depth = begin + step * DEPTH;
                bf16* to_a = as + step % STAGES * SIZE_A + share_a.column;
                bf16* to_b = bs + step % STAGES * SIZE_B + share_b.column;
                share_a.each(a, depth, [&](int, int l, const auto& line, const auto& column, int number) {
                    bring(to_a + l * PITCH_A, a, line, column, number);
                });
                share_b.each(b, depth, [&](int, int l, const auto& line, const auto& column, int number) {
                    bring(to_b + l * PITCH_B, b, line, column, number);
                });
            }
            cp_async_commit();  // also where there is nothing, so that the groups left count stages
        };

        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
        float sums[WARP_M / 16][WARP_N / 8][4] = {};
        for (int step = 0; step < STAGES - 1; step++) load(step);
        for (int step = 0; step < steps; step++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // the step's panels are whole, and nobody reads those that the next load overwrites
            load(step + STAGES - 1);
            const bf16 *pa = as + step % STAGES * SIZE_A, *pb = bs + step % STAGES * SIZE_B;
#pragma unroll
            for (int depth = 0; depth < DEPTH; depth += 16) {
                unsigned fa[WARP_M / 16][4], fb[WARP_N / 16][4];
#pragma unroll
                for (int i = 0; i < WARP_M / 16; i++) {
                    // Matrices 0 to 3 of a: rows 0-7 and 8-15 of depths 0-7, then of depths 8-15.
                    int r = warp_m + i * 16 + lane / 8 % 2 * 8, d = depth + lane / 16 * 8;
                    if (A_INNER) ldmatrix_x4(fa[i], pa + (r + lane % 8) * PITCH_A + d);
                    else ldmatrix_x4_trans(fa[i], pa + (d + lane % 8) * PITCH_A + r);
                }
#pragma unroll
                for (int j = 0; j < WARP_N / 16; j++) {
                    // Matrices 0 to 3 of b: depths 0-7 and 8-15 of columns 0-7, then of columns 8-15.
                    int s = warp_n + j * 16 + lane / 16 * 8, d = depth + lane / 8 % 2 * 8;
                    if (B_INNER) ldmatrix_x4(fb[j], pb + (s + lane % 8) * PITCH_B + d);
                    else ldmatrix_x4_trans(fb[j], pb + (d + lane % 8) * PITCH_B + s);
                }
#pragma unroll
                for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
                    for (int j = 0; j < WARP_N / 8; j++) {
                        unsigned pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
                        mma_bf16(sums[i][j], fa[i], pair);
                    }
            }
        }

        // Through shared memory, so that whole lines of 16 bytes go out.
        cp_async_wait<0>();
        __syncthreads();
        float* staged = reinterpret_cast<float*>(memory);
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
            for (int j = 0; j < WARP_N / 8; j++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float* to = staged + (warp_m + i * 16 + half * 8 + lane / 4) * PITCH_C + warp_n + j * 8 + lane % 4 * 2;
                    *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
                }
        __syncthreads();
        using Out = std::remove_pointer_t<decltype(row(0))>;
        constexpr int W = PER_VECTOR<Out>;
        for (int e = threadIdx.x * W; e < M * N; e += THREADS * W) {
            int i = e / N, j = e % N, count = n - first_n - j;
            if (first_m + i >= m || count <= 0) continue;
            Out* to = row(first_m + i) + first_n + j;
            Vector<Out> v, old{};
            if (accumulate) old = load_some(to, count);
#pragma unroll
            for (int k = 0; k < W; k += 4) {
                Vector<float> four = load_vector(staged + i * PITCH_C + j + k);
#pragma unroll
                for (int l = 0; l < 4; l++) v.v[k + l] = four.v[l] + old.v[k + l];
            }
            store_some(to, v, count);
        }
    }
};

/// f32 throughout: a thread makes EACH_M x EACH_N sums; the next step's operands come into registers meanwhile.
template <int M, int N, int DEPTH, int EACH_M, int EACH_N>
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
                                                   bool accumulate, Row row) {
        static_assert(EACH_M % 4 == 0 && EACH_N % 4 == 0, "sums are made of whole vectors");
        constexpr int PITCH_A = M + 4, PITCH_B = N + 4;
        __shared__ __align__(16) float as[DEPTH * PITCH_A], bs[DEPTH * PITCH_B];
        using ShareA = Share<A, A_INNER ? M : DEPTH, A_INNER ? DEPTH : M, THREADS, A_INNER>;
        using ShareB = Share<B, B_INNER ? N : DEPTH, B_INNER ? DEPTH : N, THREADS, B_INNER>;

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
        for (int depth = begin; depth < end; depth += DEPTH) {
            __syncthreads();  // nobody reads the last step's panels any more
#pragma unroll
            for (int i = 0; i < ShareA::PASSES; i++)
                put<A_INNER>(as, PITCH_A, share_a.line + i * ShareA::STEP, share_a.column, next_a[i]);
#pragma unroll
            for (int i = 0; i < ShareB::PASSES; i++)
                put<B_INNER>(bs, PITCH_B, share_b.line + i * ShareB::STEP, share_b.column, next_b[i]);
            __syncthreads();
            if (depth + DEPTH < end) get(depth + DEPTH);
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
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
                for (int l = 0; l < 4; l++) v.v[l] = sums[i][j + l] + old.v[l];
                store_some(to + j, v, count);
            }
        }
    }
};

// The head of this file has these sizes.
using TileBf16 = TensorTile<64, 64, 32, 3, 2, 2>;
using TileF32 = FloatTile<64, 64, 16, 4, 4>;
static_assert(TileBf16::THREADS == 128 && TileF32::THREADS == 256, "as in BOUNDS below");

template <typename T>
__device__ __forceinline__ Patches<T> patches_of_x(const T* x, const Dims& d) {
    return {x, d.n, d.h, d.w, d.c, d.p, d.q, d.r, d.s, d.stride, -d.pad, -d.pad, 1};
}

/// y [n, p, q, k]
template <typename Tile, typename T>
__device__ __forceinline__ void conv2d(T* y, const T* x, const T* filters, const Dims& d) {
    Patches<T> a = patches_of_x(x, d);
    Rows<T> b(filters, d.k, a.inner);
    auto row = [&](int i) { return y + int64_t{i} * d.k; };
    Tile::template product<true, true>(a, b, a.lines, d.k, 0, a.inner, false, row);
}

/// dx [n, h, w, c], the pixels of phase blockIdx.z. Pixel i is reached from p = (i + pad - r) / stride where that has
/// no remainder: with i = phase + stride a and r = r0 + stride t, r0 = (phase + pad) % stride, from p = a + (phase +
/// pad) / stride - t.
template <typename Tile, typename T>
__device__ __forceinline__ void conv2d_data_gradient(T* dx, const T* dy, const T* filters, const Dims& d, bool accumulate) {
    int phase_i = blockIdx.z / d.stride, phase_j = blockIdx.z % d.stride;
    int rows = (d.h - phase_i + d.stride - 1) / d.stride, columns = (d.w - phase_j + d.stride - 1) / d.stride;
    if (rows == 0 || columns == 0) return;
    int r0 = (phase_i + d.pad) % d.stride, s0 = (phase_j + d.pad) % d.stride;
    int taps_i = r0 < d.r ? (d.r - r0 + d.stride - 1) / d.stride : 0;
    int taps_j = s0 < d.s ? (d.s - s0 + d.stride - 1) / d.stride : 0;
    Patches<T> a(dy, d.n, d.p, d.q, d.k, rows, columns, taps_i, taps_j, 1, (phase_i + d.pad) / d.stride,
                 (phase_j + d.pad) / d.stride, -1);
    FilterTaps<T> b(filters, d, r0, s0, taps_i, taps_j);
    Tile::template product<true, false>(a, b, a.lines, d.c, 0, a.inner, accumulate, [&](int at) {
        int image = a.per_image.quotient(at), o = at - image * a.per_image.by;
        int row = a.per_row.quotient(o), i = phase_i + row * d.stride, j = phase_j + (o - row * columns) * d.stride;
        return dx + ((int64_t{image} * d.h + i) * d.w + j) * d.c;
    });
}

/// out [slices, k, r, s, c], the sums over the pixels of slice blockIdx.z.
template <typename Tile, typename T>
__device__ __forceinline__ void conv2d_weight_gradient(float* out, const T* x, const T* dy, const Dims& d,
                                                       int pixels_per_slice, bool accumulate) {
    Patches<T> b = patches_of_x(x, d);
    Rows<T> a(dy, b.lines, d.k);
    int begin = blockIdx.z * pixels_per_slice;
    int end = b.lines - begin < pixels_per_slice ? b.lines : begin + pixels_per_slice;
    out += int64_t{blockIdx.z} * d.k * b.inner;
    Tile::template product<false, false>(a, b, d.k, b.inner, begin, end, accumulate,
                                         [&](int i) { return out + int64_t{i} * b.inner; });
}

KERNEL BOUNDS(128) void conv2d_bf16(bf16* y, const bf16* x, const bf16* filters, int n, int h, int w, int c, int k, int r,
                                    int s, int p, int q, int stride, int pad) {
    conv2d<TileBf16>(y, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}
KERNEL BOUNDS(256) void conv2d_f32(float* y, const float* x, const float* filters, int n, int h, int w, int c, int k, int r,
                                   int s, int p, int q, int stride, int pad) {
    conv2d<TileF32>(y, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}

KERNEL BOUNDS(128) void conv2d_data_gradient_bf16(bf16* dx, const bf16* dy, const bf16* filters, int n, int h, int w, int c,
                                                  int k, int r, int s, int p, int q, int stride, int pad, int accumulate) {
    conv2d_data_gradient<TileBf16>(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, accumulate);
}
KERNEL BOUNDS(256) void conv2d_data_gradient_f32(float* dx, const float* dy, const float* filters, int n, int h, int w,
                                                 int c, int k, int r, int s, int p, int q, int stride, int pad,
                                                 int accumulate) {
    conv2d_data_gradient<TileF32>(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, accumulate);
}

KERNEL BOUNDS(128) void conv2d_weight_gradient_bf16(float* out, const bf16* x, const bf16* dy, int n, int h, int w, int c,
                                                    int k, int r, int s, int p, int q, int stride, int pad,
                                                    int pixels_per_slice, int accumulate) {
    conv2d_weight_gradient<TileBf16>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, pixels_per_slice,
                                     accumulate);
}
KERNEL BOUNDS(256) void conv2d_weight_gradient_f32(float* out, const float* x, const float* dy, int n, int h, int w, int c,
                                                   int k, int r, int s, int p, int q, int stride, int pad,
                                                   int pixels_per_slice, int accumulate) {
    conv2d_weight_gradient<TileF32>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, pixels_per_slice, accumulate);
}
