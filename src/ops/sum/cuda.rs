//! Launches `kernels/sum.cu`: a warp per row if the last axis is summed, else a block per 32 columns.

use super::SumDims;
use crate::device::Device;
use crate::device::cuda::Launch;
use crate::tensor::Tensor;

/// Eight warps per block, one per row.
fn over_rows(device: &Device, rows: usize) -> Launch<'_> {
    Launch::new(device.gpu(), [rows.div_ceil(8), 1, 1], [256, 1, 1])
}

/// Length of a row in the type of the kernels' arguments.
#[track_caller]
fn length(row: usize) -> i32 {
    i32::try_from(row).expect("sum: the kernels support rows of at most 2^31 - 1 elements")
}

/// Fills `y`, which is f32.
#[track_caller]
pub(super) fn forward(y: &mut Tensor, x: &Tensor, dims: SumDims) {
    let SumDims { outer, n, inner, factor } = dims;
    let (device, factor) = (x.device().clone(), factor as f32);
    if inner == 1 {
        let (launch, n) = (over_rows(&device, outer), length(n));
        // SAFETY: `x` has `outer` rows of `n`, `y` has `outer` elements.
        unsafe {
            by_dtype!(
                x.dtype(),
                sum_rows_f32
                    | sum_rows_bf16(launch, y.device_out(), x.device_in(), factor, outer as i64, n)
            );
        }
        return;
    }
    // The kernel loops over what exceeds the grid's limit.
    let grid = [inner.div_ceil(32), outer.min(65_535), 1];
    let launch = Launch::new(device.gpu(), grid, [32, 8, 1]);
    let [outer, n, inner] = [outer, n, inner].map(|size| size as i64);
    // SAFETY: `x` is `[outer, n, inner]`, `y` is `[outer, inner]`.
    unsafe {
        by_dtype!(
            x.dtype(),
            sum_columns_f32
                | sum_columns_bf16(launch, y.device_out(), x.device_in(), factor, outer, n, inner)
        );
    }
}

/// Fills `dx` from `dy`, which is f32.
#[track_caller]
pub(super) fn backward(dx: &mut Tensor, dy: &Tensor, dims: SumDims) {
    let SumDims { outer, n, inner, factor } = dims;
    let (device, dtype, factor) = (dy.device().clone(), dx.dtype(), factor as f32);
    if inner == 1 {
        let (launch, outer, n) = (over_rows(&device, outer), outer as i64, length(n));
        // SAFETY: `dx` has `outer` rows of `n`, `dy` has `outer` elements.
        unsafe {
            by_dtype!(
                dtype,
                sum_rows_backward_f32
                    | sum_rows_backward_bf16(
                        launch,
                        dx.device_out(),
                        dy.device_in(),
                        factor,
                        outer,
                        n
                    )
            );
        }
        return;
    }
    let launch = over_rows(&device, outer * n);
    let (outer, n, inner) = (outer as i64, n as i64, length(inner));
    // SAFETY: `dx` is `[outer, n, inner]`, `dy` is `[outer, inner]`.
    unsafe {
        by_dtype!(
            dtype,
            sum_columns_backward_f32
                | sum_columns_backward_bf16(
                    launch,
                    dx.device_out(),
                    dy.device_in(),
                    factor,
                    outer,
                    n,
                    inner
                )
        );
    }
}
