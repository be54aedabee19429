//! Launches `kernels/neg_cosine.cu`: one warp per row, sums in f64.

use crate::device::cuda::{Launch, int};
use crate::ops::row_losses;
use crate::tensor::{DType, Tensor};

fn launch(x: &Tensor) -> Launch<'_> {
    Launch::new(x.device().gpu(), [x.shape()[0].div_ceil(8), 1, 1], [256, 1, 1])
}

fn sizes(x: &Tensor) -> (i64, i32) {
    (x.shape()[0] as i64, int(x.shape()[1]))
}

/// Returns the mean negative cosine of `p` and `z`, both `[n, d]`.
pub(super) fn forward(p: &Tensor, z: &Tensor) -> Tensor {
    let (n, d) = sizes(p);
    let mut row_losses = Tensor::empty(p.device(), DType::F32, [p.shape()[0]]);
    // SAFETY: `p` and `z` have `n` rows of `d`, `row_losses` has `n` elements.
    unsafe {
        by_dtype!(
            p.dtype(),
            neg_cosine_f32
                | neg_cosine_bf16(
                    launch(p),
                    row_losses.device_out(),
                    p.device_in(),
                    z.device_in(),
                    n,
                    d
                )
        );
    }
    row_losses::mean(&row_losses)
}

/// Fills `dx`, the gradient of the side `x`. `dy`, the gradient of the loss, is read on the device.
pub(super) fn backward(dx: &mut Tensor, x: &Tensor, other: &Tensor, dy: &Tensor) {
    let (n, d) = sizes(x);
    // SAFETY: as in the forward pass.
    unsafe {
        by_dtype!(
            x.dtype(),
            neg_cosine_backward_f32
                | neg_cosine_backward_bf16(
                    launch(x),
                    dx.device_out(),
                    x.device_in(),
                    other.device_in(),
                    dy.device_in(),
                    n,
                    d
                )
        );
    }
}
