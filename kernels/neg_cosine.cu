// Negative cosine similarity of rows p and z [n, d]; see src/ops/neg_cosine. Forward: neg_cosine, then
// row_losses_mean. Backward: neg_cosine_backward for each side that needs a gradient; nothing is saved. A
// warp per row: (n / 8 rounded up) blocks of 256. No dynamic shared memory.
#include "rows.cuh"

constexpr double EPS = 1e-12;

/// 1 / max(|x|, EPS); `constant` if the norm is below EPS and so has no gradient.
template <typename T>
__device__ __forceinline__ double inverse_norm(const T* x, int d, bool& constant) {
    double norm = sqrt(row_dot(x, x, d));
    constant = norm < EPS;
    return 1.0 / (constant ? EPS : norm);
}

/// row_losses [n].
template <typename T>
__device__ __forceinline__ void forward(float* row_losses, const T* p, const T* z, int64_t n, int d) {
    for_rows(n, [&](int64_t row) {
        const T *a = p + row * d, *b = z + row * d;
        bool unused;
        double cosine = row_dot(a, b, d) * inverse_norm(a, d, unused) * inverse_norm(b, d, unused);
        if (is_first_lane()) row_losses[row] = static_cast<float>(-cosine);
    });
}

/// dx of one side, with `other` as the other: -(ô - c x̂) / |x| *dy / n; below EPS the norm is a constant.
/// `dy` points to the gradient of the loss.
template <typename T>
__device__ __forceinline__ void backward(T* dx, const T* x, const T* other, const float* dy, int64_t n,
                                         int d) {
    double scale = -static_cast<double>(*dy) / n;
    for_rows(n, [&](int64_t row) {
        const T *a = x + row * d, *b = other + row * d;
        bool constant, unused;
        double inverse = inverse_norm(a, d, constant), inverse_other = inverse_norm(b, d, unused);
        double cosine = constant ? 0.0 : row_dot(a, b, d) * inverse * inverse_other;
        double to_other = scale * inverse * inverse_other, to_own = -scale * inverse * inverse * cosine;
        zip_rows(dx + row * d, a, b, d,
                 [=](float own, float o) { return static_cast<float>(to_own * own + to_other * o); });
    });
}

KERNEL void neg_cosine_f32(float* row_losses, const float* p, const float* z, int64_t n, int d) {
    forward(row_losses, p, z, n, d);
}
KERNEL void neg_cosine_bf16(float* row_losses, const bf16* p, const bf16* z, int64_t n, int d) {
    forward(row_losses, p, z, n, d);
}

KERNEL void neg_cosine_backward_f32(float* dx, const float* x, const float* other, const float* dy, int64_t n,
                                    int d) {
    backward(dx, x, other, dy, n, d);
}
KERNEL void neg_cosine_backward_bf16(bf16* dx, const bf16* x, const bf16* other, const float* dy, int64_t n,
                                     int d) {
    backward(dx, x, other, dy, n, d);
}
