//! Launches `kernels/elementwise.cu`, 16 bytes per thread.

use crate::device::cuda::Launch;
use crate::tensor::Tensor;

pub(super) fn scale(y: &mut Tensor, x: &Tensor, factor: f32) {
    let n = x.len() as i64;
    let launch = Launch::over(x.device().gpu(), x.len(), 16 / x.dtype().size());
    // SAFETY: both have `n` elements.
    unsafe {
        by_dtype!(
            x.dtype(),
            scale_f32 | scale_bf16(launch, y.device_out(), x.device_in(), factor, n)
        );
    }
}
