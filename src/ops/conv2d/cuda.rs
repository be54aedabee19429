//! Convolution on a GPU by implicit GEMM (`kernels/conv2d.cu`): bf16 on tensor cores with f32 accumulators, or f32 throughout.
//! A 1x1 convolution of stride 1 is a plain GEMM (`kernels/matmul.cu`).

use super::Conv2dDims;
use crate::device::cuda::{self, Launch, Out, int};
use crate::ops::gemm::{
    BlockMoments, Gemm, GemmKind, GemmSize, TileShape, gemm, gemm_with_moments, is_aligned,
    split_k_reduce,
};
use crate::ops::window::Axis;
use crate::tensor::{DType, Tensor, TensorMut};

/// Calls a kernel with the sizes after the pointers, where all directions have them.
macro_rules! call {
    ($kernel:ident, $launch:expr, $d:ident, ($($pointer:expr),*) $(, $rest:expr)*) => {{
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *$d;
        let [n, h, w, c, k, r, s, p, q, stride, pad] =
            [n, h, w, c, k, r, s, p, q, stride, pad].map(int);
        cuda::$kernel($launch, $($pointer),*, n, h, w, c, k, r, s, p, q, stride, pad $(, $rest)*)
    }};
}

/// Refuses sizes that the kernels' 31-bit indices cannot hold.
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
            "conv2d: {count} {what}, and the GPU kernels support at most 2^31 - 1: use a smaller batch or smaller images"
        );
    }
}

/// Whether it is a plain GEMM: pixels are the rows of one matrix, filters those of the other.
fn is_plain(d: &Conv2dDims) -> bool {
    d.r == 1 && d.s == 1 && d.stride == 1 && d.pad == 0
}

/// The tile table's key for operands at these addresses.
fn table(gemm: Gemm, operands: [&Tensor; 2]) -> Gemm {
    let run = if operands.into_iter().all(is_aligned) { gemm.run } else { 1 };
    Gemm { run, ..gemm }
}

/// Both axes of the images.
fn axes(d: &Conv2dDims) -> [Axis; 2] {
    let Conv2dDims { stride, pad, .. } = *d;
    [(d.h, d.r, d.p), (d.w, d.s, d.q)].map(|(size, taps, outputs)| Axis {
        size,
        taps,
        stride,
        pad,
        outputs,
    })
}

/// The number of pixels, outputs or taps of an image by that along each axis.
fn of_both(d: &Conv2dDims, along: impl Fn(Axis) -> usize) -> usize {
    axes(d).map(along).iter().product()
}

/// The bytes of `x` that the forward pass and the weight gradient read.
fn read_bytes(x: &Tensor, d: &Conv2dDims) -> usize {
    d.n * of_both(d, Axis::pixels_covered) * d.c * x.dtype().size()
}

/// Threads of a block.
fn threads(dtype: DType) -> [usize; 3] {
    [if dtype == DType::Bf16 { 128 } else { 256 }, 1, 1]
}

/// Computes `y` and, with `groups`, its moments for a batch norm of that many groups, if the tile supports them.
pub(super) fn forward(
    y: &mut Tensor,
    x: &Tensor,
    filters: &Tensor,
    d: &Conv2dDims,
    groups: Option<usize>,
) -> Option<BlockMoments> {
    let rows = d.n * d.p * d.q;
    if is_plain(d) {
        let sizes = GemmSize { m: rows, n: d.k, k: d.c };
        if let Some(groups) = groups {
            return gemm_with_moments(y, x, filters, sizes, groups);
        }
        gemm(GemmKind::Nt, &mut y.view_mut(), x, filters, None, sizes, false);
        return None;
    }
    let tile = table(Gemm::convolution(d), [x, filters]).tile();
    let launch = Launch::new(x.device().gpu(), [tile.tiles, 1, 1], threads(x.dtype()))
        .with_shared(tile.dynamic_shared());
    let mut moments = groups.and_then(|groups| BlockMoments::new(y, rows, groups, &tile));
    let partial = moments.as_mut().map_or(Out::null(), |m| m.partial.device_out());
    let read = read_bytes(x, d);
    macro_rules! of_bf16 {
        ($kernel:ident) => {
            call!(
                $kernel,
                launch,
                d,
                (y.device_out(), partial, x.device_in().reading(read), filters.device_in())
            )
        };
    }
    // SAFETY: the tensors have these sizes, which `check` has accepted; the table picks only tiles that support them.
    unsafe {
        match (x.dtype(), tile.shape) {
            (DType::F32, _) => {
                let x = x.device_in().reading(read);
                call!(conv2d_f32, launch, d, (y.device_out(), x, filters.device_in()));
            }
            (_, TileShape::Large) => of_bf16!(conv2d_bf16_128x128),
            (_, TileShape::Tall) => of_bf16!(conv2d_bf16_256x64),
            (_, TileShape::Half) => of_bf16!(conv2d_bf16_128x64),
            (_, TileShape::Stem) => of_bf16!(conv2d_bf16_stem),
            (_, TileShape::Small) => of_bf16!(conv2d_bf16_64x64),
        }
    }
    moments
}

