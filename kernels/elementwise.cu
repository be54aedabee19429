// Element-wise maps over flat arrays of any length: a grid-stride loop with 16 bytes per thread. An output
// may alias an input.
#include "vector.cuh"

/// Calls f(first element, count) for this thread's vectors of `width` elements.
template <typename F>
__device__ __forceinline__ void for_vectors(int64_t n, int width, F f) {
    for (int64_t i = grid_rank() * width; i < n; i += grid_threads() * width)
        f(i, n - i < width ? static_cast<int>(n - i) : width);
}

/// y[i] = f(a[i]).
template <typename T, typename F>
__device__ __forceinline__ void map(T* y, const T* a, int64_t n, F f) {
    for_vectors(n, PER_VECTOR<T>, [&](int64_t i, int count) {
        Vector<T> v = load_partial(a + i, count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) v.v[k] = f(v.v[k]);
        store_partial(y + i, v, count);
    });
}

/// y = 0 where x < 0, else x; NaN propagates.
template <typename T>
__device__ __forceinline__ void relu(T* y, const T* x, int64_t n) {
    map(y, x, n, [](float x) { return x < 0.0f ? 0.0f : x; });
}

/// dx = dy where y > 0, else 0; y is the output of the forward pass.
template <typename T>
__device__ __forceinline__ void relu_backward(T* dx, const T* dy, const T* y, int64_t n) {
    for_vectors(n, PER_VECTOR<T>, [&](int64_t i, int count) {
        Vector<T> d = load_partial(dy + i, count), out = load_partial(y + i, count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) d.v[k] = out.v[k] > 0.0f ? d.v[k] : 0.0f;
        store_partial(dx + i, d, count);
    });
}

template <typename T>
__device__ __forceinline__ void add(T* y, const T* a, const T* b, int64_t n) {
    for_vectors(n, PER_VECTOR<T>, [&](int64_t i, int count) {
        Vector<T> u = load_partial(a + i, count), v = load_partial(b + i, count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) u.v[k] += v.v[k];
        store_partial(y + i, u, count);
    });
}

template <typename T>
__device__ __forceinline__ void scale(T* y, const T* x, float factor, int64_t n) {
    map(y, x, n, [factor](float x) { return factor * x; });
}

template <typename T>
__device__ __forceinline__ void fill(T* y, float value, int64_t n) {
    for_vectors(n, PER_VECTOR<T>, [&](int64_t i, int count) {
        Vector<T> v;
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) v.v[k] = value;
        store_partial(y + i, v, count);
    });
}

KERNEL void relu_f32(float* y, const float* x, int64_t n) { relu(y, x, n); }
KERNEL void relu_bf16(bf16* y, const bf16* x, int64_t n) { relu(y, x, n); }

KERNEL void relu_backward_f32(float* dx, const float* dy, const float* y, int64_t n) {
    relu_backward(dx, dy, y, n);
}
KERNEL void relu_backward_bf16(bf16* dx, const bf16* dy, const bf16* y, int64_t n) {
    relu_backward(dx, dy, y, n);
}

KERNEL void add_f32(float* y, const float* a, const float* b, int64_t n) { add(y, a, b, n); }
KERNEL void add_bf16(bf16* y, const bf16* a, const bf16* b, int64_t n) { add(y, a, b, n); }

KERNEL void scale_f32(float* y, const float* x, float factor, int64_t n) { scale(y, x, factor, n); }
KERNEL void scale_bf16(bf16* y, const bf16* x, float factor, int64_t n) { scale(y, x, factor, n); }

KERNEL void fill_f32(float* y, float value, int64_t n) { fill(y, value, n); }
KERNEL void fill_bf16(bf16* y, float value, int64_t n) { fill(y, value, n); }

/// y = x rounded to nearest even.
KERNEL void cast_f32_to_bf16(bf16* y, const float* x, int64_t n) {
    for_vectors(n, 8, [&](int64_t i, int count) {
        Vector<float> low = load_partial(x + i, count), high{};
        if (count > 4) high = load_partial(x + i + 4, count - 4);
        Vector<bf16> v;
#pragma unroll
        for (int k = 0; k < 4; k++) v.v[k] = low.v[k], v.v[k + 4] = high.v[k];
        store_partial(y + i, v, count);
    });
}

KERNEL void cast_bf16_to_f32(float* y, const bf16* x, int64_t n) {
    for_vectors(n, 8, [&](int64_t i, int count) {
        Vector<bf16> v = load_partial(x + i, count);
        Vector<float> low, high;
#pragma unroll
        for (int k = 0; k < 4; k++) low.v[k] = v.v[k], high.v[k] = v.v[k + 4];
        store_partial(y + i, low, count);
        if (count > 4) store_partial(y + i + 4, high, count - 4);
    });
}
