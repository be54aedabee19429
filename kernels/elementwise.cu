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

/// y[i] = f(a[i], b[i]).
template <typename T, typename F>
__device__ __forceinline__ void zip(T* y, const T* a, const T* b, int64_t n, F f) {
    for_vectors(n, PER_VECTOR<T>, [&](int64_t i, int count) {
        Vector<T> u = load_partial(a + i, count), v = load_partial(b + i, count);
#pragma unroll
        for (int k = 0; k < PER_VECTOR<T>; k++) u.v[k] = f(u.v[k], v.v[k]);
        store_partial(y + i, u, count);
    });
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

// The expressions of src/ops/elementwise, in f32.

struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
KERNEL void add_f32(float* y, const float* a, const float* b, int64_t n) { zip(y, a, b, n, Add{}); }
KERNEL void add_bf16(bf16* y, const bf16* a, const bf16* b, int64_t n) { zip(y, a, b, n, Add{}); }

struct Mul {
    __device__ __forceinline__ float operator()(float a, float b) const { return a * b; }
};
KERNEL void mul_f32(float* y, const float* a, const float* b, int64_t n) { zip(y, a, b, n, Mul{}); }
KERNEL void mul_bf16(bf16* y, const bf16* a, const bf16* b, int64_t n) { zip(y, a, b, n, Mul{}); }

/// Unlike a maximum, propagates NaN.
struct Relu {
    __device__ __forceinline__ float operator()(float x) const { return x < 0.0f ? 0.0f : x; }
};
KERNEL void relu_f32(float* y, const float* x, int64_t n) { map(y, x, n, Relu{}); }
KERNEL void relu_bf16(bf16* y, const bf16* x, int64_t n) { map(y, x, n, Relu{}); }

/// y is the output of the forward pass.
struct ReluBackward {
    __device__ __forceinline__ float operator()(float dy, float y) const { return y > 0.0f ? dy : 0.0f; }
};
KERNEL void relu_backward_f32(float* dx, const float* dy, const float* y, int64_t n) {
    zip(dx, dy, y, n, ReluBackward{});
}
KERNEL void relu_backward_bf16(bf16* dx, const bf16* dy, const bf16* y, int64_t n) {
    zip(dx, dy, y, n, ReluBackward{});
}

struct Scale {
    float factor;
    __device__ __forceinline__ float operator()(float x) const { return factor * x; }
};
KERNEL void scale_f32(float* y, const float* x, float factor, int64_t n) { map(y, x, n, Scale{factor}); }
KERNEL void scale_bf16(bf16* y, const bf16* x, float factor, int64_t n) { map(y, x, n, Scale{factor}); }

struct Square {
    __device__ __forceinline__ float operator()(float x) const { return x * x; }
};
KERNEL void square_f32(float* y, const float* x, int64_t n) { map(y, x, n, Square{}); }
KERNEL void square_bf16(bf16* y, const bf16* x, int64_t n) { map(y, x, n, Square{}); }

struct SquareBackward {
    __device__ __forceinline__ float operator()(float dy, float x) const { return 2.0f * x * dy; }
};
KERNEL void square_backward_f32(float* dx, const float* dy, const float* x, int64_t n) {
    zip(dx, dy, x, n, SquareBackward{});
}
KERNEL void square_backward_bf16(bf16* dx, const bf16* dy, const bf16* x, int64_t n) {
    zip(dx, dy, x, n, SquareBackward{});
}

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
