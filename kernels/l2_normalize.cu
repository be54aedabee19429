// Normalizes rows to unit length; see src/ops/l2_normalize. x, y, dx, dy [n, d]; norms [n] are saved for the
// backward pass. y and dy are f32 whatever x and dx are: losses take f32 from bf16 features.
//
// A warp per row: any grid and any block of a multiple of 32 threads works, (n / 8 rounded up) blocks of 256
// are efficient. No dynamic shared memory.
#include "rows.cuh"

constexpr float EPS = 1e-12f;

/// y = x / max(|x|, EPS).
template <typename In>
__device__ __forceinline__ void forward(float* y, float* norms, const In* x, int64_t n, int d) {
    for_rows(n, [&](int64_t row) {
        const In* from = x + row * d;
        float norm = static_cast<float>(sqrt(row_dot(from, from, d)));
        if (is_first_lane()) norms[row] = norm;
        float scale = 1.0f / (norm < EPS ? EPS : norm);  // NaN propagates
        map_row(y + row * d, from, d, [scale](int, float v) { return v * scale; });
    });
}

/// dx = (dy - y <y, dy>) / |x|; below EPS the norm is a constant and dx = dy / EPS.
template <typename In>
__device__ __forceinline__ void backward(In* dx, const float* dy, const float* y, const float* norms,
                                         int64_t n, int d) {
    for_rows(n, [&](int64_t row) {
        const float *own = y + row * d, *gradient = dy + row * d;
        float norm = norms[row], scale = 1.0f / (norm < EPS ? EPS : norm);
        float dot = norm > EPS ? static_cast<float>(row_dot(own, gradient, d)) : 0.0f;
        zip_rows(dx + row * d, gradient, own, d, [=](float g, float v) { return (g - v * dot) * scale; });
    });
}

KERNEL void l2_normalize_f32(float* y, float* norms, const float* x, int64_t n, int d) {
    forward(y, norms, x, n, d);
}
KERNEL void l2_normalize_bf16(float* y, float* norms, const bf16* x, int64_t n, int d) {
    forward(y, norms, x, n, d);
}

KERNEL void l2_normalize_backward_f32(float* dx, const float* dy, const float* y, const float* norms,
                                      int64_t n, int d) {
    backward(dx, dy, y, norms, n, d);
}
KERNEL void l2_normalize_backward_bf16(bf16* dx, const float* dy, const float* y, const float* norms,
                                       int64_t n, int d) {
    backward(dx, dy, y, norms, n, d);
}

/// Normalizes the rows of x [n, d] in place, without a gradient; `copy` [n, d], the bf16 working copy of x,
/// is updated with it unless null. For SwAV's prototypes, before each step.
KERNEL void normalize_rows(float* x, bf16* copy, int64_t n, int d) {
    for_rows(n, [&](int64_t row) {
        float* own = x + row * d;
        double norm = sqrt(row_dot(own, own, d)), scale = 1.0 / (norm < EPS ? EPS : norm);
        for_vectors_of_row(d, [&](int j, int count) {
            Vector8 p = load_vector8(own + j, count);
#pragma unroll
            for (int k = 0; k < 8; k++) p.v[k] = static_cast<float>(p.v[k] * scale);
            store_vector8(own + j, p, count);
            if (copy) store_vector8(copy + row * d + j, p, count);
        });
    });
}
