// Pooling of images [n, h, w, c], channels last; see src/ops/pool.
//
// Launch of every kernel: a thread computes one 16-byte vector of channels of one pixel of the output (y, or
// dx), so with
//     vectors = ceil(c / 4) for f32, ceil(c / 8) for bf16        x = min(next power of two >= vectors, 32)
//     block = (x, 256 / x, 1)        grid = (ceil(pixels / block.y), ceil(vectors / x), 1)
// where pixels are n p q for max_pool and avg_pool, n h w for the three backward kernels, n for mean_pool.
// No shared memory, no workspace. There are fewer than 2^31 pixels. Every output is one thread's sum, in an
// order that the shape alone determines.
#include "vector.cuh"

/// A thread's pixel and channels of the output.
template <typename T>
struct OutputCoord {
    int pixel, channel, count;  // count: how many channels of the vector exist

    __device__ __forceinline__ explicit OutputCoord(int c) {
        pixel = blockIdx.x * blockDim.y + threadIdx.y;
        channel = (blockIdx.y * blockDim.x + threadIdx.x) * PER_VECTOR<T>;
        count = c - channel < PER_VECTOR<T> ? c - channel : PER_VECTOR<T>;
    }
    __device__ __forceinline__ bool exists(int pixels) const { return pixel < pixels && count > 0; }
    /// This thread's first element in a pixel of any tensor with the same number of channels.
    __device__ __forceinline__ int64_t at(int64_t pixel, int c) const { return pixel * c + channel; }
};

/// The windows [begin, end), of `windows` in all with this size and stride, that contain element i of a
/// padded row.
struct Windows {
    int begin, end;

    __device__ __forceinline__ Windows(int i, int size, int stride, int windows) {
        begin = i < size ? 0 : (i - size) / stride + 1;
        end = i / stride + 1 < windows ? i / stride + 1 : windows;
    }
};

/// Stores one byte per channel of a vector, the first `count`.
template <int W>
__device__ __forceinline__ void store_bytes(uint8_t* at, const unsigned (&v)[W], int count) {
    if (count >= W && reinterpret_cast<uintptr_t>(at) % 4 == 0) {
#pragma unroll
        for (int k = 0; k < W; k += 4)
            *reinterpret_cast<unsigned*>(at + k) = v[k] | v[k + 1] << 8 | v[k + 2] << 16 | v[k + 3] << 24;
    } else {
#pragma unroll
        for (int k = 0; k < W; k++)
            if (k < count) at[k] = static_cast<uint8_t>(v[k]);
    }
}
template <int W>
__device__ __forceinline__ void load_bytes(unsigned (&v)[W], const uint8_t* at, int count) {
    if (count >= W && reinterpret_cast<uintptr_t>(at) % 4 == 0) {
#pragma unroll
        for (int k = 0; k < W; k++) v[k] = reinterpret_cast<const unsigned*>(at)[k / 4] >> k % 4 * 8 & 0xff;
    } else {
#pragma unroll
        for (int k = 0; k < W; k++) v[k] = k < count ? at[k] : 0;
    }
}

/// y [n, p, q, c]: the maximum of each size x size window; NaN propagates. index [n, p, q, c], or null if no
/// gradient is needed: the position of the maximum in its window, i size + j counted from the window's
/// corner, padding included; the first of equals. It is a byte, so size <= 16. Every window contains a pixel:
/// 2 pad <= size.
template <typename T>
__device__ __forceinline__ void max_pool(T* y, uint8_t* index, const T* x, int n, int h, int w, int c, int p,
                                         int q, int size, int stride, int pad) {
    constexpr int W = PER_VECTOR<T>;
    OutputCoord<T> coord(c);
    if (!coord.exists(n * p * q)) return;
    int image = coord.pixel / (p * q), o = coord.pixel % (p * q);
    int from_i = o / q * stride - pad, from_j = o % q * stride - pad;
    Vector<T> best;
    unsigned position[W];
    bool first = true;
    for (int a = 0; a < size; a++) {
        for (int b = 0; b < size; b++) {
            int i = from_i + a, j = from_j + b;
            if (i < 0 || i >= h || j < 0 || j >= w) continue;
            Vector<T> v = load_partial(x + coord.at((int64_t{image} * h + i) * w + j, c), coord.count);
#pragma unroll
            for (int k = 0; k < W; k++) {
                if (first || v.v[k] > best.v[k] || v.v[k] != v.v[k]) {
                    best.v[k] = v.v[k];
                    position[k] = a * size + b;
                }
            }
            first = false;
        }
    }
    store_partial(y + coord.at(coord.pixel, c), best, coord.count);
    if (index) store_bytes(index + coord.at(coord.pixel, c), position, coord.count);
}

