//! Convolution on the CPU, in f32, as functions of slices.
//!
//! `y[n, p, q, k] = sum over r, s, c of x[n, p t + r - pad, q t + s - pad, c] w[k, r, s, c]`, its
//! gradient with respect to `x` and that with respect to `w`.
//!
//! A direct convolution without im2col, with one register tile per direction, as in oneDNN's
//! `jit:avx512_core` (Georganas et al. 2018, "Anatomy of high-performance deep learning
//! convolutions on SIMD architectures"). Activations are channels-last; one band of rows at a time
//! is rearranged in the workspace. 3x3 convolutions of stride 1 use Winograd's F(2x2, 3x3) or F(4x4, 3x3) where that
//! is faster: [`Algorithm::select`] decides.
//!
//! Work is partitioned by shape and instruction set, never by thread count, so every rayon pool gives
//! the same bits. Call the functions inside the pool that should do the work. They allocate nothing.
//! Bias, dilation and groups are not supported; `crate::cpu::bf16` has convolutions in bf16.

pub(in crate::cpu) mod bf16;
mod correlation;
mod dims;
mod element;
mod filter;
mod problem;
mod slab;
mod slots;
#[cfg(test)]
mod tests;
mod weight;
mod winograd;
mod winograd_weight;

pub use dims::Conv2dDims;

use problem::Problem;
use selfsup_cpu_kernels::LINE;
use selfsup_cpu_kernels::transform::Form;

use super::Isa;

/// A direction of the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `y` from `x` and `w`.
    Forward,
    /// `dx` from `dy` and `w`.
    DataGradient,
    /// `dw` from `x` and `dy`.
    WeightGradient,
}

/// The algorithm of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    /// The direct sum, of `correlation.rs` or `weight.rs`.
    Direct,
    /// Winograd's F(2x2, 3x3) or F(4x4, 3x3), of `winograd.rs` or `winograd_weight.rs`.
    Winograd(Form),
}

impl Algorithm {
    /// Selects the algorithm, from the shape alone. The only place that decides.
    fn select(d: &Conv2dDims, direction: Direction) -> Algorithm {
        let form = match direction {
            Direction::Forward | Direction::DataGradient => winograd::fastest(d),
            Direction::WeightGradient => winograd_weight::fastest(d),
        };
        form.map_or(Algorithm::Direct, Algorithm::Winograd)
    }
}

/// Returns the floats of scratch that `direction` needs: for packed filters, bands of rows or groups
/// of tiles, and partial sums. Depends on the dims and the machine's instruction set only.
pub fn workspace_len(d: &Conv2dDims, direction: Direction) -> usize {
    workspace_len_on(Isa::current(), d, direction)
}

/// Computes y `[n, p, q, k]`, which is overwritten, from x `[n, h, w, c]` and w `[k, r, s, c]`. The
/// workspace may hold any values.
///
/// # Panics
/// If the length of a slice is not its shape's, or the workspace is shorter than [`workspace_len`].
#[track_caller]
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], workspace: &mut [f32], d: &Conv2dDims) {
    forward_on(Isa::current(), y, x, w, workspace, d);
}

/// Computes dx `[n, h, w, c]` from dy `[n, p, q, k]` and w `[k, r, s, c]`; dx is overwritten, or added
/// to if `accumulate`.
///
/// # Panics
/// As [`forward`].
#[track_caller]
pub fn data_gradient(
    dx: &mut [f32],
    dy: &[f32],
    w: &[f32],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    data_gradient_on(Isa::current(), dx, dy, w, workspace, d, accumulate);
}

/// Computes dw `[k, r, s, c]` from x `[n, h, w, c]` and dy `[n, p, q, k]`; dw is overwritten, or added
/// to if `accumulate`.
///
/// # Panics
/// As [`forward`].
#[track_caller]
pub fn weight_gradient(
    dw: &mut [f32],
    x: &[f32],
    dy: &[f32],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    weight_gradient_on(Isa::current(), dw, x, dy, workspace, d, accumulate);
}

fn workspace_len_on(isa: Isa, d: &Conv2dDims, direction: Direction) -> usize {
    // the caller's slice may start at any float of a line
    aligned_len(isa, d, direction) + LINE - 1
}