pub(super) fn data_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    filters: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    if is_plain(d) {
        let sizes = GemmSize { m: d.n * d.h * d.w, n: d.c, k: d.k };
        return gemm(GemmKind::Nn, dx, dy, filters, None, sizes, accumulate);
    }
    // Each phase of the stride has its own taps; the first phase has the most pixels.
    let phases = table(Gemm::data_gradient(d), [dy, filters]);
    let tile = phases.tile();
    let grid = [tile.tiles / phases.count, 1, phases.count];
    let launch = Launch::new(dy.device().gpu(), grid, threads(dy.dtype()))
        .with_shared(tile.dynamic_shared());
    let pixels = match dy.dtype() {
        // Phases without taps, whose gradient is zero, are left alone.
        DType::Bf16 if accumulate => of_both(d, Axis::pixels_with_taps),
        _ => d.h * d.w,
    };
    let size = dy.dtype().size();
    let written = d.n * pixels * d.c * size;
    let read = d.n * of_both(d, Axis::outputs_inside) * d.k * size;
    let filters_read = d.k * of_both(d, Axis::taps_with_pixels) * d.c * size;
    macro_rules! run {
        ($kernel:ident) => {
            call!(
                $kernel,
                launch,
                d,
                (
                    dx.device_out().writing(written).updating(accumulate),
                    dy.device_in().reading(read),
                    filters.device_in().reading(filters_read)
                ),
                i32::from(accumulate)
            )
        };
    }
    // SAFETY: as in `forward`.
    unsafe {
        match (dy.dtype(), tile.shape) {
            (DType::F32, _) => run!(conv2d_data_gradient_f32),
            (_, TileShape::Large) => run!(conv2d_data_gradient_bf16_128x128),
            (_, TileShape::Tall) => run!(conv2d_data_gradient_bf16_256x64),
            (_, TileShape::Half) => run!(conv2d_data_gradient_bf16_128x64),
            _ => run!(conv2d_data_gradient_bf16_64x64),
        }
    }
}

/// The sum runs over all output pixels, with split-K if pixels are many and tiles too few to fill a GPU.
pub(super) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    x: &Tensor,
    dy: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    if is_plain(d) {
        let sizes = GemmSize { m: d.k, n: d.c, k: d.n * d.h * d.w };
        return gemm(GemmKind::Tn, dw, dy, x, None, sizes, accumulate);
    }
    let tile = table(Gemm::weight_gradient(d), [x, dy]).tile();
    let grid = [tile.tiles, 1, tile.splits];
    let launch = Launch::new(x.device().gpu(), grid, threads(x.dtype()));
    let read = read_bytes(x, d);
    let run = |out: &mut TensorMut<'_>, accumulate: bool| {
        macro_rules! run {
            ($kernel:ident) => {
                call!(
                    $kernel,
                    launch,
                    d,
                    (
                        out.device_out().updating(accumulate),
                        x.device_in().reading(read),
                        dy.device_in()
                    ),
                    int(tile.k_per_split),
                    i32::from(accumulate)
                )
            };
        }
        // SAFETY: as in `forward`; `out` holds the filters once per split.
        unsafe {
            match (x.dtype(), tile.shape) {
                (DType::F32, _) => run!(conv2d_weight_gradient_f32),
                (_, TileShape::Large) => run!(conv2d_weight_gradient_bf16_128x128),
                (_, TileShape::Half) => run!(conv2d_weight_gradient_bf16_64x128),
                (_, TileShape::Stem) => run!(conv2d_weight_gradient_bf16_stem),
                (_, TileShape::Small | TileShape::Tall) => run!(conv2d_weight_gradient_bf16_64x64),
            }
        }
    };
    if tile.splits == 1 && dw.dtype() == DType::F32 {
        return run(dw, accumulate);
    }
    let mut partial = Tensor::empty(x.device(), DType::F32, [tile.splits, d.k * d.r * d.s * d.c]);
    run(&mut partial.view_mut(), false);
    split_k_reduce(dw, &partial, tile.splits, accumulate);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(
        expected = "conv2d: 2147483648 pixels, and the GPU kernels support at most 2^31 - 1"
    )]
    fn more_pixels_than_the_kernels_support_are_refused() {
        check(&Conv2dDims::new([1 << 11, 1 << 10, 1 << 10, 4], [8, 3, 3, 4], 1, 1));
    }
}
