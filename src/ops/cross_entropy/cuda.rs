//! Launches `kernels/cross_entropy.cu`: one warp per row.

use crate::device::cuda::{Launch, int};
use crate::ops::row_losses;
use crate::tensor::{DType, Tensor};

fn launch(x: &Tensor, n: usize) -> Launch<'_> {
    Launch::new(x.device().gpu(), [n.div_ceil(8), 1, 1], [256, 1, 1])
}

/// Returns the mean loss of `x [n, k]` and `labels [n]`.
pub(super) fn forward(x: &Tensor, labels: &Tensor, [n, k]: [usize; 2]) -> Tensor {
    let mut row_losses = Tensor::empty(x.device(), DType::F32, [n]);
    // SAFETY: `x` has `n` rows of `k`, the other tensors `n` elements; the kernel checks a label before it indexes with it.
    unsafe {
        by_dtype!(
            x.dtype(),
            cross_entropy_f32
                | cross_entropy_bf16(
                    launch(x, n),
                    row_losses.device_out(),
                    x.device_in(),
                    labels.device_in(),
                    n as i64,
                    int(k)
                )
        );
    }
    row_losses::mean(&row_losses)
}

/// Returns `dx`, in the type of `x`. `dy`, the gradient of the loss, is read on the device.
pub(super) fn backward(x: &Tensor, labels: &Tensor, dy: &Tensor, [n, k]: [usize; 2]) -> Tensor {
    let mut dx = x.empty_like();
    // SAFETY: as in the forward pass.
    unsafe {
        by_dtype!(
            x.dtype(),
            cross_entropy_backward_f32
                | cross_entropy_backward_bf16(
                    launch(x, n),
                    dx.device_out(),
                    x.device_in(),
                    labels.device_in(),
                    dy.device_in(),
                    n as i64,
                    int(k)
                )
        );
    }
    dx
}
