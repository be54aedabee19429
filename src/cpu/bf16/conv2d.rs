//! Convolution in bf16, in the three directions and the layouts of `crate::cpu::conv2d`.

use half::bf16;

use super::convert::widen;
use super::gemm::store;
use super::{Bf16Path, Moments, blocks, moments};
use crate::cpu::conv2d::bf16::{self as winograd, Against};
use crate::cpu::conv2d::{self as f32_conv2d, Conv2dDims, Direction};
use selfsup_cpu_kernels::transform::Form;

/// How a direction is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// Products in bf16.
    Blocks,
    /// Winograd's transforms in f32.
    Winograd(Form),
    /// The f32 kernels on widened operands.
    Widened,
}

impl Algorithm {
    /// Selects the fastest, from the shape alone.
    pub(super) fn select(path: Bf16Path, d: &Conv2dDims, direction: Direction) -> Algorithm {
        let (than, otherwise) = match path {
            // Tiles do eight times as many products a second as f32.
            Bf16Path::Amx => return Algorithm::Blocks,
            Bf16Path::Avx512 => (Against::Dots, Algorithm::Blocks),
            Bf16Path::Portable => (Against::F32, Algorithm::Widened),
        };
        winograd::form(d, direction, than).map_or(otherwise, Algorithm::Winograd)
    }
}

/// Floats of scratch that `direction` needs. Depends on the dims and [`Bf16Path::current`] only.
pub fn workspace_len(d: &Conv2dDims, direction: Direction) -> usize {
    workspace_len_on(Bf16Path::current(), d, direction)
}

/// Computes y `[n, p, q, k]`, which is overwritten, from x `[n, h, w, c]` and w `[k, r, s, c]`; and the moments of y, if they
/// are wanted. The workspace may hold any values.
///
/// # Panics
/// If the length of a slice is not its shape's, the images are not a multiple of the groups, or the workspace is shorter than
/// [`workspace_len`].
#[track_caller]
pub fn forward(
    y: &mut [bf16],
    x: &[bf16],
    w: &[bf16],
    moments: Option<Moments<'_>>,
    workspace: &mut [f32],
    d: &Conv2dDims,
) {
    forward_on(Bf16Path::current(), y, x, w, moments, workspace, d);
}

/// Computes dx `[n, h, w, c]` from dy `[n, p, q, k]` and w `[k, r, s, c]`; dx is overwritten, or added to if `accumulate`.
///
/// # Panics
/// As [`forward`].
#[track_caller]
pub fn data_gradient(
    dx: &mut [bf16],
    dy: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    data_gradient_on(Bf16Path::current(), dx, dy, w, workspace, d, accumulate);
}

/// Computes dw `[k, r, s, c]`, in f32, from x `[n, h, w, c]` and dy `[n, p, q, k]`; dw is overwritten, or added to if
/// `accumulate`.
///
/// # Panics
/// As [`forward`].
#[track_caller]
pub fn weight_gradient(
    dw: &mut [f32],
    x: &[bf16],
    dy: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    weight_gradient_on(Bf16Path::current(), dw, x, dy, workspace, d, accumulate);
}

/// Elements of image, filters and output.
fn lens(d: &Conv2dDims) -> [usize; 3] {
    [d.n * d.h * d.w * d.c, d.k * d.r * d.s * d.c, d.n * d.p * d.q * d.k]
}

pub(super) fn workspace_len_on(path: Bf16Path, d: &Conv2dDims, direction: Direction) -> usize {
    if d.is_empty() {
        return 0;
    }
    // As many groups as images: the most scratch that moments can need.
    let moments = || moments::workspace_len(d.n * d.p * d.q, d.k, d.n);
    match Algorithm::select(path, d, direction) {
        Algorithm::Blocks => blocks::conv2d_workspace_len(path, d, direction),
        Algorithm::Winograd(form) => winograd::workspace_len(d, direction, form).max(moments()),
        Algorithm::Widened => {
            let kernel = f32_conv2d::workspace_len(d, direction);
            lens(d).iter().sum::<usize>() + kernel.max(moments())
        }
    }
}

/// Checks the lengths of image, filters, output and workspace.
#[track_caller]
fn check(
    path: Bf16Path,
    d: &Conv2dDims,
    direction: Direction,
    found: [usize; 3],
    workspace: &[f32],
) {
    assert_eq!(
        found,
        lens(d),
        "conv2d {direction:?}: elements of image, filters and output for {d:?}"
    );
    let needed = workspace_len_on(path, d, direction);
    assert!(
        workspace.len() >= needed,
        "conv2d {direction:?}: workspace of {} floats, {needed} needed for {d:?}",
        workspace.len()
    );
}

