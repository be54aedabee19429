// Convolution of images x [n, h, w, c] with filters [k, r, s, c] into y [n, p, q, k]; see src/ops/conv2d.
// Three directions, each an implicit GEMM: one operand, the patch matrix (im2col) of an image, is never in
// memory but addressed while it is read:
//
//     conv2d                  y [n p q, k] = patches of x, filters
//     conv2d_data_gradient    dx [pixels of a phase, c] = patches of dy, filters of the phase's taps
//     conv2d_weight_gradient  dw [k, r s c] = dy, patches of x; the sum runs over n p q
//
// A stride of d makes d d phases of the data gradient: pixels (i, j) of one phase have the same i % d and j %
// d, so the same taps reach them, and no zero is multiplied. A 1x1 convolution of stride 1 is a plain GEMM,
// by matmul.cu.
//
// The host's table of tile shapes chooses the tile and the split-K of a weight gradient. A kernel requires,
// in addition to pointers that are multiples of 16:
//
//     bf16_256x64, 128x128, 128x64, 64x128
//                                    r and s at most 8, an image of at most 2^24 elements, c a multiple of 8;
//                                    the weight gradient: k a multiple of 8, an x of less than 2^31 pieces of
//                                    8 channels (bf16_stem: of 4); the data gradient: k a multiple of 32
//     bf16_stem (128x64, 64x128)     the same, but c a multiple of 4: images of four channels
//     bf16_64x64, f32 (64x64)        nothing, not even aligned pointers
//
// Blocks of (128, 1, 1) for bf16 and (256, 1, 1) for f32. Dynamic shared memory: 61,440 bytes for
// bf16_256x64, none for the others. Grids, the tile M x N:
//
//     conv2d                  (ceil(n p q / M) ceil(k / N), 1, 1)
//     conv2d_data_gradient    (ceil(n ceil(h / stride) ceil(w / stride) / M) ceil(c / N), 1, stride stride)
//     conv2d_weight_gradient  (ceil(k / M) ceil(r s c / N), 1, splits of pixels_per_split, a multiple of 32)
//
// With one split, `out` of the weight gradient is dw, and accumulate != 0 adds to it. With more, `out` is a
// workspace f32 [splits, k, r, s, c], accumulate is 0, and split_k_reduce_f32(dw, out, splits, k r s c,
// accumulate) of matmul.cu follows.
//
// Arguments: output, inputs, the eleven sizes in the order of Conv2dDims, then what the direction needs.
// `accumulate` != 0 of the data gradient adds to what dx holds. `moments` of conv2d in bf16, unless null,
// gets mean and sum of squared deviations of each channel of y for every M rows, [ceil(n p q / M), 2, k]: a
// batch norm's statistics without reading y. n h w, n p q, and the elements of one image and of the filters,
// are below 2^31. bf16: all operands bf16, accumulators f32, y and dx bf16, dw f32. f32: f32 throughout.
#include "conv_operands.cuh"

using Small = Tile64x64;
static_assert(Tile128x128::THREADS == 128 && Tile128x64::THREADS == 128 && Tile64x128::THREADS == 128 &&
                  Tile256x64::THREADS == 128 && Small::THREADS == 128 && TileF32::THREADS == 256,
              "as in BOUNDS below");
static_assert(Tile256x64::BYTES == 61440, "what the launch gives");

__device__ __forceinline__ PatchGeometry patches_of_x(const Dims& d) {
    return {.n = d.n,
            .height = d.h,
            .width = d.w,
            .channels = d.c,
            .out_i = d.p,
            .out_j = d.q,
            .taps_i = d.r,
            .taps_j = d.s,
            .stride = d.stride,
            .origin_i = -d.pad,
            .origin_j = -d.pad,
            .tap_step = 1};
}

/// y [n, p, q, k]
template <typename Tile, int ALIGNMENT>
__device__ __forceinline__ void conv2d(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                       const Dims& d) {
    PatchGeometry g = patches_of_x(d);
    typename Tile::TileCoord coord(d.k);
    KMajorPatches<Tile::M, Tile::THREADS, ALIGNMENT> a(x, g, coord.row);
    KMajorOperand<Tile::N, Tile::THREADS, ALIGNMENT> b(filters, g.columns(), coord.column, d.k, 0,
                                                       g.columns());
    Tile::template gemm<true>(a, b, k_tiles_of(g.columns()), coord, g.rows(), d.k,
                              {.out_bf16 = y, .moments = moments}, DenseRows{d.k});
}

