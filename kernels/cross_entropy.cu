// Softmax cross-entropy of logits x [n, k] against labels [n]; see src/ops/cross_entropy. Forward:
// cross_entropy, then row_losses_mean. A warp per row: (n / 8 rounded up) blocks of 256. No dynamic shared
// memory.
//
// The host cannot check labels that are on the device: one out of range makes the loss and the gradient of
// its row NaN.
#include "rows.cuh"

/// row_losses [n].
template <typename T>
__device__ __forceinline__ void forward(float* row_losses, const T* x, const int* labels, int64_t n, int k) {
    for_rows(n, [&](int64_t row) {
        RowSoftmax p(x + row * k, k, 1.0f);
        int label = labels[row];
        bool is_valid = label >= 0 && label < k;
        if (is_first_lane())
            row_losses[row] = is_valid ? static_cast<float>(p.loss(to_float(x[row * k + label]))) : NAN;
    });
}

/// dx = (softmax(x) - onehot(label)) *dy / n; `dy` points to the gradient of the loss.
template <typename T>
__device__ __forceinline__ void backward(T* dx, const T* x, const int* labels, const float* dy, int64_t n,
                                         int k) {
    double scale = static_cast<double>(*dy) / n;
    for_rows(n, [&](int64_t row) {
        RowSoftmax p(x + row * k, k, 1.0f);
        int label = labels[row];
        float factor = label >= 0 && label < k ? static_cast<float>(scale / p.sum) : NAN;
        float target = static_cast<float>(scale);
        map_row(dx + row * k, x + row * k, k,
                [&](int j, float v) { return factor * p.exp_of(v) - (j == label ? target : 0.0f); });
    });
}

KERNEL void cross_entropy_f32(float* row_losses, const float* x, const int* labels, int64_t n, int k) {
    forward(row_losses, x, labels, n, k);
}
KERNEL void cross_entropy_bf16(float* row_losses, const bf16* x, const int* labels, int64_t n, int k) {
    forward(row_losses, x, labels, n, k);
}

KERNEL void cross_entropy_backward_f32(float* dx, const float* x, const int* labels, const float* dy,
                                       int64_t n, int k) {
    backward(dx, x, labels, dy, n, k);
}
KERNEL void cross_entropy_backward_bf16(bf16* dx, const bf16* x, const int* labels, const float* dy,
                                        int64_t n, int k) {
    backward(dx, x, labels, dy, n, k);
}
