//! Launches `kernels/soft_cross_entropy.cu`: one warp per row. Targets are f32 for any type of scores.

use crate::device::cuda::{Launch, int};
use crate::ops::row_losses;
use crate::tensor::{DType, Tensor};

fn launch(x: &Tensor) -> Launch<'_> {
    Launch::new(x.device().gpu(), [x.shape()[0].div_ceil(8), 1, 1], [256, 1, 1])
}

fn sizes(x: &Tensor) -> (i64, i32) {
    (x.shape()[0] as i64, int(x.shape()[1]))
}

/// Returns the mean loss of `x [n, k]` and targets `q [n, k]`.
pub(super) fn forward(x: &Tensor, q: &Tensor, temperature: f64) -> Tensor {
    let (n, k) = sizes(x);
    let mut row_losses = Tensor::empty(x.device(), DType::F32, [x.shape()[0]]);
    // SAFETY: `x` and `q` have `n` rows of `k`, `row_losses` has `n` elements.
    unsafe {
        by_dtype!(
            x.dtype(),
            soft_cross_entropy_f32
                | soft_cross_entropy_bf16(
                    launch(x),
                    row_losses.device_out(),
                    x.device_in(),
                    q.device_in(),
                    n,
                    k,
                    1.0 / temperature
                )
        );
    }
    row_losses::mean(&row_losses)
}

/// Fills `dx`. `dy`, the gradient of the loss, is read on the device.
pub(super) fn backward(dx: &mut Tensor, x: &Tensor, q: &Tensor, dy: &Tensor, temperature: f64) {
    let (n, k) = sizes(x);
    // SAFETY: as in the forward pass.
    unsafe {
        by_dtype!(
            x.dtype(),
            soft_cross_entropy_backward_f32
                | soft_cross_entropy_backward_bf16(
                    launch(x),
                    dx.device_out(),
                    x.device_in(),
                    q.device_in(),
                    dy.device_in(),
                    n,
                    k,
                    1.0 / temperature
                )
        );
    }
}

/// Fills `y [n, k]`, f32, with `softmax(x / T)` of each row.
pub(super) fn softmax(y: &mut Tensor, x: &Tensor, temperature: f64) {
    let (n, k) = sizes(x);
    // SAFETY: both have `n` rows of `k`.
    unsafe {
        by_dtype!(
            x.dtype(),
            softmax_f32
                | softmax_bf16(launch(x), y.device_out(), x.device_in(), n, k, 1.0 / temperature)
        );
    }
}
