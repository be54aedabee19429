//! Launches `kernels/l2_normalize.cu`: one warp per row, sums in f64.

use crate::device::Device;
use crate::device::cuda::{self, Launch, Out, int};
use crate::tensor::{Shape, Tensor, TensorMut};

pub(super) fn forward(y: &mut Tensor, norms: &mut Tensor, x: &Tensor) {
    let (n, d, launch) = over(x.device(), x.shape());
    // SAFETY: `x` and `y` have `n` rows of `d`, `norms` has `n`.
    unsafe {
        by_dtype!(
            x.dtype(),
            l2_normalize_f32
                | l2_normalize_bf16(
                    launch,
                    y.device_out(),
                    norms.device_out(),
                    x.device_in(),
                    n,
                    d
                )
        );
    }
}

pub(super) fn backward(dx: &mut Tensor, dy: &Tensor, y: &Tensor, norms: &Tensor) {
    let (n, d, launch) = over(y.device(), y.shape());
    let dtype = dx.dtype();
    // SAFETY: `dx`, `dy` and `y` have `n` rows of `d`, `norms` has `n`.
    unsafe {
        by_dtype!(
            dtype,
            l2_normalize_backward_f32
                | l2_normalize_backward_bf16(
                    launch,
                    dx.device_out(),
                    dy.device_in(),
                    y.device_in(),
                    norms.device_in(),
                    n,
                    d
                )
        );
    }
}

/// Normalises `x [n, d]` in place, and its bf16 working copy if there is one.
pub(super) fn in_place(device: &Device, x: &mut TensorMut<'_>, mut copy: Option<TensorMut<'_>>) {
    let (n, d, launch) = over(device, x.shape());
    let copy = copy.as_mut().map_or(Out::null(), TensorMut::device_out);
    // SAFETY: `x` and its copy have `n` rows of `d`.
    unsafe { cuda::normalize_rows(launch, x.device_out().updating(true), copy, n, d) };
}

/// Number of rows, their length, and a launch of eight warps per block.
#[track_caller]
fn over<'d>(device: &'d Device, shape: &Shape) -> (i64, i32, Launch<'d>) {
    let (n, d) = (shape[0], shape[1]);
    assert!(
        d < 1 << 31,
        "l2_normalize: rows of {d} elements; the kernel supports at most 2^31 - 1"
    );
    (n as i64, int(d), Launch::new(device.gpu(), [n.div_ceil(8), 1, 1], [256, 1, 1]))
}