/// dx [n, h, w, c] from dy [n, p, q, c] and the forward's index.
template <typename T>
__device__ __forceinline__ void max_pool_backward(T* dx, const T* dy, const uint8_t* index, int n, int h,
                                                  int w, int c, int p, int q, int size, int stride, int pad) {
    constexpr int W = PER_VECTOR<T>;
    OutputCoord<T> coord(c);
    if (!coord.exists(n * h * w)) return;
    int image = coord.pixel / (h * w), o = coord.pixel % (h * w);
    int i = o / w + pad, j = o % w + pad;
    Windows rows(i, size, stride, p), columns(j, size, stride, q);
    Vector<T> sum{};
    for (int a = rows.begin; a < rows.end; a++) {
        for (int b = columns.begin; b < columns.end; b++) {
            int64_t at = coord.at((int64_t{image} * p + a) * q + b, c);
            unsigned own = (i - a * stride) * size + j - b * stride, position[W];
            load_bytes(position, index + at, coord.count);
            Vector<T> d = load_partial(dy + at, coord.count);
#pragma unroll
            for (int k = 0; k < W; k++) sum.v[k] += position[k] == own ? d.v[k] : 0.0f;
        }
    }
    store_partial(dx + coord.at(coord.pixel, c), sum, coord.count);
}

/// y [n, c]: the mean over the pixels of each image.
template <typename T>
__device__ __forceinline__ void mean_pool(T* y, const T* x, int n, int pixels, int c) {
    OutputCoord<T> coord(c);
    if (!coord.exists(n)) return;
    x += coord.at(int64_t{coord.pixel} * pixels, c);
    Vector<T> sum{};
    for (int i = 0; i < pixels; i++) {
        Vector<T> v = load_partial(x + int64_t{i} * c, coord.count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) sum.v[k] += v.v[k];
    }
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) sum.v[k] /= static_cast<float>(pixels);
    store_partial(y + coord.at(coord.pixel, c), sum, coord.count);
}

/// dx [n, pixels, c] from dy [n, c].
template <typename T>
__device__ __forceinline__ void mean_pool_backward(T* dx, const T* dy, int n, int pixels, int c) {
    OutputCoord<T> coord(c);
    if (!coord.exists(n * pixels)) return;
    Vector<T> d = load_partial(dy + coord.at(coord.pixel / pixels, c), coord.count);
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) d.v[k] /= static_cast<float>(pixels);
    store_partial(dx + coord.at(coord.pixel, c), d, coord.count);
}

/// The divisor of the mean over window (a, b): all its pixels, or with stride 1 only those that exist.
__device__ __forceinline__ float window_size(int a, int b, int h, int w, int size, int stride) {
    if (stride > 1) return static_cast<float>(size * size);
    int rows = h - a < size ? h - a : size, columns = w - b < size ? w - b : size;
    return static_cast<float>(rows * columns);
}

/// y [n, p, q, c]: means of size x size windows that start at multiples of stride, p = ceil(h / stride), q =
/// ceil(w / stride). Pixels beyond the lower and right edge count as zeros, or with stride 1 not at all.
template <typename T>
__device__ __forceinline__ void avg_pool(T* y, const T* x, int n, int h, int w, int c, int p, int q, int size,
                                         int stride) {
    OutputCoord<T> coord(c);
    if (!coord.exists(n * p * q)) return;
    int image = coord.pixel / (p * q), o = coord.pixel % (p * q);
    int from_i = o / q * stride, from_j = o % q * stride;
    Vector<T> sum{};
    for (int i = from_i; i < from_i + size && i < h; i++) {
        for (int j = from_j; j < from_j + size && j < w; j++) {
            Vector<T> v = load_partial(x + coord.at((int64_t{image} * h + i) * w + j, c), coord.count);
#pragma unroll
            for (int k = 0; k < PER_VECTOR<T>; k++) sum.v[k] += v.v[k];
        }
    }
    float divisor = window_size(from_i, from_j, h, w, size, stride);
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) sum.v[k] /= divisor;
    store_partial(y + coord.at(coord.pixel, c), sum, coord.count);
}

