//! Convolutions of bf16 images by Winograd's transforms: rows are widened on their way in and rounded once on their way out,
//! everything between is in f32. The results are those of products of bf16 operands with sums in f32, but for the transforms'
//! rounding, which is hundreds of times smaller than that of a bf16 result.

use half::bf16;

use super::{Algorithm, Conv2dDims, Direction, Isa, aligned, winograd, winograd_weight};
use crate::cpu::bf16::widen;
use selfsup_cpu_kernels::LINE;
use selfsup_cpu_kernels::transform::Form;

/// What Winograd's transforms are weighed against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cpu) enum Against {
    /// The direct sum in f32.
    F32,
    /// Dot products of AVX512-BF16, which do twice as many products a second.
    Dots,
}

/// The form that is faster, or `None`. Measured on Zen 5, time of dot products over time of F(4x4, 3x3): 1.5 to 1.6 with 32x32
/// pixels and 64 channels, 1.5 with 16x16 and 128, 1.2 to 1.3 with 8x8 and 256, where there are at least 3.3 times as many
/// products; 0.8 to 1.0 with 4x4, 7x7 and 14x14 pixels and 256 to 512 channels, where there are 2.5 to 2.8 times as many.
pub(in crate::cpu) fn form(d: &Conv2dDims, direction: Direction, than: Against) -> Option<Form> {
    let Algorithm::Winograd(form) = Algorithm::select(d, direction) else { return None };
    let faster = match than {
        Against::F32 => true,
        Against::Dots => winograd::direct_products(d) >= 3 * winograd::products(d, form),
    };
    faster.then_some(form)
}

/// Floats of the filters in f32, which start on a line as what follows them does.
fn filters_len(d: &Conv2dDims) -> usize {
    (d.k * d.r * d.s * d.c).next_multiple_of(LINE)
}

/// Floats of scratch for a direction in a [form].
pub(in crate::cpu) fn workspace_len(d: &Conv2dDims, direction: Direction, form: Form) -> usize {
    let isa = Isa::current();
    let problem = |p: &winograd::Problem| filters_len(d) + winograd::workspace_len::<bf16>(p, isa);
    let len = match direction {
        Direction::Forward => problem(&winograd::Problem::forward(d, form)),
        Direction::DataGradient => problem(&winograd::Problem::data_gradient(d, form)),
        Direction::WeightGradient => winograd_weight::workspace_len::<bf16>(d, form, isa),
    };
    len + LINE - 1
}

/// The workspace from its first line on.
fn lines<'a>(workspace: &'a mut [f32], d: &Conv2dDims, of: (Direction, Form)) -> &'a mut [f32] {
    aligned(workspace, workspace_len(d, of.0, of.1) - (LINE - 1))
}

/// y from x and w. The lengths have been checked.
pub(in crate::cpu) fn forward(
    y: &mut [bf16],
    x: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    d: &Conv2dDims,
    form: Form,
) {
    let p = winograd::Problem::forward(d, form);
    run(&p, y, x, w, lines(workspace, d, (Direction::Forward, form)), filters_len(d), false);
}

/// dx from dy and w; added if `accumulate`. The lengths have been checked.
pub(in crate::cpu) fn data_gradient(
    dx: &mut [bf16],
    dy: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    (d, form): (&Conv2dDims, Form),
    accumulate: bool,
) {
    let p = winograd::Problem::data_gradient(d, form);
    let workspace = lines(workspace, d, (Direction::DataGradient, form));
    run(&p, dx, dy, w, workspace, filters_len(d), accumulate);
}

fn run(
    p: &winograd::Problem,
    out: &mut [bf16],
    x: &[bf16],
    w: &[bf16],
    workspace: &mut [f32],
    filters_len: usize,
    accumulate: bool,
) {
    let (filters, workspace) = workspace.split_at_mut(filters_len);
    let filters = &mut filters[..w.len()];
    widen(filters, w);
    winograd::run(p, Isa::current(), out, x, filters, workspace, accumulate);
}

/// dw from x and dy; added if `accumulate`. The lengths have been checked.
pub(in crate::cpu) fn weight_gradient(
    dw: &mut [f32],
    x: &[bf16],
    dy: &[bf16],
    workspace: &mut [f32],
    (d, form): (&Conv2dDims, Form),
    accumulate: bool,
) {
    let workspace = lines(workspace, d, (Direction::WeightGradient, form));
    winograd_weight::run(d, (form, Isa::current()), dw, x, dy, workspace, accumulate);
}
