// Convolution of images x [n, h, w, c] with filters [k, r, s, c] into y [n, p, q, k]; see src/ops/conv2d.
// Three directions, each a matrix product of which one operand, the patches of an image, is not in memory but
// gathered while it is read:
//
//     conv2d                  y [n p q, k] = patches of x, filters
//     conv2d_data_gradient    dx [pixels of a phase, c] = patches of dy, filters of the phase's taps
//     conv2d_weight_gradient  dw [k, r s c] = dy, patches of x; the sum runs over n p q
//
// A stride of d makes d d phases of the data gradient: pixels (i, j) of one phase have the same i % d and j %
// d, so the same taps reach them, and no zero is multiplied. A 1x1 convolution of stride 1 is a plain
// product, of matmul.cu.
//
// Which tile, and into how many slices a weight gradient is cut, is src/ops/tiles.rs's to say. What a kernel
// asks for, beside pointers that are multiples of 16:
//
//     bf16_128x128, 128x64, 64x128   r and s at most 8, an image at most 2^24 elements, c a multiple of 8;
//                                    k of the weight gradient, too, and of the data gradient one of 32
//     bf16_stem (128x64, 64x128)     the same, and of c a multiple of 4: images of four channels
//     bf16_64x64, f32 (64x64)        nothing, nor pointers
//
// Blocks of (128, 1, 1) for bf16 and (256, 1, 1) for f32, no dynamic shared memory. Grids, M x N the tile:
//
//     conv2d                  (ceil(n p q / M) ceil(k / N), 1, 1)
//     conv2d_data_gradient    (ceil(n ceil(h / stride) ceil(w / stride) / M) ceil(c / N), 1, stride stride)
//     conv2d_weight_gradient  (ceil(k / M) ceil(r s c / N), 1, slices of pixels_per_slice, a multiple of 32)
//
// With one slice, `out` of the weight gradient is dw, and accumulate != 0 adds to it. With more, `out` is a
// workspace f32 [slices, k, r, s, c], accumulate is 0, and sum_slices_f32(dw, out, slices, k r s c,
// accumulate) of matmul.cu follows.
//
// Arguments: output, inputs, the eleven sizes in the order of Conv2dDims, then what the direction needs.
// `accumulate` != 0 of the data gradient adds dx to what it holds. `moments` of conv2d in bf16, where not
// null, gets mean and squared deviations of each channel of y for each M rows, [ceil(n p q / M), 2, k]: a
// batch norm's statistics without reading y. n h w, n p q, and the elements of one image and of the filters,
// are below 2^31. bf16: all operands bf16, sums f32, y and dx bf16, dw f32. f32: f32 throughout.
#include "conv_operands.cuh"

using Small = Tile64x64;
static_assert(Tile128x128::THREADS == 128 && Tile128x64::THREADS == 128 && Tile64x128::THREADS == 128 &&
                  Small::THREADS == 128 && TileF32::THREADS == 256,
              "as in BOUNDS below");

__device__ __forceinline__ int steps_of(int depth) { return (depth + DEPTH - 1) / DEPTH; }

__device__ __forceinline__ Geometry patches_of_x(const Dims& d) {
    return {d.n, d.h, d.w, d.c, d.p, d.q, d.r, d.s, d.stride, -d.pad, -d.pad, 1};
}

/// y [n, p, q, k]
template <typename Tile, int RUN>
__device__ __forceinline__ void conv2d(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                       const Dims& d) {
    Geometry g = patches_of_x(d);
    typename Tile::Corner at(d.k);
    PatchLines<Tile::M, Tile::THREADS, RUN> a(x, g, at.row);
    Lines<Tile::N, Tile::THREADS, RUN> b(filters, g.depth(), at.column, d.k, 0, g.depth());
    Tile::template product<true>(a, b, steps_of(g.depth()), at, g.lines(), d.k,
                                 {y, nullptr, nullptr, false, moments},
                                 [&](int i) { return int64_t{i} * d.k; });
}

__device__ __forceinline__ void conv2d_small(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                             const Dims& d) {
    Patches<bf16> a(x, patches_of_x(d));
    Rows<bf16> b(filters, d.k, a.inner);
    Small::Corner at(d.k);
    Small::product<true>(Gathered<Patches<bf16>, Small::M, Small::THREADS, true>(a, at.row, 0),
                         Gathered<Rows<bf16>, Small::N, Small::THREADS, true>(b, at.column, 0),
                         steps_of(a.inner), at, a.lines, d.k, {y, nullptr, nullptr, false, moments},
                         [&](int i) { return int64_t{i} * d.k; });
}