__device__ __forceinline__ void conv2d_small(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                             const Dims& d) {
    PatchSource<bf16> a(x, patches_of_x(d));
    MatrixSource<bf16> b(filters, d.k, a.columns);
    Small::TileCoord coord(d.k);
    Small::gemm<true>(GatheredOperand<PatchSource<bf16>, Small::M, Small::THREADS, true>(a, coord.row, 0),
                      GatheredOperand<MatrixSource<bf16>, Small::N, Small::THREADS, true>(b, coord.column, 0),
                      k_tiles_of(a.columns), coord, a.rows, d.k, {.out_bf16 = y, .moments = moments},
                      DenseRows{d.k});
}

/// The pixels (phase_i + a stride, phase_j + b stride) of dx. Pixel i is reached from p = (i + pad - r) /
/// stride if that has no remainder: with i = phase + stride a and r = r0 + stride t, r0 = (phase + pad) %
/// stride, from p = a + (phase + pad) / stride - t.
struct Phase {
    int phase_i, phase_j, rows, columns, r0, s0;
    PatchGeometry g;

    __device__ __forceinline__ Phase(const Dims& d, int z) {
        phase_i = z / d.stride, phase_j = z % d.stride;
        rows = (d.h - phase_i + d.stride - 1) / d.stride, columns = (d.w - phase_j + d.stride - 1) / d.stride;
        r0 = (phase_i + d.pad) % d.stride, s0 = (phase_j + d.pad) % d.stride;
        int taps_i = r0 < d.r ? (d.r - r0 + d.stride - 1) / d.stride : 0;
        int taps_j = s0 < d.s ? (d.s - s0 + d.stride - 1) / d.stride : 0;
        g = {.n = d.n,
             .height = d.p,
             .width = d.q,
             .channels = d.k,
             .out_i = rows,
             .out_j = columns,
             .taps_i = taps_i,
             .taps_j = taps_j,
             .stride = 1,
             .origin_i = (phase_i + d.pad) / d.stride,
             .origin_j = (phase_j + d.pad) / d.stride,
             .tap_step = -1};
    }
};

/// The rows of dx that are a phase's pixels.
struct LocatedPhaseRows {
    const Dims& d;
    int phase_i, phase_j;
    FastDivisor per_image, per_row;

    __device__ __forceinline__ LocatedPhaseRows(const Dims& d, const Phase& phase)
        : d(d),
          phase_i(phase.phase_i),
          phase_j(phase.phase_j),
          per_image(phase.rows * phase.columns),
          per_row(phase.columns) {}
    /// With one phase, the rows are all the pixels.
    __device__ __forceinline__ bool is_dense() const { return d.stride == 1; }
    __device__ __forceinline__ int64_t distance(int count) const { return int64_t{count} * d.c; }
    __device__ __forceinline__ int64_t offset(int at) const {
        if (is_dense()) return int64_t{at} * d.c;
        int image = per_image.quotient(at), pixel = at - image * per_image.divisor,
            row = per_row.quotient(pixel);
        int i = phase_i + row * d.stride, j = phase_j + (pixel - row * per_row.divisor) * d.stride;
        return ((int64_t{image} * d.h + i) * d.w + j) * d.c;
    }
};

/// The same, located when the main loop, which needs the registers, is over.
struct PhaseRows {
    const Dims& d;
    __device__ __forceinline__ LocatedPhaseRows after_main_loop() const {
        return {d, Phase(d, block_z_again())};
    }
};

/// Whether any tap reaches the pixels of the phase; if not, their gradient is zero and is stored here. Three
/// of the four phases of a 1x1 convolution of stride 2 have no taps.
template <typename Tile>
__device__ __forceinline__ bool has_taps(const Phase& phase, typename Tile::TileCoord coord, const Dims& d,
                                         bf16* dx, bool accumulate) {
    if (phase.g.columns() > 0) return true;
    if (!accumulate) Tile::clear(coord, phase.g.rows(), d.c, dx, LocatedPhaseRows(d, phase));
    return false;
}

/// dx [n, h, w, c], the pixels of phase blockIdx.z.
template <typename Tile>
__device__ __forceinline__ void conv2d_data_gradient(bf16* dx, const bf16* dy, const bf16* filters,
                                                     const Dims& d, bool accumulate) {
    Phase phase(d, blockIdx.z);
    typename Tile::TileCoord coord(d.c);
    if (coord.row >= phase.g.rows()) return;  // a phase may have fewer pixels than the first
    if (!has_taps<Tile>(phase, coord, d, dx, accumulate)) return;
    KMajorPatches<Tile::M, Tile::THREADS> a(dy, phase.g, coord.row);
    MnMajorFilters<Tile::N, Tile::THREADS> b(filters, d, phase.r0, phase.s0, phase.g.taps_j, coord.column);
    Tile::template gemm<false>(a, b, k_tiles_of(phase.g.columns()), coord, phase.g.rows(), d.c,
                               {.out_bf16 = dx, .accumulate = accumulate}, PhaseRows{d});
}

