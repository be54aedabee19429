//! The convolution on the CPU, in f32, as functions of slices.
//!
//! `y[n, p, q, k] = sum over r, s, c of x[n, p t + r - pad, q t + s - pad, c] w[k, r, s, c]`, its
//! gradient with respect to `x` and that with respect to `w`.
//!
//! A direct convolution: no im2col matrix, one register tile for each direction, as in oneDNN's
//! `jit:avx512_core` (Georganas et al. 2018, "Anatomy of high-performance deep learning
//! convolutions on SIMD architectures"). Activations stay channels-last outside; a band of rows at
//! a time is rearranged in the workspace. 3x3 convolutions of stride 1 go through Winograd's
//! F(2x2, 3x3) where it is the faster one: see `winograd.rs` and `winograd_weight.rs`.
//!
//! The work is cut by shape and instruction set, never by thread count: the same bits on any rayon
//! pool. Run inside the pool that should do the work. Nothing is allocated. There is no bias, no
//! dilation, no grouping, no bf16 here.

mod correlation;
mod dims;
mod filter;
mod kernel;
mod problem;
mod slab;
mod slots;
#[cfg(test)]
mod tests;
mod tile;
mod transform;
mod vector;
mod weight;
mod winograd;
mod winograd_weight;

pub use super::Isa;
pub use dims::Conv2dDims;

use problem::Problem;

/// Which of the three products a workspace is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `y` from `x` and `w`.
    Forward,
    /// `dx` from `dy` and `w`.
    DataGradient,
    /// `dw` from `x` and `dy`.
    WeightGradient,
}

/// Floats of scratch that `direction` needs: packed filters, bands of rows or groups of tiles,
/// partial sums. Depends on the dims and the machine's instruction set only.
pub fn workspace_len(d: &Conv2dDims, direction: Direction) -> usize {
    workspace_len_on(Isa::current(), d, direction)
}

/// x `[n, h, w, c]`; w `[k, r, s, c]`; y `[n, p, q, k]`, overwritten. The workspace may hold
/// anything.
///
/// # Panics
/// If a slice is not as long as its shape says, or the workspace is shorter than [`workspace_len`].
#[track_caller]
pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], workspace: &mut [f32], d: &Conv2dDims) {
    forward_on(Isa::current(), y, x, w, workspace, d);
}

/// dy `[n, p, q, k]`; w `[k, r, s, c]`; dx `[n, h, w, c]`, overwritten, or added to if
/// `accumulate`.
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

/// x `[n, h, w, c]`; dy `[n, p, q, k]`; dw `[k, r, s, c]`, overwritten, or added to if
/// `accumulate`.
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

/// Floats in a cache line. The pieces of a workspace start on one, or every vector load would touch
/// two lines.
const LINE: usize = 16;

fn workspace_len_on(isa: Isa, d: &Conv2dDims, direction: Direction) -> usize {
    // the caller's slice may start anywhere in a line
    aligned_len(isa, d, direction) + LINE - 1
}

fn aligned_len(isa: Isa, d: &Conv2dDims, direction: Direction) -> usize {
    match direction {
        Direction::Forward if winograd::pays(d) => {
            winograd::workspace_len(&winograd::Problem::forward(d), isa)
        }
        Direction::DataGradient if winograd::pays(d) => {
            winograd::workspace_len(&winograd::Problem::data_gradient(d), isa)
        }
        Direction::Forward => correlation::workspace_len(&Problem::forward(d), isa),
        Direction::DataGradient => correlation::workspace_len(&Problem::data_gradient(d), isa),
        Direction::WeightGradient if winograd_weight::pays(d) => {
            winograd_weight::workspace_len(d, isa)
        }
        Direction::WeightGradient => weight::workspace_len(d, isa),
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
    if winograd::pays(d) {
        winograd::run(&winograd::Problem::forward(d), isa, y, x, w, workspace, false);
    } else {
        correlation::run(&Problem::forward(d), isa, y, x, w, workspace, false);
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
    if winograd::pays(d) {
        let p = winograd::Problem::data_gradient(d);
        winograd::run(&p, isa, dx, dy, w, workspace, accumulate);
    } else {
        correlation::run(&Problem::data_gradient(d), isa, dx, dy, w, workspace, accumulate);
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
    if winograd_weight::pays(d) {
        winograd_weight::run(d, isa, dw, x, dy, workspace, accumulate);
    } else {
        weight::run(d, isa, dw, x, dy, workspace, accumulate);
    }
}

/// The part of the workspace that is used, from the start of a cache line, once the lengths of
/// image, filter and output are found right.
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
    assert!(isa.is_available(), "conv2d {direction:?}: this machine has no {isa:?}");
    let needed = workspace_len_on(isa, d, direction);
    assert!(
        workspace.len() >= needed,
        "conv2d {direction:?}: workspace of {} floats, {needed} needed for {d:?}",
        workspace.len()
    );
    let start = workspace.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
    &mut workspace[start..start + aligned_len(isa, d, direction)]
}