fn aligned_len(isa: Isa, d: &Conv2dDims, direction: Direction) -> usize {
    if d.is_empty() {
        return 0;
    }
    use {Algorithm::*, Direction::*};
    match (direction, Algorithm::select(d, direction)) {
        (Forward, Direct) => correlation::workspace_len(&Problem::forward(d), isa),
        (Forward, Winograd(form)) => {
            winograd::workspace_len::<f32>(&winograd::Problem::forward(d, form), isa)
        }
        (DataGradient, Direct) => correlation::workspace_len(&Problem::data_gradient(d), isa),
        (DataGradient, Winograd(form)) => {
            winograd::workspace_len::<f32>(&winograd::Problem::data_gradient(d, form), isa)
        }
        (WeightGradient, Direct) => weight::workspace_len(d, isa),
        (WeightGradient, Winograd(form)) => winograd_weight::workspace_len::<f32>(d, form, isa),
    }
}

#[track_caller]
fn forward_on(
    isa: Isa,
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    workspace: &mut [f32],
    d: &Conv2dDims,
) {
    let workspace = checked(isa, d, Direction::Forward, [x.len(), w.len(), y.len()], workspace);
    if d.is_empty() {
        return y.fill(0.0);
    }
    match Algorithm::select(d, Direction::Forward) {
        Algorithm::Direct => {
            correlation::run(&Problem::forward(d), isa, y, x, w, workspace, false);
        }
        Algorithm::Winograd(form) => {
            winograd::run(&winograd::Problem::forward(d, form), isa, y, x, w, workspace, false);
        }
    }
}

#[track_caller]
fn data_gradient_on(
    isa: Isa,
    dx: &mut [f32],
    dy: &[f32],
    w: &[f32],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    let workspace =
        checked(isa, d, Direction::DataGradient, [dx.len(), w.len(), dy.len()], workspace);
    if d.is_empty() {
        if !accumulate {
            dx.fill(0.0);
        }
        return;
    }
    match Algorithm::select(d, Direction::DataGradient) {
        Algorithm::Direct => {
            correlation::run(&Problem::data_gradient(d), isa, dx, dy, w, workspace, accumulate);
        }
        Algorithm::Winograd(form) => {
            let p = winograd::Problem::data_gradient(d, form);
            winograd::run(&p, isa, dx, dy, w, workspace, accumulate);
        }
    }
}

#[track_caller]
fn weight_gradient_on(
    isa: Isa,
    dw: &mut [f32],
    x: &[f32],
    dy: &[f32],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    let workspace =
        checked(isa, d, Direction::WeightGradient, [x.len(), dw.len(), dy.len()], workspace);
    if d.is_empty() {
        if !accumulate {
            dw.fill(0.0);
        }
        return;
    }
    match Algorithm::select(d, Direction::WeightGradient) {
        Algorithm::Direct => weight::run(d, isa, dw, x, dy, workspace, accumulate),
        Algorithm::Winograd(form) => {
            winograd_weight::run(d, (form, isa), dw, x, dy, workspace, accumulate);
        }
    }
}

/// Checks the lengths of image, filter and output, and returns the part of the workspace to use,
/// which starts on a cache line.
#[track_caller]
fn checked<'a>(
    isa: Isa,
    d: &Conv2dDims,
    direction: Direction,
    lens: [usize; 3],
    workspace: &'a mut [f32],
) -> &'a mut [f32] {
    let expected = [d.n * d.h * d.w * d.c, d.k * d.r * d.s * d.c, d.n * d.p * d.q * d.k];
    assert_eq!(
        lens, expected,
        "conv2d {direction:?}: floats of image, filter and output for {d:?}"
    );
    assert!(isa.is_available(), "conv2d {direction:?}: this machine does not support {isa:?}");
    let needed = workspace_len_on(isa, d, direction);
    assert!(
        workspace.len() >= needed,
        "conv2d {direction:?}: workspace of {} floats, {needed} needed for {d:?}",
        workspace.len()
    );
    aligned(workspace, aligned_len(isa, d, direction))
}

/// `len` floats of the workspace that start on a cache line.
fn aligned(workspace: &mut [f32], len: usize) -> &mut [f32] {
    let start = workspace.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
    &mut workspace[start..start + len]
}
