//! Launches `kernels/selective_kernel.cu`: a thread handles 16 bytes of channels of every eighth pixel.

use crate::device::Device;
use crate::device::cuda::{Launch, int};
use crate::tensor::{DType, Tensor};

/// A launch over `n` images with streams of `c` channels.
#[track_caller]
fn over(device: &Device, n: usize, c: usize, dtype: DType) -> Launch<'_> {
    let vectors = c.div_ceil(16 / dtype.size());
    Launch::new(device.gpu(), [vectors.div_ceil(32), n, 1], [32, 8, 1])
}

/// Pixels and channels in the types of the kernels' arguments.
fn sizes([_, pixels, c]: [usize; 3]) -> (i64, i32) {
    (pixels as i64, int(c))
}

pub(super) fn mean(g: &mut Tensor, x: &Tensor, dims: [usize; 3]) {
    let [n, _, c] = dims;
    let (launch, (pixels, c)) = (over(x.device(), n, c, x.dtype()), sizes(dims));
    // SAFETY: `x` has `n` images with `pixels` pixels of `2c`, `g` has `n` rows of `c`.
    unsafe {
        by_dtype!(
            x.dtype(),
            stream_mean_f32 | stream_mean_bf16(launch, g.device_out(), x.device_in(), pixels, c)
        );
    }
}

pub(super) fn mean_gradient(dx: &mut Tensor, dg: &Tensor, dims: [usize; 3]) {
    let [n, _, c] = dims;
    let (launch, (pixels, c)) = (over(dg.device(), n, c, dg.dtype()), sizes(dims));
    // SAFETY: as in the forward.
    unsafe {
        by_dtype!(
            dg.dtype(),
            stream_mean_backward_f32
                | stream_mean_backward_bf16(launch, dx.device_out(), dg.device_in(), pixels, c)
        );
    }
}

pub(super) fn select(y: &mut Tensor, x: &Tensor, logits: &Tensor, dims: [usize; 3]) {
    let [n, _, c] = dims;
    let (launch, (pixels, c)) = (over(x.device(), n, c, x.dtype()), sizes(dims));
    // SAFETY: `x` has `n` images with `pixels` pixels of `2c`, `logits` has `n` rows of `2c`, `y` has the pixels of `x` with `c`.
    unsafe {
        by_dtype!(
            x.dtype(),
            stream_select_f32
                | stream_select_bf16(
                    launch,
                    y.device_out(),
                    x.device_in(),
                    logits.device_in(),
                    pixels,
                    c
                )
        );
    }
}

pub(super) fn select_gradient(
    [dx, dlogits]: [&mut Tensor; 2],
    [dy, x, logits]: [&Tensor; 3],
    dims: [usize; 3],
) {
    let [n, _, c] = dims;
    let (launch, (pixels, c)) = (over(x.device(), n, c, x.dtype()), sizes(dims));
    // SAFETY: as in the forward; gradients have the sizes of what they are gradients of.
    unsafe {
        by_dtype!(
            x.dtype(),
            stream_select_backward_f32
                | stream_select_backward_bf16(
                    launch,
                    dx.device_out(),
                    dlogits.device_out(),
                    dy.device_in(),
                    x.device_in(),
                    logits.device_in(),
                    pixels,
                    c
                )
        );
    }
}
