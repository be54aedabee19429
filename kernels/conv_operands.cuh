// The operands of convolutions as implicit GEMMs. First what their kernels share; then the sources that are
// gathered element by element (see gather.cuh); last the operands of gemm_tile.cuh that advance their
// addresses from step to step, and so need neither a division nor a multiplication in the main loop.
#pragma once

#include "gather.cuh"
#include "gemm_operands.cuh"

/// The sizes, as Conv2dDims.
struct Dims {
    int n, h, w, c, k, r, s, p, q, stride, pad;
};

/// Division of numbers below 2^31 by an invariant divisor above 0, as a multiplication (Granlund and
/// Montgomery 1994).
struct FastDivisor {
    int divisor, shift;
    unsigned factor;

    __device__ __forceinline__ explicit FastDivisor(int divisor) : divisor(divisor) {
        shift = 31 - __clz(divisor - 1);  // ceil(log2 divisor) - 1
        factor = static_cast<unsigned>(((uint64_t{1} << (shift + 32)) + divisor - 1) / divisor);
    }
    __device__ __forceinline__ int quotient(int x) const {
        return divisor == 1 ? x : static_cast<int>(__umulhi(static_cast<unsigned>(x), factor) >> shift);
    }
};

/// A coordinate outside of every image, also after a tap is added.
constexpr int OUTSIDE = -(1 << 30);

/// Filters [k, r, s, c] as a matrix [taps k, c], with the taps (r0 + a stride, s0 + b stride).
template <typename T>
struct FilterSource : MatrixSource<T> {
    int r, s, r0, s0, stride;
    FastDivisor per_tap, per_tap_row;

    __device__ __forceinline__ FilterSource(const T* data, const Dims& d, int r0, int s0, int taps_i,
                                            int taps_j)
        : MatrixSource<T>(data, taps_i * taps_j * d.k, d.c),
          r(d.r),
          s(d.s),
          r0(r0),
          s0(s0),
          stride(d.stride),
          per_tap(d.k),
          per_tap_row(taps_j > 0 ? taps_j : 1) {}
    __device__ __forceinline__ int64_t row(int i) const {
        if (i >= this->rows) return -1;
        int tap = per_tap.quotient(i), k = i - tap * per_tap.divisor;
        int a = per_tap_row.quotient(tap), b = tap - a * per_tap_row.divisor;
        return int64_t{(k * r + r0 + a * stride) * s + s0 + b * stride} * this->columns;
    }
};

/// The patch matrix (im2col) of images [n, height, width, channels]: the row of output pixel (image, i, j),
/// with `out_i` x `out_j` of them to an image, holds, for each tap (a, b) of `taps_i` x `taps_j`, the
/// channels of input pixel (i stride + origin_i + a tap_step, j stride + origin_j + b tap_step).
struct PatchGeometry {
    int n, height, width, channels, out_i, out_j, taps_i, taps_j, stride, origin_i, origin_j, tap_step;

    __device__ __forceinline__ int rows() const { return n * out_i * out_j; }
    __device__ __forceinline__ int columns() const { return taps_i * taps_j * channels; }
};

/// The patch matrix, gathered; any size.
template <typename T>
struct PatchSource {
    using Element = T;
    struct Row {
        int64_t offset;
        int i, j;
    };
    struct Column {
        int offset, i, j;
    };
    const T* data;
    int rows, columns, alignment;
    PatchGeometry g;
    FastDivisor per_image, per_row, per_tap, per_tap_row;

    __device__ __forceinline__ PatchSource(const T* data, const PatchGeometry& g)
        : data(data),
          rows(g.rows()),
          columns(g.columns()),
          alignment(alignment_of(data, g.channels)),
          g(g),
          per_image(g.out_i * g.out_j),
          per_row(g.out_j),
          per_tap(g.channels),
          per_tap_row(g.taps_j > 0 ? g.taps_j : 1) {}
    __device__ __forceinline__ Row row(int at) const {
        if (at >= rows) return {0, OUTSIDE, OUTSIDE};
        int image = per_image.quotient(at), pixel = at - image * per_image.divisor,
            out_i = per_row.quotient(pixel);
        int i = out_i * g.stride + g.origin_i, j = (pixel - out_i * per_row.divisor) * g.stride + g.origin_j;
        return {((int64_t{image} * g.height + i) * g.width + j) * g.channels, i, j};
    }
    __device__ __forceinline__ Column column(int at) const {
        if (at >= columns) return {0, OUTSIDE, OUTSIDE};
        int tap = per_tap.quotient(at), a = per_tap_row.quotient(tap);
        int i = a * g.tap_step, j = (tap - a * per_tap_row.divisor) * g.tap_step;
        return {(i * g.width + j) * g.channels + at - tap * g.channels, i, j};
    }
    __device__ __forceinline__ const T* at(const Row& row, const Column& column) const {
        // Unsigned: a negative coordinate is too large as well.
        bool inside = static_cast<unsigned>(row.i + column.i) < static_cast<unsigned>(g.height) &&
                      static_cast<unsigned>(row.j + column.j) < static_cast<unsigned>(g.width);
        return inside ? data + row.offset + column.offset : nullptr;
    }
};