__device__ __forceinline__ void conv2d_data_gradient_small(bf16* dx, const bf16* dy, const bf16* filters,
                                                           const Dims& d, bool accumulate) {
    Phase phase(d, blockIdx.z);
    Small::TileCoord coord(d.c);
    if (coord.row >= phase.g.rows()) return;
    if (!has_taps<Small>(phase, coord, d, dx, accumulate)) return;
    PatchSource<bf16> a(dy, phase.g);
    FilterSource<bf16> b(filters, d, phase.r0, phase.s0, phase.g.taps_i, phase.g.taps_j);
    Small::gemm<false>(
        GatheredOperand<PatchSource<bf16>, Small::M, Small::THREADS, true>(a, coord.row, 0),
        GatheredOperand<FilterSource<bf16>, Small::N, Small::THREADS, false>(b, coord.column, 0),
        k_tiles_of(a.columns), coord, a.rows, d.c, {.out_bf16 = dx, .accumulate = accumulate}, PhaseRows{d});
}

/// out [splits, k, r, s, c], the sums over the pixels of split blockIdx.z.
template <typename Tile, int ALIGNMENT>
__device__ __forceinline__ void conv2d_weight_gradient(float* out, const bf16* x, const bf16* dy,
                                                       const Dims& d, int pixels_per_split, bool accumulate) {
    PatchGeometry g = patches_of_x(d);
    const int columns = g.columns();
    KSplit split(g.rows(), pixels_per_split);
    typename Tile::TileCoord coord(columns);
    MnMajorOperand<Tile::M, Tile::THREADS> a(dy, d.k, coord.row, d.k, split.begin, split.end);
    MnMajorPatches<Tile::N, Tile::THREADS, ALIGNMENT> b(x, g, coord.column, split.begin, split.end);
    out += int64_t{blockIdx.z} * d.k * columns;
    Tile::template gemm<false>(a, b, k_tiles_of(split.end - split.begin), coord, d.k, columns,
                               {.out_f32 = out, .accumulate = accumulate}, DenseRows{columns});
}

__device__ __forceinline__ void conv2d_weight_gradient_small(float* out, const bf16* x, const bf16* dy,
                                                             const Dims& d, int pixels_per_split,
                                                             bool accumulate) {
    PatchSource<bf16> b(x, patches_of_x(d));
    MatrixSource<bf16> a(dy, b.rows, d.k);
    KSplit split(b.rows, pixels_per_split);
    Small::TileCoord coord(b.columns);
    out += int64_t{blockIdx.z} * d.k * b.columns;
    Small::gemm<false>(
        GatheredOperand<MatrixSource<bf16>, Small::M, Small::THREADS, false>(a, coord.row, split.begin),
        GatheredOperand<PatchSource<bf16>, Small::N, Small::THREADS, false>(b, coord.column, split.begin),
        k_tiles_of(split.end - split.begin), coord, d.k, b.columns,
        {.out_f32 = out, .accumulate = accumulate}, DenseRows{b.columns});
}