/// dx [n, h, w, c] from dy [n, p, q, c].
template <typename T>
__device__ __forceinline__ void avg_pool_backward(T* dx, const T* dy, int n, int h, int w, int c, int p,
                                                  int q, int size, int stride) {
    OutputCoord<T> coord(c);
    if (!coord.exists(n * h * w)) return;
    int image = coord.pixel / (h * w), o = coord.pixel % (h * w);
    Windows rows(o / w, size, stride, p), columns(o % w, size, stride, q);
    Vector<T> sum{};
    for (int a = rows.begin; a < rows.end; a++) {
        for (int b = columns.begin; b < columns.end; b++) {
            Vector<T> d = load_partial(dy + coord.at((int64_t{image} * p + a) * q + b, c), coord.count);
            float divisor = window_size(a * stride, b * stride, h, w, size, stride);
#pragma unroll
            for (int k = 0; k < PER_VECTOR<T>; k++) sum.v[k] += d.v[k] / divisor;
        }
    }
    store_partial(dx + coord.at(coord.pixel, c), sum, coord.count);
}

KERNEL BOUNDS(256) void max_pool_f32(float* y, uint8_t* index, const float* x, int n, int h, int w, int c,
                                     int p, int q, int size, int stride, int pad) {
    max_pool(y, index, x, n, h, w, c, p, q, size, stride, pad);
}
KERNEL BOUNDS(256) void max_pool_bf16(bf16* y, uint8_t* index, const bf16* x, int n, int h, int w, int c,
                                      int p, int q, int size, int stride, int pad) {
    max_pool(y, index, x, n, h, w, c, p, q, size, stride, pad);
}

KERNEL BOUNDS(256) void max_pool_backward_f32(float* dx, const float* dy, const uint8_t* index, int n, int h,
                                              int w, int c, int p, int q, int size, int stride, int pad) {
    max_pool_backward(dx, dy, index, n, h, w, c, p, q, size, stride, pad);
}
KERNEL BOUNDS(256) void max_pool_backward_bf16(bf16* dx, const bf16* dy, const uint8_t* index, int n, int h,
                                               int w, int c, int p, int q, int size, int stride, int pad) {
    max_pool_backward(dx, dy, index, n, h, w, c, p, q, size, stride, pad);
}

/// `pixels` is h w.
KERNEL BOUNDS(256) void mean_pool_f32(float* y, const float* x, int n, int pixels, int c) {
    mean_pool(y, x, n, pixels, c);
}
KERNEL BOUNDS(256) void mean_pool_bf16(bf16* y, const bf16* x, int n, int pixels, int c) {
    mean_pool(y, x, n, pixels, c);
}

KERNEL BOUNDS(256) void mean_pool_backward_f32(float* dx, const float* dy, int n, int pixels, int c) {
    mean_pool_backward(dx, dy, n, pixels, c);
}
KERNEL BOUNDS(256) void mean_pool_backward_bf16(bf16* dx, const bf16* dy, int n, int pixels, int c) {
    mean_pool_backward(dx, dy, n, pixels, c);
}

KERNEL BOUNDS(256) void avg_pool_f32(float* y, const float* x, int n, int h, int w, int c, int p, int q,
                                     int size, int stride) {
    avg_pool(y, x, n, h, w, c, p, q, size, stride);
}
KERNEL BOUNDS(256) void avg_pool_bf16(bf16* y, const bf16* x, int n, int h, int w, int c, int p, int q,
                                      int size, int stride) {
    avg_pool(y, x, n, h, w, c, p, q, size, stride);
}

KERNEL BOUNDS(256) void avg_pool_backward_f32(float* dx, const float* dy, int n, int h, int w, int c, int p,
                                              int q, int size, int stride) {
    avg_pool_backward(dx, dy, n, h, w, c, p, q, size, stride);
}
// Without the 5, nvcc 13.0 takes 58 registers, and the occupancy is four blocks.
KERNEL BOUNDS(256, 5) void avg_pool_backward_bf16(bf16* dx, const bf16* dy, int n, int h, int w, int c, int p,
                                                  int q, int size, int stride) {
    avg_pool_backward(dx, dy, n, h, w, c, p, q, size, stride);
}
