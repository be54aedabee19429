// The momentum encoder's update of an entire arena; see src/optim/ema.rs. Any grid and block size works; (n /
// 2048 rounded up, at most a few thousand) blocks of 256 are efficient. No dynamic shared memory.
#include "rows.cuh"

/// target = m target + (1 - m) online with m = *momentum, in f64 as on the CPU. `copy` [n], the bf16 working
/// copy of target, is updated with it unless null.
KERNEL void ema(float* target, bf16* copy, const float* online, const double* momentum, int64_t n) {
    double m = *momentum;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Vector8 old = load_vector8(target + i, count), now = load_vector8(online + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++) old.v[k] = static_cast<float>(m * old.v[k] + (1.0 - m) * now.v[k]);
        store_vector8(target + i, old, count);
        if (copy) store_vector8(copy + i, old, count);
    }
}
