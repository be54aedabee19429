//! `kernels/cross_entropy.cu`: a warp to each row.

use crate::device::cuda::Launch;
use crate::ops::row_losses;
use crate::tensor::{DType, Tensor};

fn launch(x: &Tensor, n: usize) -> Launch<'_> {
    Launch::new(x.device().gpu(), [n.div_ceil(8), 1, 1], [256, 1, 1])
}

/// The mean loss of `x [n, k]` against `labels [n]`.
pub(super) fn forward(x: &Tensor, labels: &Tensor, [n, k]: [usize; 2]) -> Tensor {
    let mut row_losses = Tensor::empty(x.device(), DType::F32, [n]);
    // SAFETY: `x` has `n` rows of `k`, the rest a number for each row; the kernel looks at a label before it uses it.
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
                    k as i32
                )
        );
    }
    row_losses::mean(&row_losses)
}

/// `dx`, in the type of `x`, from `dy`, the gradient of the loss, which stays where it is.
pub(super) fn backward(x: &Tensor, labels: &Tensor, dy: &Tensor, [n, k]: [usize; 2]) -> Tensor {
    let mut dx = x.empty_like();
    // SAFETY: as in the forward.
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
                    k as i32
                )
        );
    }
    dx
}
