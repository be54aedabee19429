// Maps over flat arrays of any length: each thread takes 16 bytes at a time in a grid-stride loop.
#include "vector.cuh"

/// y[i] = f(a[i], b[i]); b may be null where f does not look at it.
template <typename T, typename F>
__device__ void map(T* y, const T* a, const T* b, int64_t n, F f) {
    constexpr int W = PER_VECTOR<T>;
    for (int64_t i = grid_rank() * W; i < n; i += grid_threads() * W) {
        int count = n - i < W ? static_cast<int>(n - i) : W;
        Vector<T> va = load_some(a + i, count), vb{};
        if (b) vb = load_some(b + i, count);
#pragma unroll
        for (int k = 0; k < W; k++) va.v[k] = f(va.v[k], vb.v[k]);
        store_some(y + i, va, count);
    }
}

/// y = x where x > 0, else 0; NaN stays.
template <typename T>
__device__ void relu(T* y, const T* x, int64_t n) {
    map(y, x, static_cast<const T*>(nullptr), n, [](float x, float) { return x <= 0.0f ? 0.0f : x; });
}

KERNEL void relu_f32(float* y, const float* x, int64_t n) { relu(y, x, n); }
KERNEL void relu_bf16(bf16* y, const bf16* x, int64_t n) { relu(y, x, n); }