/// The pixels (phase_i + a stride, phase_j + b stride) of dx. Pixel i is reached from p = (i + pad - r) /
/// stride where that has no remainder: with i = phase + stride a and r = r0 + stride t, r0 = (phase + pad) %
/// stride, from p = a + (phase + pad) / stride - t.
struct Phase {
    int phase_i, phase_j, rows, columns, r0, s0;
    Geometry g;

    __device__ __forceinline__ explicit Phase(const Dims& d) {
        phase_i = blockIdx.z / d.stride, phase_j = blockIdx.z % d.stride;
        rows = (d.h - phase_i + d.stride - 1) / d.stride, columns = (d.w - phase_j + d.stride - 1) / d.stride;
        r0 = (phase_i + d.pad) % d.stride, s0 = (phase_j + d.pad) % d.stride;
        int taps_i = r0 < d.r ? (d.r - r0 + d.stride - 1) / d.stride : 0;
        int taps_j = s0 < d.s ? (d.s - s0 + d.stride - 1) / d.stride : 0;
        g = {d.n,
             d.p,
             d.q,
             d.k,
             rows,
             columns,
             taps_i,
             taps_j,
             1,
             (phase_i + d.pad) / d.stride,
             (phase_j + d.pad) / d.stride,
             -1};
    }
};

/// Where row i of a phase lies in dx. Divides, and holds nothing, for registers are short while the sums are
/// made.
struct PhaseRow {
    const Dims& d;
    const Phase& phase;

    __device__ __forceinline__ int64_t operator()(int at) const {
        int per_image = phase.rows * phase.columns, image = at / per_image, o = at - image * per_image;
        int row = o / phase.columns, i = phase.phase_i + row * d.stride,
            j = phase.phase_j + (o - row * phase.columns) * d.stride;
        return ((int64_t{image} * d.h + i) * d.w + j) * d.c;
    }
};

/// dx [n, h, w, c], the pixels of phase blockIdx.z.
template <typename Tile>
__device__ __forceinline__ void conv2d_data_gradient(bf16* dx, const bf16* dy, const bf16* filters,
                                                     const Dims& d, bool accumulate) {
    Phase phase(d);
    typename Tile::Corner at(d.c);
    if (at.row >= phase.g.lines()) return;  // a phase may have fewer pixels than the first
    PatchLines<Tile::M, Tile::THREADS> a(dy, phase.g, at.row);
    TapsAcross<Tile::N, Tile::THREADS> b(filters, d, phase.r0, phase.s0, phase.g.taps_j, at.column);
    Tile::template product<false>(a, b, steps_of(phase.g.depth()), at, phase.g.lines(), d.c,
                                  {dx, nullptr, nullptr, accumulate, nullptr}, PhaseRow{d, phase});
}

__device__ __forceinline__ void conv2d_data_gradient_small(bf16* dx, const bf16* dy, const bf16* filters,
                                                           const Dims& d, bool accumulate) {
    Phase phase(d);
    Small::Corner at(d.c);
    if (at.row >= phase.g.lines()) return;
    Patches<bf16> a(dy, phase.g);
    FilterTaps<bf16> b(filters, d, phase.r0, phase.s0, phase.g.taps_i, phase.g.taps_j);
    Small::product<false>(Gathered<Patches<bf16>, Small::M, Small::THREADS, true>(a, at.row, 0),
                          Gathered<FilterTaps<bf16>, Small::N, Small::THREADS, false>(b, at.column, 0),
                          steps_of(a.inner), at, a.lines, d.c, {dx, nullptr, nullptr, accumulate, nullptr},
                          PhaseRow{d, phase});
}

/// The pixels of slice blockIdx.z.
struct Slice {
    int begin, end;
    __device__ __forceinline__ Slice(int pixels, int pixels_per_slice) {
        begin = blockIdx.z * pixels_per_slice;
        end = pixels - begin < pixels_per_slice ? pixels : begin + pixels_per_slice;
    }
};

/// out [slices, k, r, s, c], the sums over the pixels of slice blockIdx.z.
template <typename Tile, int RUN>
__device__ __forceinline__ void conv2d_weight_gradient(float* out, const bf16* x, const bf16* dy,
                                                       const Dims& d, int pixels_per_slice, bool accumulate) {
    Geometry g = patches_of_x(d);
    const int width = g.depth();
    Slice slice(g.lines(), pixels_per_slice);
    typename Tile::Corner at(width);
    Across<Tile::M, Tile::THREADS> a(dy, d.k, at.row, d.k, slice.begin, slice.end);
    PatchesAcross<Tile::N, Tile::THREADS, RUN> b(x, g, at.column, slice.begin, slice.end);
    out += int64_t{blockIdx.z} * d.k * width;
    Tile::template product<false>(a, b, steps_of(slice.end - slice.begin), at, d.k, width,
                                  {nullptr, out, nullptr, accumulate, nullptr},
                                  [&](int i) { return int64_t{i} * width; });
}

