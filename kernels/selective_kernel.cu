// Selective kernels: attention over two streams of channels, x [n, pixels, 2c]; see src/ops/selective_kernel.
// Means, logits and their gradients have the type of x.
//
// Block (32, 8): threadIdx.x is a vector of 16 bytes of channels, threadIdx.y every eighth pixel. Grid (c /
// vector / 32 rounded up, n), n < 65536. Sums are f64, over the pixels of a thread and then over the eight
// threads, in order. No dynamic shared memory.
#include "vector.cuh"

constexpr int THREADS = 256, THREADS_X = 32, THREADS_Y = 8;

/// A thread's channels, and the start of its image.
template <typename T>
struct Channels {
    int first, count;  // first channel, and how many of the vector exist; may be <= 0
    int64_t image;     // its first pixel

    __device__ __forceinline__ Channels(int64_t pixels, int c) {
        first = (blockIdx.x * THREADS_X + threadIdx.x) * PER_VECTOR<T>;
        count = c - first < PER_VECTOR<T> ? c - first : PER_VECTOR<T>;
        image = blockIdx.y * pixels;
    }
};

/// Adds up over threadIdx.y; the threads with threadIdx.y = 0 get the sums.
template <int W>
__device__ __forceinline__ void sum_over_y(double (&sums)[W]) {
    __shared__ double shared[THREADS * W];
    int slot = (threadIdx.y * THREADS_X + threadIdx.x) * W;
#pragma unroll
    for (int k = 0; k < W; k++) shared[slot + k] = sums[k];
    __syncthreads();
    if (threadIdx.y > 0) return;
    for (int y = 1; y < THREADS_Y; y++)
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] += shared[slot + y * THREADS_X * W + k];
}

/// g [n, c]: the mean over pixels of the sum of both streams.
template <typename T>
__device__ __forceinline__ void mean(T* g, const T* x, int64_t pixels, int c) {
    constexpr int W = PER_VECTOR<T>;
    Channels<T> at(pixels, c);
    double sums[W] = {};
    for (int64_t p = threadIdx.y; p < pixels && at.count > 0; p += THREADS_Y) {
        const T* pixel = x + (at.image + p) * 2 * c + at.first;
        Vector<T> u = load_partial(pixel, at.count), v = load_partial(pixel + c, at.count);
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] += static_cast<double>(u.v[k]) + v.v[k];
    }
    sum_over_y(sums);
    if (threadIdx.y > 0) return;
    Vector<T> result;
#pragma unroll
    for (int k = 0; k < W; k++) result.v[k] = static_cast<float>(sums[k] / pixels);
    store_partial(g + int64_t{blockIdx.y} * c + at.first, result, at.count);
}

/// dx = dg / pixels, in both streams.
template <typename T>
__device__ __forceinline__ void mean_backward(T* dx, const T* dg, int64_t pixels, int c) {
    constexpr int W = PER_VECTOR<T>;
    Channels<T> at(pixels, c);
    if (at.count <= 0) return;
    Vector<T> d = load_partial(dg + int64_t{blockIdx.y} * c + at.first, at.count);
    float inverse = 1.0f / static_cast<float>(pixels);
#pragma unroll
    for (int k = 0; k < W; k++) d.v[k] *= inverse;
    for (int64_t p = threadIdx.y; p < pixels; p += THREADS_Y) {
#pragma unroll
        for (int stream = 0; stream < 2; stream++) {
            T* to = dx + (at.image + p) * 2 * c + stream * c + at.first;
            store_partial(to, d, at.count);
        }
    }
}

/// The weight of stream 0, from logits [n, 2c].
template <typename T>
__device__ __forceinline__ Vector<T> weights(const T* logits, int c, const Channels<T>& at) {
    const T* own = logits + int64_t{blockIdx.y} * 2 * c + at.first;
    Vector<T> a = load_partial(own, at.count), b = load_partial(own + c, at.count);
#pragma unroll
    for (int k = 0; k < PER_VECTOR<T>; k++) a.v[k] = 1.0f / (1.0f + expf(b.v[k] - a.v[k]));
    return a;
}

