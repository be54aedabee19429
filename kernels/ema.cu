// The momentum encoder's update over a whole arena; see src/optim/ema.rs. Any grid and block; (n / 2048
// rounded up, at most a few thousand) blocks of 256 are good. No dynamic shared memory.
#include "rows.cuh"

/// target = m target + (1 - m) online with m = *momentum, in f64 as on the CPU; `copy` [n], the bf16 working
/// copy of target, is written with it unless null.
KERNEL void ema(float* target, bf16* copy, const float* online, const double* momentum, int64_t n) {
    double keep = *momentum, take = 1.0 - keep;
    for (int64_t i = grid_rank() * 8; i < n; i += grid_threads() * 8) {
        int count = n - i < 8 ? static_cast<int>(n - i) : 8;
        Piece old = load_piece(target + i, count), now = load_piece(online + i, count);
#pragma unroll
        for (int k = 0; k < 8; k++) old.v[k] = static_cast<float>(keep * old.v[k] + take * now.v[k]);
        store_piece(target + i, old, count);
        if (copy) store_piece(copy + i, old, count);
    }
}
