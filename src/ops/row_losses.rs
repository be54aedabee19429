//! Launches `kernels/row_losses.cu`, the last kernel of every loss that is a mean over rows.

use crate::device::cuda::{self, Launch, int};
use crate::tensor::Tensor;

/// Returns the mean of `row_losses [n]`, `n > 0`, as a scalar on the GPU.
pub(super) fn mean(row_losses: &Tensor) -> Tensor {
    let device = row_losses.device();
    let mut loss = Tensor::floats(device, []);
    let launch = Launch::new(device.gpu(), [1, 1, 1], [256, 1, 1]);
    let n = int(row_losses.len());
    // SAFETY: `row_losses` has `n` elements.
    unsafe { cuda::row_losses_mean(launch, loss.device_out(), row_losses.device_in(), n) };
    loss
}