__device__ __forceinline__ void conv2d_weight_gradient_small(float* out, const bf16* x, const bf16* dy,
                                                             const Dims& d, int pixels_per_slice,
                                                             bool accumulate) {
    Patches<bf16> b(x, patches_of_x(d));
    Rows<bf16> a(dy, b.lines, d.k);
    Slice slice(b.lines, pixels_per_slice);
    Small::Corner at(b.inner);
    out += int64_t{blockIdx.z} * d.k * b.inner;
    Small::product<false>(Gathered<Rows<bf16>, Small::M, Small::THREADS, false>(a, at.row, slice.begin),
                          Gathered<Patches<bf16>, Small::N, Small::THREADS, false>(b, at.column, slice.begin),
                          steps_of(slice.end - slice.begin), at, d.k, b.inner,
                          {nullptr, out, nullptr, accumulate, nullptr},
                          [&](int i) { return int64_t{i} * b.inner; });
}

KERNEL BOUNDS(128, 2) void conv2d_bf16_128x128(bf16* y, float* moments, const bf16* x, const bf16* filters,
                                               int n, int h, int w, int c, int k, int r, int s, int p, int q,
                                               int stride, int pad) {
    conv2d<Tile128x128, 8>(y, moments, x, filters, Dims{n, h, w, c, k, r, s, p, q, stride, pad});
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
                                                               int pixels_per_slice, int accumulate) {
    conv2d_weight_gradient<Tile128x128, 8>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                           pixels_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_weight_gradient_bf16_64x128(float* out, const bf16* x, const bf16* dy,
                                                              int n, int h, int w, int c, int k, int r, int s,
                                                              int p, int q, int stride, int pad,
                                                              int pixels_per_slice, int accumulate) {
    conv2d_weight_gradient<Tile64x128, 8>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                          pixels_per_slice, accumulate);
}
KERNEL BOUNDS(128, 2) void conv2d_weight_gradient_bf16_stem(float* out, const bf16* x, const bf16* dy, int n,
                                                            int h, int w, int c, int k, int r, int s, int p,
                                                            int q, int stride, int pad, int pixels_per_slice,
                                                            int accumulate) {
    conv2d_weight_gradient<Tile64x128, 4>(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad},
                                          pixels_per_slice, accumulate);
}
KERNEL BOUNDS(128) void conv2d_weight_gradient_bf16_64x64(float* out, const bf16* x, const bf16* dy, int n,
                                                          int h, int w, int c, int k, int r, int s, int p,
                                                          int q, int stride, int pad, int pixels_per_slice,
                                                          int accumulate) {
    conv2d_weight_gradient_small(out, x, dy, Dims{n, h, w, c, k, r, s, p, q, stride, pad}, pixels_per_slice,
                                 accumulate);
}

KERNEL BOUNDS(256) void conv2d_f32(float* y, const float* x, const float* filters, int n, int h, int w, int c,
                                   int k, int r, int s, int p, int q, int stride, int pad) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    Patches<float> a(x, patches_of_x(d));
    Rows<float> b(filters, d.k, a.inner);
    TileF32::product<true, true>(a, b, a.lines, d.k, 0, a.inner, nullptr, false,
                                 [&](int i) { return y + int64_t{i} * d.k; });
}
// Without the 3, nvcc 13.0 spills a register for sm_80.
KERNEL BOUNDS(256, 3) void conv2d_data_gradient_f32(float* dx, const float* dy, const float* filters, int n,
                                                    int h, int w, int c, int k, int r, int s, int p, int q,
                                                    int stride, int pad, int accumulate) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    Phase phase(d);
    if (phase.g.lines() == 0) return;
    Patches<float> a(dy, phase.g);
    FilterTaps<float> b(filters, d, phase.r0, phase.s0, phase.g.taps_i, phase.g.taps_j);
    PhaseRow row{d, phase};
    TileF32::product<true, false>(a, b, a.lines, d.c, 0, a.inner, nullptr, accumulate,
                                  [&](int i) { return dx + row(i); });
}
KERNEL BOUNDS(256) void conv2d_weight_gradient_f32(float* out, const float* x, const float* dy, int n, int h,
                                                   int w, int c, int k, int r, int s, int p, int q,
                                                   int stride, int pad, int pixels_per_slice,
                                                   int accumulate) {
    Dims d{n, h, w, c, k, r, s, p, q, stride, pad};
    Patches<float> b(x, patches_of_x(d));
    Rows<float> a(dy, b.lines, d.k);
    Slice slice(b.lines, pixels_per_slice);
    out += int64_t{blockIdx.z} * d.k * b.inner;
    TileF32::product<false, false>(a, b, d.k, b.inner, slice.begin, slice.end, nullptr, accumulate,
                                   [&](int i) { return out + int64_t{i} * b.inner; });
}