KERNEL BOUNDS(128, 2) void conv2d_bf16_128x128(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                               int n, int h, int w, int c, int k, int r, int s, int p, int q,
                                               int stride, int pad) {
    conv2d<Tile128x128, 8>(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}
KERNEL BOUNDS(128, 2) void conv2d_bf16_256x64(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                              int n, int h, int w, int c, int k, int r, int s, int p, int q,
                                              int stride, int pad) {
    conv2d<Tile256x64, 8>(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}
KERNEL BOUNDS(128, 2) void conv2d_bf16_128x64(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                              int n, int h, int w, int c, int k, int r, int s, int p, int q,
                                              int stride, int pad) {
    conv2d<Tile128x64, 8>(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}
KERNEL BOUNDS(128, 2) void conv2d_bf16_stem(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                            int n, int h, int w, int c, int k, int r, int s, int p, int q,
                                            int stride, int pad) {
    conv2d<Tile128x64, 4>(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}
KERNEL BOUNDS(128) void conv2d_bf16_64x64(bf16* y, float* moments, const bf16* x, const bf16* filters, int n,
                                          int h, int w, int c, int k, int r, int s, int p, int q, int stride,
                                          int pad) {
    conv2d_small(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
}

KERNEL BOUNDS(128, 2) void conv2d_data_gradient_bf16_128x128(bf16* dx, const bf16* dy, const bf16* filters,
                                                             int n, int h, int w, int c, int k, int r, int s,
                                                             int p, int q, int stride, int pad,
                                                             int accumulate) {
    conv2d_data_gradient<Tile128x128>(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                      accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_data_gradient_bf16_256x64(bf16* dx, const bf16* dy, const bf16* filters,
                                                            int n, int h, int w, int c, int k, int r, int s,
                                                            int p, int q, int stride, int pad,
                                                            int accumulate) {
    conv2d_data_gradient<Tile256x64>(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                     accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_data_gradient_bf16_128x64(bf16* dx, const bf16* dy, const bf16* filters,
                                                            int n, int h, int w, int c, int k, int r, int s,
                                                            int p, int q, int stride, int pad,
                                                            int accumulate) {
    conv2d_data_gradient<Tile128x64>(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                     accumulate);
}
KERNEL BOUNDS(128) void conv2d_data_gradient_bf16_64x64(bf16* dx, const bf16* dy, const bf16* filters, int n,
                                                        int h, int w, int c, int k, int r, int s, int p,
                                                        int q, int stride, int pad, int accumulate) {
    conv2d_data_gradient_small(dx, dy, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, accumulate);
}

KERNEL BOUNDS(128, 2) void conv2d_weight_gradient_bf16_128x128(float* out, const bf16* x, const bf16* dy,
                                                               int n, int h, int w, int c, int k, int r,
                                                               int s, int p, int q, int stride, int pad,
                                                               int pixels_per_split, int accumulate) {
    conv2d_weight_gradient<Tile128x128, 8>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                           pixels_per_split, accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_weight_gradient_bf16_64x128(float* out, const bf16* x, const bf16* dy,
                                                              int n, int h, int w, int c, int k, int r, int s,
                                                              int p, int q, int stride, int pad,
                                                              int pixels_per_split, int accumulate) {
    conv2d_weight_gradient<Tile64x128, 8>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                          pixels_per_split, accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_weight_gradient_bf16_stem(float* out, const bf16* x, const bf16* dy, int n,
                                                            int h, int w, int c, int k, int r, int s, int p,
                                                            int q, int stride, int pad, int pixels_per_split,
                                                            int accumulate) {
    conv2d_weight_gradient<Tile64x128, 4>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                          pixels_per_split, accumulate);
}
KERNEL BOUNDS(128) void conv2d_weight_gradient_bf16_64x64(float* out, const bf16* x, const bf16* dy, int n,
                                                          int h, int w, int c, int k, int r, int s, int p,
                                                          int q, int stride, int pad, int pixels_per_split,
                                                          int accumulate) {
    conv2d_weight_gradient_small(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, pixels_per_split,
                                 accumulate);
}

KERNEL BOUNDS(256) void conv2d_f32(float* y, const float* x, const float* filters, int n, int h, int w, int c,
                                   int k, int r, int s, int p, int q, int stride, int pad) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    PatchSource<float> a(x, patches_of_x(d));
    MatrixSource<float> b(filters, d.k, a.columns);
    TileF32::gemm<true, true>(a, b, a.rows, d.k, 0, a.columns, /*bias=*/nullptr, /*accumulate=*/false,
                              [&](int i) { return y + int64_t{i} * d.k; });
}
// Without the 3, nvcc 13.0 spills a register for sm_80.
KERNEL BOUNDS(256, 3) void conv2d_data_gradient_f32(float* dx, const float* dy, const float* filters, int n,
                                                    int h, int w, int c, int k, int r, int s, int p, int q,
                                                    int stride, int pad, int accumulate) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    Phase phase(d, blockIdx.z);
    if (phase.g.rows() == 0) return;
    PatchSource<float> a(dy, phase.g);
    FilterSource<float> b(filters, d, phase.r0, phase.s0, phase.g.taps_i, phase.g.taps_j);
    LocatedPhaseRows rows(d, phase);
    TileF32::gemm<true, false>(a, b, a.rows, d.c, 0, a.columns, /*bias=*/nullptr, accumulate,
                               [&](int i) { return dx + rows.offset(i); });
}
KERNEL BOUNDS(256) void conv2d_weight_gradient_f32(float* out, const float* x, const float* dy, int n, int h,
                                                   int w, int c, int k, int r, int s, int p, int q,
                                                   int stride, int pad, int pixels_per_split,
                                                   int accumulate) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    PatchSource<float> b(x, patches_of_x(d));
    MatrixSource<float> a(dy, b.rows, d.k);
    KSplit split(b.rows, pixels_per_split);
    out += int64_t{blockIdx.z} * d.k * b.columns;
    TileF32::gemm<false, false>(a, b, d.k, b.columns, split.begin, split.end, /*bias=*/nullptr, accumulate,
                                [&](int i) { return out + int64_t{i} * b.columns; });
}
