//! Launches the GEMMs of `kernels/matmul.cu`, and `kernels/linear.cu` for the gradient of the bias.

use super::LinearDims;
use crate::device::cuda::{Launch, int};
use crate::ops::gemm::GemmKind;
use crate::ops::gemm::{GemmSize, gemm};
use crate::tensor::{Tensor, TensorMut};

pub(super) fn forward(
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    dims: LinearDims,
) {
    let sizes = GemmSize { m: dims.n, n: dims.k, k: dims.d };
    gemm(GemmKind::Nt, &mut y.view_mut(), x, w, bias, sizes, false);
}

pub(super) fn input_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    w: &Tensor,
    dims: LinearDims,
    accumulate: bool,
) {
    let sizes = GemmSize { m: dims.n, n: dims.d, k: dims.k };
    gemm(GemmKind::Nn, dx, dy, w, None, sizes, accumulate);
}

pub(super) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    dy: &Tensor,
    x: &Tensor,
    dims: LinearDims,
    accumulate: bool,
) {
    let sizes = GemmSize { m: dims.k, n: dims.d, k: dims.n };
    gemm(GemmKind::Tn, dw, dy, x, None, sizes, accumulate);
}

/// One block per 32 columns: 32 adjacent threads read a line, 8 rows at a time.
pub(super) fn bias_gradient(
    db: &mut TensorMut<'_>,
    dy: &Tensor,
    dims: LinearDims,
    accumulate: bool,
) {
    let launch = Launch::new(dy.device().gpu(), [dims.k.div_ceil(32), 1, 1], [32, 8, 1]);
    let db = db.device_out().updating(accumulate);
    let (n, k, accumulate) = (dims.n as i64, int(dims.k), i32::from(accumulate));
    let dtype = dy.dtype();
    // SAFETY: `dy` has `n` rows of `k`, `db` has `k`.
    unsafe {
        by_dtype!(
            dtype,
            column_sums_f32 | column_sums_bf16(launch, db, dy.device_in(), n, k, accumulate)
        );
    }
}
