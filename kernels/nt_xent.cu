// NT-Xent over unit rows z [rows, d], f32; see src/ops/nt_xent. The similarity matrix is made in tiles and
// never stored. d > 0.
//
// Forward, three launches: nt_xent_sums, nt_xent_finish, row_losses_mean. Backward, two: nt_xent_gradient,
// then sum_slices_f32 of matmul.cu with n = rows d, which also accumulates. `inv_t` is 1 / T. Columns are cut
// into slices (rows / columns_per_slice, rounded up; columns_per_slice is a multiple of 64): enough that row
// tiles times slices come to some hundred blocks, and by the shape alone. Workspaces: maxima, sums [slices,
// rows]; partial [slices, rows, d]; row_losses [rows]. lse [rows] is kept for the backward pass. No dynamic
// shared memory.
#include "rows.cuh"
#include "similarity.cuh"

/// maxima, sums [slices, rows]. Grid (rows / 64 rounded up, slices), block 256.
KERNEL BOUNDS(TILE_THREADS) void nt_xent_sums(float* maxima, float* sums, const float* z, int rows, int d,
                                              int columns_per_slice, double inv_t) {
    sum_exponentials(maxima, sums, z, rows, z, rows, d, columns_per_slice, static_cast<float>(inv_t),
                     [](int i, int j) { return i == j; });  // no row is its own negative
}

/// lse and row_losses [rows], a warp a row: (rows / 8 rounded up) blocks of 256.
KERNEL void nt_xent_finish(float* lse, float* row_losses, const float* maxima, const float* sums,
                           const float* z, int rows, int d, int slices, double inv_t) {
    for_rows(rows, [&](int64_t row) {
        int64_t positive = (row + rows / 2) % rows;
        double logit = row_dot(z + row * d, z + positive * d, d) * inv_t;
        double l = log_sum_exp(maxima, sums, row, rows, slices, -INFINITY);
        if (is_first_lane())
            lse[row] = static_cast<float>(l), row_losses[row] = static_cast<float>(l - logit);
    });
}

/// partial [slices, rows, d], whose sum over slices is dz; `dy` points to the gradient of the loss, on the
/// device. Grid (rows / 64, d / 128, slices), all rounded up; block 256.
KERNEL BOUNDS(TILE_THREADS) void nt_xent_gradient(float* partial, const float* z, const float* lse,
                                                  const float* dy, int rows, int d, int columns_per_slice,
                                                  double inv_t) {
    float scale = static_cast<float>(*dy * inv_t / rows), t = static_cast<float>(inv_t);
    sum_weighted_rows(partial, z, rows, z, rows, d, columns_per_slice, [=](int i, int j, float s) {
        if (i == j) return 0.0f;
        float logit = s * t, weight = expf(logit - lse[i]) + expf(logit - lse[j]);
        return scale * (j == (i + rows / 2) % rows ? weight - 2.0f : weight);
    });
}
