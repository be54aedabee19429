// The operands of convolutions. First what their kernels share; then those that are gathered element by
// element (see gather.cuh); last those of gemm_tile.cuh that know how their addresses change from step to
// step, and so have neither a division nor a product in the loop.
#pragma once

#include "gather.cuh"
#include "gemm_operands.cuh"

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

/// Filters [k, r, s, c] as [taps k, c], of the taps (r0 + a stride, s0 + b stride).
template <typename T>
struct FilterTaps : Rows<T> {
    int r, s, r0, s0, stride;
    Divisor per_tap, per_row;

    __device__ __forceinline__ FilterTaps(const T* data, const Dims& d, int r0, int s0, int rows, int columns)
        : Rows<T>(data, rows * columns * d.k, d.c),
          r(d.r),
          s(d.s),
          r0(r0),
          s0(s0),
          stride(d.stride),
          per_tap(d.k),
          per_row(columns > 0 ? columns : 1) {}
    __device__ __forceinline__ int64_t line(int i) const {
        if (i >= this->lines) return -1;
        int tap = per_tap.quotient(i), k = i - tap * per_tap.by;
        int a = per_row.quotient(tap), b = tap - a * per_row.by;
        return int64_t{(k * r + r0 + a * stride) * s + s0 + b * stride} * this->inner;
    }
};

/// How patches of images [n, height, width, channels] are read: line (image, i, j) of `lines_i` x `lines_j`
/// to an image holds, for each tap (a, b) of `taps_i` x `taps_j`, the channels of pixel (i step + from_i + a
/// direction, j step + from_j + b direction).
struct Geometry {
    int n, height, width, channels, lines_i, lines_j, taps_i, taps_j, step, from_i, from_j, direction;

    __device__ __forceinline__ int lines() const { return n * lines_i * lines_j; }
    __device__ __forceinline__ int depth() const { return taps_i * taps_j * channels; }
};

/// Patches of any size, a matrix [lines, depth].
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
    Geometry g;
    Divisor per_image, per_row, per_tap, per_tap_row;

    __device__ __forceinline__ Patches(const T* data, const Geometry& g)
        : data(data),
          lines(g.lines()),
          inner(g.depth()),
          run(run_of(data, g.channels)),
          g(g),
          per_image(g.lines_i * g.lines_j),
          per_row(g.lines_j),
          per_tap(g.channels),
          per_tap_row(g.taps_j > 0 ? g.taps_j : 1) {}
    __device__ __forceinline__ Line line(int at) const {
        if (at >= lines) return {0, NOWHERE, NOWHERE};
        int image = per_image.quotient(at), o = at - image * per_image.by, row = per_row.quotient(o);
        int i = row * g.step + g.from_i, j = (o - row * per_row.by) * g.step + g.from_j;
        return {((int64_t{image} * g.height + i) * g.width + j) * g.channels, i, j};
    }
    __device__ __forceinline__ Column column(int at) const {
        if (at >= inner) return {0, NOWHERE, NOWHERE};
        int tap = per_tap.quotient(at), row = per_tap_row.quotient(tap);
        int i = row * g.direction, j = (tap - row * per_tap_row.by) * g.direction;
        return {(i * g.width + j) * g.channels + at - tap * g.channels, i, j};
    }
    __device__ __forceinline__ const T* at(const Line& line, const Column& column) const {
        // Unsigned: what is negative is too large as well.
        bool inside = static_cast<unsigned>(line.i + column.i) < static_cast<unsigned>(g.height) &&
                      static_cast<unsigned>(line.j + column.j) < static_cast<unsigned>(g.width);
        return inside ? data + line.offset + column.offset : nullptr;
    }
};

/// Patches of which a tile has EXTENT lines; depth runs over taps and channels. At most eight taps either
/// way, channels in multiples of RUN, and at most 2^24 elements to an image, so that those of 128 images are
/// counted in 31 bits.
///
/// A line's taps that lie outside of its image are known before the first step, a bit for each row of taps
/// and each column.
template <int EXTENT, int THREADS, int RUN = 8>
struct PatchLines {
    static constexpr bool INNER = true;
    using Of = Pieces<EXTENT, THREADS, RUN, true>;

    const bf16* image;           // of the tile's first line
    int lines[Of::COUNT];        // from there to the pixel under tap (0, 0)
    unsigned inside[Of::COUNT];  // bit a: row a of taps, bit 16 + b: column b
    int channels, taps_j, next_tap, next_row;
    int channel, a, b, offset;  // of this thread's piece of the next step

    __device__ __forceinline__ PatchLines(const bf16* data, const Geometry& g, int first)
        : channels(g.channels), taps_j(g.taps_j) {
        Divisor per_image(g.lines_i * g.lines_j), per_row(g.lines_j);
        const int start = per_image.quotient(first);
        image = data + int64_t{start} * g.height * g.width * g.channels;
#pragma unroll
        for (int l = 0; l < Of::COUNT; l++) {
            int at = first + Of::line(l), number = per_image.quotient(at), o = at - number * per_image.by;
            int row = per_row.quotient(o), i = row * g.step + g.from_i,
                j = (o - row * per_row.by) * g.step + g.from_j;
            lines[l] = (((number - start) * g.height + i) * g.width + j) * g.channels;
            unsigned seen = 0;
            for (int t = 0; t < g.taps_i; t++)
                seen |= static_cast<unsigned>(static_cast<unsigned>(i + t * g.direction) <
                                              static_cast<unsigned>(g.height))
                        << t;
            for (int t = 0; t < g.taps_j; t++)
                seen |= static_cast<unsigned>(static_cast<unsigned>(j + t * g.direction) <
                                              static_cast<unsigned>(g.width))
                        << (16 + t);
            inside[l] = at < g.lines() ? seen : 0;
        }
        // From behind the last channel of a tap to the first of the next, and from behind a row of taps to
        // the next row.
        next_tap = (g.direction - 1) * g.channels;
        next_row = (g.width - g.taps_j) * g.direction * g.channels;
        a = b = 0;
        channel = offset = Of::column();
        settle();
    }

