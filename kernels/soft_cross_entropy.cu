// Cross-entropy of scores x [n, k] at temperature T against soft targets q [n, k], f32; see
// src/ops/soft_cross_entropy. `inv_t` is 1 / T. Forward: soft_cross_entropy, then row_losses_mean. A warp per
// row: (n / 8 rounded up) blocks of 256. No dynamic shared memory.
#include "rows.cuh"

/// row_losses [n].
template <typename T>
__device__ __forceinline__ void forward(float* row_losses, const T* x, const float* q, int64_t n, int k,
                                        double inv_t) {
    for_rows(n, [&](int64_t row) {
        RowSoftmax p(x + row * k, k, static_cast<float>(inv_t));
        double log_of_sum = log(p.sum), loss = 0.0;
        for_vectors_of_row(k, [&](int j, int count) {
            Vector8 score = load_vector8(x + row * k + j, count),
                    target = load_vector8(q + row * k + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < count)
                    loss += target.v[i] * (log_of_sum - (static_cast<double>(score.v[i]) - p.max) * inv_t);
        });
        loss = warp_sum(loss);
        if (is_first_lane()) row_losses[row] = static_cast<float>(loss);
    });
}

/// dx = (Σ_j q_j softmax(x / T) - q) *dy / (n T); `dy` points to the gradient of the loss.
template <typename T>
__device__ __forceinline__ void backward(T* dx, const T* x, const float* q, const float* dy, int64_t n, int k,
                                         double inv_t) {
    double scale = *dy * inv_t / n;
    for_rows(n, [&](int64_t row) {
        const float* target = q + row * k;
        RowSoftmax p(x + row * k, k, static_cast<float>(inv_t));
        double mass = 0.0;
        for_vectors_of_row(k, [&](int j, int count) {
            Vector8 part = load_vector8(target + j, count);
#pragma unroll
            for (int i = 0; i < 8; i++) mass += part.v[i];
        });
        float factor = static_cast<float>(scale * warp_sum(mass) / p.sum), s = static_cast<float>(scale);
        zip_rows(dx + row * k, x + row * k, target, k,
                 [=](float score, float t) { return factor * p.exp_of(score) - s * t; });
    });
}

/// y [n, k] = softmax(x / T), f32: the targets for distillation.
template <typename T>
__device__ __forceinline__ void softmax(float* y, const T* x, int64_t n, int k, double inv_t) {
    for_rows(n, [&](int64_t row) {
        RowSoftmax p(x + row * k, k, static_cast<float>(inv_t));
        float factor = static_cast<float>(1.0 / p.sum);
        map_row(y + row * k, x + row * k, k, [=](int, float v) { return factor * p.exp_of(v); });
    });
}

KERNEL void soft_cross_entropy_f32(float* row_losses, const float* x, const float* q, int64_t n, int k,
                                   double inv_t) {
    forward(row_losses, x, q, n, k, inv_t);
}
KERNEL void soft_cross_entropy_bf16(float* row_losses, const bf16* x, const float* q, int64_t n, int k,
                                    double inv_t) {
    forward(row_losses, x, q, n, k, inv_t);
}

KERNEL void soft_cross_entropy_backward_f32(float* dx, const float* x, const float* q, const float* dy,
                                            int64_t n, int k, double inv_t) {
    backward(dx, x, q, dy, n, k, inv_t);
}
KERNEL void soft_cross_entropy_backward_bf16(bf16* dx, const bf16* x, const float* q, const float* dy,
                                             int64_t n, int k, double inv_t) {
    backward(dx, x, q, dy, n, k, inv_t);
}

KERNEL void softmax_f32(float* y, const float* x, int64_t n, int k, double inv_t) {
    softmax(y, x, n, k, inv_t);
}
KERNEL void softmax_bf16(float* y, const bf16* x, int64_t n, int k, double inv_t) {
    softmax(y, x, n, k, inv_t);
}
