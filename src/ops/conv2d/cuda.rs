//! `kernels/conv2d.cu`: implicit matrix products in tiles of 64 x 64, bf16 on tensor cores with f32 sums, or f32
//! throughout.

use super::Conv2dDims;
use crate::device::cuda::Launch;
use crate::tensor::{DType, Tensor, TensorMut};

const TILE: usize = 64;

/// Calls the kernel for the dtype of `x` with the sizes where all directions have them: after the pointers.
macro_rules! launch {
    ($f32:ident | $bf16:ident, $x:ident, $d:ident, $grid:expr,
     ($($pointer:expr),*) $(, $rest:expr)*) => {{
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *$d;
        let [n, h, w, c, k, r, s, p, q, stride, pad] =
            [n, h, w, c, k, r, s, p, q, stride, pad].map(|size| size as i32);
        let threads = if $x.dtype() == DType::Bf16 { 128 } else { 256 };
        let launch = Launch::new($x.device().gpu(), $grid, [threads, 1, 1]);
        by_dtype!(
            $x.dtype(),
            $f32 | $bf16(launch, $($pointer),*, n, h, w, c, k, r, s, p, q, stride, pad $(, $rest)*)
        );
    }};
}

/// The kernels count in 31 bits.
#[track_caller]
pub(super) fn check(d: &Conv2dDims) {
    for (what, count) in [
        ("pixels", d.n * d.h * d.w),
        ("output pixels", d.n * d.p * d.q),
        ("elements of an image", d.h * d.w * d.c),
        ("elements of an output image", d.p * d.q * d.k),
        ("elements of the filters", d.k * d.r * d.s * d.c),
    ] {
        assert!(
            count < 1 << 31,
            "conv2d: {count} {what}, and a GPU's kernels count to 2^31 - 1: take a smaller batch or smaller images"
        );
    }
}

pub(super) fn forward(y: &mut Tensor, x: &Tensor, filters: &Tensor, d: &Conv2dDims) {
    let grid = [(d.n * d.p * d.q).div_ceil(TILE) * d.k.div_ceil(TILE), 1, 1];
    // SAFETY: the tensors have these sizes, and `check` has seen them.
    unsafe {
        launch!(
            conv2d_f32 | conv2d_bf16,
            x,
            d,
            grid,
            (y.device_out(), x.device_in(), filters.device_in())
        );
    }
}

pub(super) fn data_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    filters: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    // A phase of the stride has its own taps; the first has the most pixels.
    let pixels = d.n * d.h.div_ceil(d.stride) * d.w.div_ceil(d.stride);
    let grid = [pixels.div_ceil(TILE) * d.c.div_ceil(TILE), 1, d.stride * d.stride];
    // SAFETY: as in `forward`.
    unsafe {
        launch!(
            conv2d_data_gradient_f32 | conv2d_data_gradient_bf16,
            dy,
            d,
            grid,
            (dx.device_out(), dy.device_in(), filters.device_in()),
            i32::from(accumulate)
        );
    }
}

/// The sum runs over all output pixels, in slices where there are many of them and few tiles to keep a GPU busy. How
/// many is the shape's to say, so the sum has one order on every chip.
pub(super) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    x: &Tensor,
    dy: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    /// Blocks that a large GPU has work for.
    const BLOCKS: usize = 512;
    /// A slice has about this many pixels at least.
    const LEAST: usize = 256;
    /// The kernels' steps of pixels.
    const STEP: usize = 32;
    let (pixels, weights) = (d.n * d.p * d.q, d.k * d.r * d.s * d.c);
    let tiles = d.k.div_ceil(TILE) * (d.r * d.s * d.c).div_ceil(TILE);
    let most = (BLOCKS / tiles.max(1)).min(pixels / LEAST).max(1);
    let per_slice = pixels.div_ceil(most).next_multiple_of(STEP).max(STEP);
    let slices = pixels.div_ceil(per_slice).max(1);
    let run = |out: &mut TensorMut<'_>, accumulate: bool| {
        // SAFETY: as in `forward`; `out` has the filters' size for each slice.
        unsafe {
            launch!(
                conv2d_weight_gradient_f32 | conv2d_weight_gradient_bf16,
                x,
                d,
                [tiles, 1, slices],
                (out.device_out(), x.device_in(), dy.device_in()),
                per_slice as i32,
                i32::from(accumulate)
            );
        }
    };
    if slices == 1 && dw.dtype() == DType::F32 {
        return run(dw, accumulate);
    }
    let mut partial = Tensor::empty(x.device(), DType::F32, [slices, weights]);
    run(&mut partial.view_mut(), false);
    let sum = Launch::over(x.device().gpu(), weights, 1);
    // SAFETY: `partial` has `slices` times the elements of `dw`.
    unsafe {
        by_dtype!(
            dw.dtype(),
            sum_slices_f32
                | sum_slices_bf16(
                    sum,
                    dw.device_out(),
                    partial.device_in(),
                    slices as i32,
                    weights as i64,
                    i32::from(accumulate)
                )
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "conv2d: 2147483648 pixels, and a GPU's kernels count to 2^31 - 1")]
    fn more_pixels_than_the_kernels_count_are_refused() {
        check(&Conv2dDims::new([1 << 11, 1 << 10, 1 << 10, 4], [8, 3, 3, 4], 1, 1));
    }
}