/// The patch matrix as a K-major operand: the tile has EXTENT of its rows, k runs over taps and channels. At
/// most eight taps in either direction, channels a multiple of ALIGNMENT, and at most 2^24 elements per
/// image, so that offsets within 128 images fit in 31 bits.
///
/// Which taps of a row lie inside of the image is computed once, before the main loop: one predicate bit for
/// each row of taps and one for each column.
template <int EXTENT, int THREADS, int ALIGNMENT = 8>
struct KMajorPatches {
    /// Bit t for each of the taps at + t step, a step of 1 or -1, that lies in [0, extent).
    __device__ __forceinline__ static unsigned taps_inside(int at, int step, int taps, int extent) {
        int from = step > 0 ? -at : at - extent + 1, to = from + extent;
        return (1u << min(max(to, 0), taps)) - (1u << min(max(from, 0), taps));
    }

    static constexpr bool K_MAJOR = true;
    using Map = CopyMap<EXTENT, THREADS, ALIGNMENT, true>;

    const int first_chunk = kept(Map::first_chunk());
    const bf16* at;         // in the image of the tile's first row: this thread's chunk of the step
    int rows[Map::COPIES];  // offset from there to the pixel under tap (0, 0)
    // Bit a: row a of taps is outside of the image; bit 16 + b: column b.
    unsigned outside[Map::COPIES];
    unsigned tap_i, tap_j, end_j;  // those bits for the tap of the step; the bit after the last column's
    int channels, channel, next_tap, next_tap_row;

    __device__ __forceinline__ KMajorPatches(const bf16* data, const PatchGeometry& g, int first)
        : tap_i(1), tap_j(1 << 16), end_j(1 << (16 + g.taps_j)), channels(g.channels) {
        FastDivisor per_image(g.out_i * g.out_j), per_row(g.out_j);
        const int first_image = per_image.quotient(first);
        at = data + int64_t{first_image} * g.height * g.width * g.channels + Map::column();
#pragma unroll
        for (int l = 0; l < Map::COPIES; l++) {
            int row = first + Map::row(l), of_image = per_image.quotient(row),
                pixel = row - of_image * per_image.divisor;
            int out_i = per_row.quotient(pixel), i = out_i * g.stride + g.origin_i,
                j = (pixel - out_i * per_row.divisor) * g.stride + g.origin_j;
            rows[l] = (((of_image - first_image) * g.height + i) * g.width + j) * g.channels;
            unsigned inside = taps_inside(i, g.tap_step, g.taps_i, g.height) |
                              taps_inside(j, g.tap_step, g.taps_j, g.width) << 16;
            outside[l] = row < g.rows() ? ~inside : ~0u;
        }
        // Offsets from the end of one tap's channels to the start of the next tap's, and from the end of a
        // row of taps to the next row.
        next_tap = (g.tap_step - 1) * g.channels;
        next_tap_row = (g.width - g.taps_j) * g.tap_step * g.channels;
        channel = Map::column();
        advance_tap();
    }

    /// Moves to the tap that `channel` has reached.
    __device__ __forceinline__ void advance_tap() {
        while (channel >= channels) {
            channel -= channels;
            at += next_tap;
            tap_j <<= 1;
            if (tap_j == end_j) tap_j = 1 << 16, tap_i <<= 1, at += next_tap_row;
        }
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
#pragma unroll
        for (int l = 0; l < Map::COPIES; l++)
            Map::copy_async(smem, first_chunk, l, add_offset(at, rows[l]), !(outside[l] & (tap_i | tap_j)),
                            active);
        channel += TILE_K;
        at += TILE_K;
        advance_tap();
    }
};

/// The patch matrix as an MN-major operand: the tile has EXTENT of its columns, taps and channels; k runs
/// over its rows, the output pixels [k_begin, k_end). A thread's columns belong to one tap, and each step
/// moves its pixels by the same number of images, rows and columns. Offsets count chunks of ALIGNMENT
/// elements: images of up to 2^31 of them.
template <int EXTENT, int THREADS, int ALIGNMENT = 8>
struct MnMajorPatches {
    static constexpr bool K_MAJOR = false;
    using Map = CopyMap<EXTENT, THREADS, ALIGNMENT, false>;

    struct Chunk {
        bf16 elements[ALIGNMENT];
    };
    const int first_chunk = kept(Map::first_chunk());
    const Chunk* chunks;
    int rows[Map::COPIES], is[Map::COPIES], js[Map::COPIES];
    int height, width, stride, end_i, end_j, wrap_i, wrap_j, step_i, step_j, k_left;
    int step_offset, wrap_i_offset, wrap_j_offset;