    __device__ __forceinline__ void settle() {
        while (channel >= channels) {
            channel -= channels;
            offset += next_tap;
            if (++b == taps_j) b = 0, a++, offset += next_row;
        }
    }

    __device__ __forceinline__ void issue(bf16* panel) {
#pragma unroll
        for (int l = 0; l < Of::COUNT; l++)
            Of::copy(panel, l, image + (lines[l] + offset), (inside[l] >> a) & (inside[l] >> (16 + b)) & 1);
        channel += DEPTH;
        offset += DEPTH;
        settle();
    }
};

/// The same of which a tile has EXTENT columns, taps and channels; depth runs over lines [begin, end). A
/// thread's column is one tap, and its pixels move by as many images, rows and columns in every step.
template <int EXTENT, int THREADS, int RUN = 8>
struct PatchesAcross {
    static constexpr bool INNER = false;
    using Of = Pieces<EXTENT, THREADS, RUN, false>;

    const bf16* lines[Of::COUNT];
    int is[Of::COUNT], js[Of::COUNT];
    int height, width, step, end_i, end_j, turn_i, turn_j, by_i, by_j, left;
    int64_t by, wrap_i, wrap_j;

    __device__ __forceinline__ PatchesAcross(const bf16* data, const Geometry& g, int first, int begin,
                                             int end)
        : height(g.height), width(g.width), step(g.step) {
        int column = first + Of::column(), tap = column / g.channels, a = tap / g.taps_j,
            b = tap - a * g.taps_j;
        int from_i = g.from_i + a * g.direction, from_j = g.from_j + b * g.direction;
        left = column < g.depth() ? end - begin - Of::line(0) : 0;
        const int per_image = g.lines_i * g.lines_j;
#pragma unroll
        for (int l = 0; l < Of::COUNT; l++) {
            int at = begin + Of::line(l), image = at / per_image, o = at - image * per_image,
                row = o / g.lines_j;
            is[l] = row * g.step + from_i;
            js[l] = (o - row * g.lines_j) * g.step + from_j;
            lines[l] = data + ((int64_t{image} * g.height + is[l]) * g.width + js[l]) * g.channels + column -
                       tap * g.channels;
        }
        int images = DEPTH / per_image, o = DEPTH - images * per_image, rows = o / g.lines_j;
        by_i = rows * g.step;
        by_j = (o - rows * g.lines_j) * g.step;
        by = (int64_t{images} * g.height + by_i) * g.width * g.channels + by_j * g.channels;
        // Past the last column goes to the next row, past the last row to the next image.
        turn_i = g.lines_i * g.step, turn_j = g.lines_j * g.step;
        end_i = from_i + turn_i, end_j = from_j + turn_j;
        wrap_j = (int64_t{g.step} * g.width - turn_j) * g.channels;
        wrap_i = int64_t{g.height - turn_i} * g.width * g.channels;
    }

    __device__ __forceinline__ void issue(bf16* panel) {
#pragma unroll
        for (int l = 0; l < Of::COUNT; l++) {
            bool inside = static_cast<unsigned>(is[l]) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(js[l]) < static_cast<unsigned>(width);
            Of::copy(panel, l, lines[l], inside && l * Of::STEP < left);
            lines[l] += by;
            is[l] += by_i;
            js[l] += by_j;
            if (js[l] >= end_j) js[l] -= turn_j, is[l] += step, lines[l] += wrap_j;
            if (is[l] >= end_i) is[l] -= turn_i, lines[l] += wrap_i;
        }
        left -= DEPTH;
    }
};

/// Filters [k, r, s, c] as [taps k, c], of which a tile has EXTENT columns; depth runs over the taps (r0 + a
/// stride, s0 + b stride) and k. k is a multiple of 32, so that a step has one tap.
template <int EXTENT, int THREADS>
struct TapsAcross {
    static constexpr bool INNER = false;
    using Of = Pieces<EXTENT, THREADS, 8, false>;

    const bf16* at;
    int k, taps_j, channel = 0, b = 0;
    int line, next_tap,
        next_row;  // elements from one k to the next, and what is added behind the last of a tap
    bool exists;

    __device__ __forceinline__ TapsAcross(const bf16* data, const Dims& d, int r0, int s0, int taps_j,
                                          int first)
        : k(d.k), taps_j(taps_j) {
        line = d.r * d.s * d.c;
        at = data + Of::line(0) * line + (r0 * d.s + s0) * d.c + first + Of::column();
        next_tap = d.stride * d.c - d.k * line;
        next_row = d.stride * (d.s - taps_j) * d.c;
        exists = first + Of::column() < d.c;
    }

    __device__ __forceinline__ void issue(bf16* panel) {
#pragma unroll
        for (int i = 0; i < Of::COUNT; i++) Of::copy(panel, i, at + i * Of::STEP * line, exists);
        at += DEPTH * line;
        channel += DEPTH;
        if (channel == k) {
            channel = 0;
            at += next_tap;
            if (++b == taps_j) b = 0, at += next_row;
        }
    }
};
