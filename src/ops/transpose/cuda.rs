//! Launches `kernels/transpose.cu`: a block of 32 x 8 threads per tile of 32 x 32.

use crate::device::cuda::Launch;
use crate::tensor::Tensor;

/// `y [columns, rows]` is the transpose of `x [rows, columns]`.
pub(super) fn transpose(y: &mut Tensor, x: &Tensor) {
    let [rows, columns] = x.dims("transpose: the input");
    let grid = [rows.div_ceil(32), columns.div_ceil(32), 1];
    let launch = Launch::new(x.device().gpu(), grid, [32, 8, 1]);
    let (rows, columns) = (rows as i64, columns as i64);
    // SAFETY: both tensors have `rows * columns` elements.
    unsafe {
        by_dtype!(
            x.dtype(),
            transpose_f32 | transpose_bf16(launch, y.device_out(), x.device_in(), rows, columns)
        );
    }
}
