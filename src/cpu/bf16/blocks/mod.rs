//! bf16 kernels on blocks of 32 by 32 sums: x86-64 Linux, for [`Bf16Path::Amx`] and [`Bf16Path::Avx512`].
//!
//! AMX tiles (`tile`) or dot products do nearly all arithmetic (`block`). The rest is to bring operands into their layout
//! (`pack`) and sums into memory (`finish`), and to cut the work so that operands stay in the caches: products of rows
//! (`rows`), convolutions as sums over taps (`correlate`), and sums over pixels (`weight`).
//!
//! On machines without tiles the tests run their kernels as they are, on emulated instructions (`emulate`).

mod block;
mod correlate;
#[cfg(test)]
pub mod emulate;
mod finish;
mod pack;
mod rows;
mod scratch;
mod tile;
mod weight;

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::gemm::{Gemm, GemmKind, GemmSize, Output, deliver};
use super::{Bf16Path, Moments, moments};
use crate::cpu::conv2d::{Conv2dDims, Direction};
use correlate::Problem;
use finish::Target;
use rows::{Product, Right, Rows};
use weight::Reduction;

/// Asserts that a path's instructions can be used; in tests those of tiles are emulated.
#[track_caller]
fn check(by: Bf16Path, what: &str) {
    let emulated = cfg!(test) && by == Bf16Path::Amx;
    assert!(by.is_available() || emulated, "{what}: this machine lacks the instructions of {by:?}");
}

/// Whether a convolution is a product of rows: its only tap meets a pixel for each output.
fn is_product(d: &Conv2dDims) -> bool {
    (d.r, d.s, d.pad) == (1, 1, 0)
}

/// Whether a convolution is a product of gathered rows, forward and for its weights: a stem, of too few channels for a step.
fn gathers(d: &Conv2dDims) -> bool {
    !is_product(d) && d.c <= 8
}

/// The rows and the terms of the forward pass as a product, if it is one.
fn as_product(d: &Conv2dDims) -> Option<(Rows, usize)> {
    if is_product(d) {
        return Some((Rows::met(d), d.c));
    }
    gathers(d).then_some((Rows::Taps(*d), d.r * d.s * d.c))
}

/// Floats of scratch for [`gemm`].
pub fn gemm_workspace_len(by: Bf16Path, kind: GemmKind, GemmSize { m, n, k }: GemmSize) -> usize {
    let bytes = match kind {
        // A bf16 result is rounded from f32 sums.
        GemmKind::Tn => {
            weight::scratch_len(&Reduction::plain(by, k, [m, n], Rows::All, &[], &[])) + 4 * m * n
        }
        _ => rows::scratch_len(m, n, k, Rows::All, 0),
    };
    bytes.div_ceil(4)
}

/// Computes a GEMM whose result is not empty. The lengths have been checked.
pub fn gemm(by: Bf16Path, c: Output<'_>, gemm: &Gemm<'_>, workspace: &mut [f32]) {
    let Gemm { kind, size: GemmSize { m, n, k }, a, b, bias, accumulate } = *gemm;
    check(by, "gemm");
    if kind == GemmKind::Tn {
        let reduction = Reduction::plain(by, k, [m, n], Rows::All, b, a);
        let (sums, rest) = workspace.split_at_mut(m * n);
        // SAFETY: the path is available, and the operands are borrowed and of these sizes.
        let run = |c: &mut [f32], accumulate: bool, rest: &mut [f32]| unsafe {
            weight::run(&reduction, c, accumulate, rest);
        };
        return match (c, bias) {
            (Output::F32(c), None) => run(c, accumulate, rest),
            (c, bias) => {
                run(sums, false, rest);
                deliver(c, sums, bias, n, accumulate);
            }
        };
    }
    let right = if kind == GemmKind::Nt { Right::Transposed } else { Right::Plain };
    let (a_rows, c_rows) = (Rows::All, Rows::All);
    let product = Product { by, m, n, k, a, a_rows, b, right, bias, accumulate, c_rows };
    let c = match c {
        Output::F32(c) => Target::F32(c.as_mut_ptr()),
        Output::Bf16(c) => Target::Bf16(c.as_mut_ptr().cast()),
    };
    // SAFETY: the path is available; `C` is `m` rows of `n`.
    unsafe { rows::run(&product, c, None, workspace) };
}

