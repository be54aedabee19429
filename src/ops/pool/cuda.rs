//! Launches `kernels/pool.cu`: a thread writes 16 bytes of channels of one output pixel.

use super::{average, max};
use crate::device::Device;
use crate::device::cuda::{Launch, Out, int};
use crate::ops::window::Axis;
use crate::tensor::{DType, Tensor};

/// A launch over the pixels of the output `to [pixels.., c]`.
#[track_caller]
fn over<'d>(device: &'d Device, to: &Tensor) -> Launch<'d> {
    const THREADS: usize = 256;
    let c = *to.shape().last().expect("pooling: images have channels");
    let pixels = to.len() / c.max(1);
    assert!(
        pixels < 1 << 31,
        "pooling: {pixels} pixels; the kernels support at most 2^31 - 1: use a smaller batch"
    );
    let vectors = c.div_ceil(16 / to.dtype().size());
    let across = vectors.next_power_of_two().min(32);
    let down = THREADS / across;
    let grid = [pixels.div_ceil(down), vectors.div_ceil(across), 1];
    Launch::new(device.gpu(), grid, [across, down, 1])
}

/// The bytes of `x [n, h, w, c]` that windows of `taps` pixels from `pad` pixels before its edge cover, `outputs` along each side.
fn covered(x: &Tensor, taps: usize, stride: usize, pad: usize, outputs: [usize; 2]) -> usize {
    let [n, h, w, c] = x.dims("pooling: the input");
    let along = |size, outputs| Axis { size, taps, stride, pad, outputs }.pixels_covered();
    n * along(h, outputs[0]) * along(w, outputs[1]) * c * x.dtype().size()
}

/// The sizes in the types of the kernels' arguments.
fn sizes(n: usize, dims: max::MaxPoolDims) -> [i32; 9] {
    let max::MaxPoolDims { h, w, c, p, q, size, stride, pad } = dims;
    [n, h, w, c, p, q, size, stride, pad].map(int)
}

/// Fills `y`. If a gradient is `wanted`, returns the position of the largest pixel in the window of each output, one byte per
/// output.
#[track_caller]
pub(super) fn max_forward(
    y: &mut Tensor,
    x: &Tensor,
    dims: max::MaxPoolDims,
    wanted: bool,
) -> Option<Tensor> {
    assert!(
        dims.size <= 16,
        "max_pool: windows of {0} x {0}; a GPU supports at most 16 x 16",
        dims.size
    );
    let device = y.device().clone();
    let mut index = wanted.then(|| Tensor::empty(&device, DType::I32, [y.len().div_ceil(4)]));
    let count = y.len();
    let bytes =
        index.as_mut().map_or(Out::null(), |index| index.device_out().bytes().writing(count));
    let read = covered(x, dims.size, dims.stride, dims.pad, [dims.p, dims.q]);
    let (to, [n, h, w, c, p, q, size, stride, pad]) = (over(&device, y), sizes(x.shape()[0], dims));
    // SAFETY: `x` and `y` have these sizes, `index` one byte per element of `y`.
    unsafe {
        by_dtype!(
            x.dtype(),
            max_pool_f32
                | max_pool_bf16(
                    to,
                    y.device_out(),
                    bytes,
                    x.device_in().reading(read),
                    n,
                    h,
                    w,
                    c,
                    p,
                    q,
                    size,
                    stride,
                    pad
                )
        );
    }
    index
}

pub(super) fn max_backward(dx: &mut Tensor, dy: &Tensor, index: &Tensor, dims: max::MaxPoolDims) {
    let to = over(dy.device(), dx);
    let [n, h, w, c, p, q, size, stride, pad] = sizes(dy.shape()[0], dims);
    // SAFETY: as in the forward pass, which wrote `index`.
    unsafe {
        by_dtype!(
            dy.dtype(),
            max_pool_backward_f32
                | max_pool_backward_bf16(
                    to,
                    dx.device_out(),
                    dy.device_in(),
                    index.device_in().bytes().reading(dy.len()),
                    n,
                    h,
                    w,
                    c,
                    p,
                    q,
                    size,
                    stride,
                    pad
                )
        );
    }
}

/// The mean over all pixels: `x [n, h, w, c]`, `y [n, c]`.
pub(super) fn mean_forward(y: &mut Tensor, x: &Tensor) {
    let [n, h, w, c] = x.dims("mean_pool: the input");
    let (to, [n, pixels, c]) = (over(x.device(), y), [n, h * w, c].map(int));
    // SAFETY: the tensors have these sizes.
    unsafe {
        by_dtype!(
            x.dtype(),
            mean_pool_f32 | mean_pool_bf16(to, y.device_out(), x.device_in(), n, pixels, c)
        );
    }
}

pub(super) fn mean_backward(dx: &mut Tensor, dy: &Tensor) {
    let [n, h, w, c] = dx.dims("mean_pool: the input");
    let (to, [n, pixels, c]) = (over(dy.device(), dx), [n, h * w, c].map(int));
    // SAFETY: the tensors have these sizes.
    unsafe {
        by_dtype!(
            dy.dtype(),
            mean_pool_backward_f32
                | mean_pool_backward_bf16(to, dx.device_out(), dy.device_in(), n, pixels, c)
        );
    }
}

/// The mean of each small window: `x [n, h, w, c]`, `y [n, p, q, c]`.
pub(super) fn average_forward(y: &mut Tensor, x: &Tensor, dims: average::AvgPoolDims) {
    let read = covered(x, dims.size, dims.stride, 0, [dims.p, dims.q]);
    let (to, [n, h, w, c, p, q, size, stride]) =
        (over(x.device(), y), average_sizes(x.shape()[0], dims));
    // SAFETY: the tensors have these sizes.
    unsafe {
        by_dtype!(
            x.dtype(),
            avg_pool_f32
                | avg_pool_bf16(
                    to,
                    y.device_out(),
                    x.device_in().reading(read),
                    n,
                    h,
                    w,
                    c,
                    p,
                    q,
                    size,
                    stride
                )
        );
    }
}

pub(super) fn average_backward(dx: &mut Tensor, dy: &Tensor, dims: average::AvgPoolDims) {
    let (to, [n, h, w, c, p, q, size, stride]) =
        (over(dy.device(), dx), average_sizes(dy.shape()[0], dims));
    // SAFETY: the tensors have these sizes.
    unsafe {
        by_dtype!(
            dy.dtype(),
            avg_pool_backward_f32
                | avg_pool_backward_bf16(
                    to,
                    dx.device_out(),
                    dy.device_in(),
                    n,
                    h,
                    w,
                    c,
                    p,
                    q,
                    size,
                    stride
                )
        );
    }
}

fn average_sizes(n: usize, dims: average::AvgPoolDims) -> [i32; 8] {
    let average::AvgPoolDims { h, w, c, p, q, size, stride } = dims;
    let _ = int(h.max(w) + size); // where a window may end
    [n, h, w, c, p, q, size, stride].map(int)
}