/// y [n, pixels, c] = a x_0 + (1 - a) x_1.
template <typename T>
__device__ __forceinline__ void select(T* y, const T* x, const T* logits, int64_t pixels, int c) {
    Channels<T> at(pixels, c);
    if (at.count <= 0) return;
    Vector<T> a = weights(logits, c, at);
    for (int64_t p = threadIdx.y; p < pixels; p += THREADS_Y) {
        const T* pixel = x + (at.image + p) * 2 * c + at.first;
        Vector<T> u = load_partial(pixel, at.count), v = load_partial(pixel + c, at.count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) u.v[k] = a.v[k] * u.v[k] + (1.0f - a.v[k]) * v.v[k];
        store_partial(y + (at.image + p) * c + at.first, u, at.count);
    }
}

/// dx and dlogits, each unless null.
template <typename T>
__device__ __forceinline__ void select_backward(T* dx, T* dlogits, const T* dy, const T* x, const T* logits,
                                                int64_t pixels, int c) {
    constexpr int W = PER_VECTOR<T>;
    Channels<T> at(pixels, c);
    Vector<T> a = weights(logits, c, at);
    double sums[W] = {};
    for (int64_t p = threadIdx.y; p < pixels && at.count > 0; p += THREADS_Y) {
        int64_t pixel = (at.image + p) * 2 * c + at.first;
        Vector<T> d = load_partial(dy + (at.image + p) * c + at.first, at.count);
        if (dlogits) {
            Vector<T> u = load_partial(x + pixel, at.count), v = load_partial(x + pixel + c, at.count);
#pragma unroll
            for (int k = 0; k < W; k++) sums[k] += static_cast<double>(d.v[k]) * (u.v[k] - v.v[k]);
        }
        if (!dx) continue;
#pragma unroll
        for (int stream = 0; stream < 2; stream++) {
            T* to = dx + pixel + stream * c;
            Vector<T> v;
#pragma unroll
            for (int k = 0; k < W; k++) v.v[k] = (stream == 0 ? a.v[k] : 1.0f - a.v[k]) * d.v[k];
            store_partial(to, v, at.count);
        }
    }
    sum_over_y(sums);
    if (threadIdx.y > 0 || !dlogits) return;
#pragma unroll
    for (int stream = 0; stream < 2; stream++) {
        T* to = dlogits + int64_t{blockIdx.y} * 2 * c + stream * c + at.first;
        Vector<T> v;
#pragma unroll
        for (int k = 0; k < W; k++) {
            float slope = a.v[k] * (1.0f - a.v[k]) * static_cast<float>(sums[k]);
            v.v[k] = stream == 0 ? slope : -slope;
        }
        store_partial(to, v, at.count);
    }
}

KERNEL BOUNDS(THREADS) void stream_mean_f32(float* g, const float* x, int64_t pixels, int c) {
    mean(g, x, pixels, c);
}
KERNEL BOUNDS(THREADS) void stream_mean_bf16(bf16* g, const bf16* x, int64_t pixels, int c) {
    mean(g, x, pixels, c);
}

KERNEL BOUNDS(THREADS) void stream_mean_backward_f32(float* dx, const float* dg, int64_t pixels, int c) {
    mean_backward(dx, dg, pixels, c);
}
KERNEL BOUNDS(THREADS) void stream_mean_backward_bf16(bf16* dx, const bf16* dg, int64_t pixels, int c) {
    mean_backward(dx, dg, pixels, c);
}

KERNEL BOUNDS(THREADS) void stream_select_f32(float* y, const float* x, const float* logits, int64_t pixels,
                                              int c) {
    select(y, x, logits, pixels, c);
}
KERNEL BOUNDS(THREADS) void stream_select_bf16(bf16* y, const bf16* x, const bf16* logits, int64_t pixels,
                                               int c) {
    select(y, x, logits, pixels, c);
}

KERNEL BOUNDS(THREADS) void stream_select_backward_f32(float* dx, float* dlogits, const float* dy,
                                                       const float* x, const float* logits, int64_t pixels,
                                                       int c) {
    select_backward(dx, dlogits, dy, x, logits, pixels, c);
}
KERNEL BOUNDS(THREADS) void stream_select_backward_bf16(bf16* dx, bf16* dlogits, const bf16* dy,
                                                        const bf16* x, const bf16* logits, int64_t pixels,
                                                        int c) {
    select_backward(dx, dlogits, dy, x, logits, pixels, c);
}