/// The most groups whose moments come from the epilogue; more are rare, and small.
const MOST_GROUPS: usize = 8;

/// Floats of scratch for a convolution that is not empty. That of the forward pass is enough for any number of groups.
pub fn conv2d_workspace_len(by: Bf16Path, d: &Conv2dDims, direction: Direction) -> usize {
    let bytes = match direction {
        Direction::Forward => {
            let groups = (1..=MOST_GROUPS).filter(|&groups| d.n.is_multiple_of(groups));
            let with_groups = |groups| match as_product(d) {
                Some((rows, k)) => rows::scratch_len(d.n * d.p * d.q, d.k, k, rows, groups),
                None => correlate::scratch_len(&Problem::forward(by, d), groups),
            };
            let of_rows = 4 * moments::workspace_len(d.n * d.p * d.q, d.k, d.n);
            groups.map(with_groups).fold(with_groups(0).max(of_rows), usize::max)
        }
        Direction::DataGradient if is_product(d) => {
            rows::scratch_len(d.n * d.p * d.q, d.c, d.k, Rows::All, 0)
        }
        Direction::DataGradient => correlate::scratch_len(&Problem::data_gradient(by, d), 0),
        Direction::WeightGradient => weight::scratch_len(&Reduction::convolution(by, d, &[], &[])),
    };
    bytes.div_ceil(4)
}

/// The forward pass of a convolution that is not empty. The lengths have been checked.
pub fn forward(
    by: Bf16Path,
    y: &mut [bf16],
    x: &[bf16],
    w: &[bf16],
    moments: Option<Moments<'_>>,
    workspace: &mut [f32],
    d: &Conv2dDims,
) {
    check(by, "conv2d");
    let (own, apart) = match moments {
        Some(moments) if moments.groups > MOST_GROUPS => (None, Some(moments)),
        moments => (moments, None),
    };
    let to = Target::Bf16(y.as_mut_ptr().cast());
    if let Some((a_rows, k)) = as_product(d) {
        let product = Product {
            by,
            m: d.n * d.p * d.q,
            n: d.k,
            k,
            a: x,
            a_rows,
            b: w,
            right: Right::Transposed,
            bias: None,
            accumulate: false,
            c_rows: Rows::All,
        };
        // SAFETY: the path is available; `y` has a row for each pixel.
        unsafe { rows::run(&product, to, own, workspace) };
    } else {
        let problem = Problem::forward(by, d);
        // SAFETY: the path is available, and the slices are of these sizes.
        unsafe { correlate::run(&problem, to, x, w, false, own, workspace) };
    }
    if let Some(moments) = apart {
        moments.of_rows(y, d.k, workspace);
    }
}

/// The data gradient of a convolution that is not empty. The lengths have been checked.
pub fn data_gradient(
    by: Bf16Path,
    dx: &mut [bf16],
    dy: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    check(by, "conv2d");
    if !is_product(d) {
        let (problem, to) = (Problem::data_gradient(by, d), Target::Bf16(dx.as_mut_ptr().cast()));
        // SAFETY: the path is available, and the slices are of these sizes.
        return unsafe { correlate::run(&problem, to, dy, w, accumulate, None, workspace) };
    }
    // Pixels that the stride leaves out have no gradient.
    if d.n * d.p * d.q < d.n * d.h * d.w && !accumulate {
        dx.par_chunks_mut(1 << 16).each(|dx| dx.fill(bf16::ZERO));
    }
    let product = Product {
        by,
        m: d.n * d.p * d.q,
        n: d.c,
        k: d.k,
        a: dy,
        a_rows: Rows::All,
        b: w,
        right: Right::Plain,
        bias: None,
        accumulate,
        c_rows: Rows::met(d),
    };
    // SAFETY: the path is available; `dx` has the rows that the convolution meets.
    unsafe { rows::run(&product, Target::Bf16(dx.as_mut_ptr().cast()), None, workspace) };
}

/// The weight gradient of a convolution that is not empty. The lengths have been checked.
pub fn weight_gradient(
    by: Bf16Path,
    dw: &mut [f32],
    x: &[bf16],
    dy: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    check(by, "conv2d");
    let reduction = Reduction::convolution(by, d, x, dy);
    // SAFETY: the path is available, and the slices are borrowed and of these sizes.
    unsafe { weight::run(&reduction, dw, accumulate, workspace) };
}
