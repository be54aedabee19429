//! `kernels/l2_normalize.cu`: a warp to a row, sums in f64.

use crate::device::cuda::Launch;
use crate::tensor::Tensor;

pub(super) fn forward(y: &mut Tensor, norms: &mut Tensor, x: &Tensor) {
    let (n, d, launch) = rows(x);
    // SAFETY: `x` and `y` have `n` rows of `d`, `norms` has `n`.
    unsafe {
        by_dtype!(
            x.dtype(),
            l2_normalize_f32
                | l2_normalize_bf16_f32(
                    launch,
                    y.device_out(),
                    norms.device_out(),
                    x.device_in(),
                    n,
                    d
                )
        );
    }
}

pub(super) fn backward(dx: &mut Tensor, dy: &Tensor, y: &Tensor, norms: &Tensor) {
    let (n, d, launch) = rows(y);
    let dtype = dx.dtype();
    // SAFETY: `dx`, `dy` and `y` have `n` rows of `d`, `norms` has `n`.
    unsafe {
        by_dtype!(
            dtype,
            l2_normalize_backward_f32
                | l2_normalize_backward_bf16_f32(
                    launch,
                    dx.device_out(),
                    dy.device_in(),
                    y.device_in(),
                    norms.device_in(),
                    n,
                    d,
                    0
                )
        );
    }
}

/// Rows, their length, and eight warps to a block.
fn rows(x: &Tensor) -> (i64, i32, Launch<'_>) {
    let [n, d] = x.dims("l2_normalize: the input");
    assert!(d < 1 << 31, "l2_normalize: rows of {d}, and a GPU's kernel counts to 2^31 - 1");
    (n as i64, d as i32, Launch::new(x.device().gpu(), [n.div_ceil(8), 1, 1], [256, 1, 1]))
}