#[track_caller]
pub(super) fn forward_on(
    path: Bf16Path,
    y: &mut [bf16],
    x: &[bf16],
    w: &[bf16],
    moments: Option<Moments<'_>>,
    workspace: &mut [f32],
    d: &Conv2dDims,
) {
    check(path, d, Direction::Forward, [x.len(), w.len(), y.len()], workspace);
    if let Some(moments) = &moments {
        moments.check(d.n, d.k);
    }
    if d.is_empty() {
        y.fill(bf16::ZERO);
        if let Some(moments) = moments {
            moments.mean.fill(0.0);
            moments.variance.fill(0.0);
        }
        return;
    }
    match Algorithm::select(path, d, Direction::Forward) {
        Algorithm::Blocks => blocks::forward(path, y, x, w, moments, workspace, d),
        Algorithm::Winograd(form) => {
            winograd::forward(y, x, w, workspace, d, form);
            if let Some(moments) = moments {
                moments.of_rows(y, d.k, workspace);
            }
        }
        Algorithm::Widened => {
            let Widened { x, w, sums, workspace } =
                Widened::new(d, Some(x), Some(w), None, workspace);
            f32_conv2d::forward(sums, x, w, workspace, d);
            store(y, sums, false);
            if let Some(moments) = moments {
                moments.of_rows(y, d.k, workspace);
            }
        }
    }
}

#[track_caller]
pub(super) fn data_gradient_on(
    path: Bf16Path,
    dx: &mut [bf16],
    dy: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    check(path, d, Direction::DataGradient, [dx.len(), w.len(), dy.len()], workspace);
    if d.is_empty() {
        if !accumulate {
            dx.fill(bf16::ZERO);
        }
        return;
    }
    match Algorithm::select(path, d, Direction::DataGradient) {
        Algorithm::Blocks => blocks::data_gradient(path, dx, dy, w, workspace, d, accumulate),
        Algorithm::Winograd(form) => {
            winograd::data_gradient(dx, dy, w, workspace, (d, form), accumulate);
        }
        Algorithm::Widened => {
            let Widened { x, w, sums, workspace } =
                Widened::new(d, None, Some(w), Some(dy), workspace);
            f32_conv2d::data_gradient(x, sums, w, workspace, d, false);
            store(dx, x, accumulate);
        }
    }
}

#[track_caller]
pub(super) fn weight_gradient_on(
    path: Bf16Path,
    dw: &mut [f32],
    x: &[bf16],
    dy: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    accumulate: bool,
) {
    check(path, d, Direction::WeightGradient, [x.len(), dw.len(), dy.len()], workspace);
    if d.is_empty() {
        if !accumulate {
            dw.fill(0.0);
        }
        return;
    }
    match Algorithm::select(path, d, Direction::WeightGradient) {
        Algorithm::Blocks => blocks::weight_gradient(path, dw, x, dy, workspace, d, accumulate),
        Algorithm::Winograd(form) => {
            winograd::weight_gradient(dw, x, dy, workspace, (d, form), accumulate);
        }
        Algorithm::Widened => {
            let Widened { x, sums, workspace, .. } =
                Widened::new(d, Some(x), None, Some(dy), workspace);
            f32_conv2d::weight_gradient(dw, x, sums, workspace, d, accumulate);
        }
    }
}

/// The operands of the portable path in f32, and what is left of the workspace.
struct Widened<'a> {
    x: &'a mut [f32],
    w: &'a mut [f32],
    /// The output or its gradient.
    sums: &'a mut [f32],
    workspace: &'a mut [f32],
}

impl<'a> Widened<'a> {
    fn new(
        d: &Conv2dDims,
        x: Option<&[bf16]>,
        w: Option<&[bf16]>,
        dy: Option<&[bf16]>,
        workspace: &'a mut [f32],
    ) -> Self {
        let [x_len, w_len, y_len] = lens(d);
        let (wide_x, rest) = workspace.split_at_mut(x_len);
        let (wide_w, rest) = rest.split_at_mut(w_len);
        let (sums, workspace) = rest.split_at_mut(y_len);
        for (to, from) in [(&mut *wide_x, x), (&mut *wide_w, w), (&mut *sums, dy)] {
            if let Some(from) = from {
                widen(to, from);
            }
        }
        Self { x: wide_x, w: wide_w, sums, workspace }
    }
}