    __device__ __forceinline__ MnMajorPatches(const bf16* data, const PatchGeometry& g, int first,
                                              int k_begin, int k_end)
        : chunks(reinterpret_cast<const Chunk*>(data)), height(g.height), width(g.width), stride(g.stride) {
        const int per_pixel = g.channels / ALIGNMENT;
        int column = first + Map::column(), tap = column / g.channels, a = tap / g.taps_j,
            b = tap - a * g.taps_j;
        int origin_i = g.origin_i + a * g.tap_step, origin_j = g.origin_j + b * g.tap_step;
        k_left = column < g.columns() ? k_end - k_begin - Map::row(0) : 0;
        const int per_image = g.out_i * g.out_j;
#pragma unroll
        for (int l = 0; l < Map::COPIES; l++) {
            int at = k_begin + Map::row(l), image = at / per_image, pixel = at - image * per_image,
                out_i = pixel / g.out_j;
            is[l] = out_i * g.stride + origin_i;
            js[l] = (pixel - out_i * g.out_j) * g.stride + origin_j;
            rows[l] = ((image * g.height + is[l]) * g.width + js[l]) * per_pixel +
                      (column - tap * g.channels) / ALIGNMENT;
        }
        int images = TILE_K / per_image, pixels = TILE_K - images * per_image, out_rows = pixels / g.out_j;
        step_i = out_rows * g.stride;
        step_j = (pixels - out_rows * g.out_j) * g.stride;
        step_offset = ((images * g.height + step_i) * g.width + step_j) * per_pixel;
        // Past the last column, wrap to the next row; past the last row, to the next image.
        wrap_i = g.out_i * g.stride, wrap_j = g.out_j * g.stride;
        end_i = origin_i + wrap_i, end_j = origin_j + wrap_j;
        wrap_j_offset = (g.stride * g.width - wrap_j) * per_pixel;
        wrap_i_offset = (g.height - wrap_i) * g.width * per_pixel;
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
#pragma unroll
        for (int l = 0; l < Map::COPIES; l++) {
            bool inside = static_cast<unsigned>(is[l]) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(js[l]) < static_cast<unsigned>(width);
            Map::copy_async(smem, first_chunk, l, add_offset(chunks, rows[l])->elements,
                            inside && l * Map::ROW_STEP < k_left, active);
            rows[l] += step_offset;
            is[l] += step_i;
            js[l] += step_j;
            if (js[l] >= end_j) js[l] -= wrap_j, is[l] += stride, rows[l] += wrap_j_offset;
            if (is[l] >= end_i) is[l] -= wrap_i, rows[l] += wrap_i_offset;
        }
        k_left -= TILE_K;
    }
};

/// Filters [k, r, s, c] as the MN-major operand [taps k, c]: the tile has EXTENT of its columns; k runs over
/// the taps (r0 + a stride, s0 + b stride) and output channels. The number of output channels is a multiple
/// of 32, so that a step has one tap.
template <int EXTENT, int THREADS>
struct MnMajorFilters {
    static constexpr bool K_MAJOR = false;
    using Map = CopyMap<EXTENT, THREADS, 8, false>;

    const int first_chunk = kept(Map::first_chunk());
    const bf16* data;
    int offset;  // of this thread's chunk of the step; filters have less than 2^31 elements
    int channels, taps_j, channel = 0, b = 0;
    int pitch;  // elements from one output channel's filter to the next
    int next_tap,
        next_tap_row;  // offsets that are added after the last channel of a tap, and of a row of taps
    bool exists;       // this thread's columns

    __device__ __forceinline__ MnMajorFilters(const bf16* data, const Dims& d, int r0, int s0, int taps_j,
                                              int first)
        : data(data), channels(d.k), taps_j(taps_j) {
        pitch = d.r * d.s * d.c;
        offset = Map::row(0) * pitch + (r0 * d.s + s0) * d.c + first + Map::column();
        next_tap = d.stride * d.c - d.k * pitch;
        next_tap_row = d.stride * (d.s - taps_j) * d.c;
        exists = first + Map::column() < d.c;
    }

    __device__ __forceinline__ void copy_async(bf16* smem, bool active) {
        const bf16* from = add_offset(data, offset);
#pragma unroll
        for (int i = 0; i < Map::COPIES; i++)
            Map::copy_async(smem, first_chunk, i, add_offset(from, i * Map::ROW_STEP * pitch), exists,
                            active);
        offset += TILE_K * pitch;
        channel += TILE_K;
        if (channel == channels) {
            channel = 0;
            offset += next_tap;
            if (++b == taps_j) b = 0, offset += next_tap_row;
        }
    }
};
