//! Launches `kernels/elementwise.cu`, 16 bytes per thread.

use crate::device::cuda::Launch;
use crate::tensor::Tensor;

pub(super) fn forward(y: &mut Tensor, x: &Tensor) {
    let (n, launch) = map(x);
    // SAFETY: both have `n` elements.
    unsafe {
        by_dtype!(x.dtype(), relu_f32 | relu_bf16(launch, y.device_out(), x.device_in(), n));
    }
}

pub(super) fn backward(dx: &mut Tensor, dy: &Tensor, y: &Tensor) {
    let (n, launch) = map(y);
    // SAFETY: all have `n` elements: a gradient has its value's shape.
    unsafe {
        by_dtype!(
            y.dtype(),
            relu_backward_f32
                | relu_backward_bf16(launch, dx.device_out(), dy.device_in(), y.device_in(), n)
        );
    }
}

fn map(x: &Tensor) -> (i64, Launch<'_>) {
    (x.len() as i64, Launch::over(x.device().gpu(), x.len(), 16 / x.dtype().size()))
}
