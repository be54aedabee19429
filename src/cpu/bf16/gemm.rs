//! GEMMs of bf16 matrices.

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::convert::{add_rounded_sequential, bits_mut, round_sequential, widen};
use super::{Bf16Path, blocks};
use crate::cpu::{Matrix, gemm as gemm_f32};

/// How the operands of `C [m, n] = A B` lie in memory; all matrices are row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GemmKind {
    /// `A [m, k]` and the transpose of `B [n, k]`: forward.
    Nt,
    /// `A [m, k]` and `B [k, n]`: gradient of the input.
    Nn,
    /// The transpose of `A [k, m]` and `B [k, n]`: gradient of the weights.
    Tn,
}

/// `C [m, n] = A B` over `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GemmSize {
    /// Rows of `C`.
    pub m: usize,
    /// Columns of `C`.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
}

/// Where a GEMM writes `C [m, n]`.
#[derive(Debug)]
pub enum Output<'a> {
    /// Sums as they are.
    F32(&'a mut [f32]),
    /// Sums rounded to the nearest bf16, ties to even.
    Bf16(&'a mut [bf16]),
}

impl Output<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Output::F32(c) => c.len(),
            Output::Bf16(c) => c.len(),
        }
    }
}

/// A GEMM: `C = A B + bias`, or `C += A B + bias` if `accumulate`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// The layout of the operands.
    pub kind: GemmKind,
    /// The sizes.
    pub size: GemmSize,
    /// The left operand, `m k` elements.
    pub a: &'a [bf16],
    /// The right operand, `k n` elements.
    pub b: &'a [bf16],
    /// `[n]`, added to every row of the product.
    pub bias: Option<&'a [f32]>,
    /// Whether the result is added to what `C` holds.
    pub accumulate: bool,
}

/// Floats of scratch that [`gemm`] needs. Depends on its arguments and [`Bf16Path::current`] only.
pub fn gemm_workspace_len(kind: GemmKind, size: GemmSize) -> usize {
    workspace_len_on(Bf16Path::current(), kind, size)
}

/// Computes a GEMM. The workspace may hold any values.
///
/// # Panics
/// If the length of a slice is not its shape's, or the workspace is shorter than [`gemm_workspace_len`].
#[track_caller]
pub fn gemm(c: Output<'_>, gemm: &Gemm<'_>, workspace: &mut [f32]) {
    gemm_on(Bf16Path::current(), c, gemm, workspace);
}

pub(super) fn workspace_len_on(path: Bf16Path, kind: GemmKind, size: GemmSize) -> usize {
    let GemmSize { m, n, k } = size;
    if m * n == 0 {
        return 0;
    }
    match path {
        Bf16Path::Portable => (m + n) * k + m * n,
        Bf16Path::Amx | Bf16Path::Avx512 => blocks::gemm_workspace_len(path, kind, size),
    }
}

#[track_caller]
pub(super) fn gemm_on(path: Bf16Path, c: Output<'_>, gemm: &Gemm<'_>, workspace: &mut [f32]) {
    let Gemm { kind, size, a, b, bias, .. } = *gemm;
    let GemmSize { m, n, k } = size;
    assert_eq!(
        [c.len(), a.len(), b.len(), bias.map_or(n, <[f32]>::len)],
        [m * n, m * k, k * n, n],
        "gemm: elements of C, A, B and bias for {kind:?} of {size:?}"
    );
    let needed = workspace_len_on(path, kind, size);
    assert!(
        workspace.len() >= needed,
        "gemm: workspace of {} floats, {needed} needed for {kind:?} of {size:?}",
        workspace.len()
    );
    if m * n == 0 {
        return;
    }
    match path {
        Bf16Path::Portable => portable(c, gemm, workspace),
        Bf16Path::Amx | Bf16Path::Avx512 => blocks::gemm(path, c, gemm, workspace),
    }
}

/// [`gemm`] by the f32 kernels.
fn portable(c: Output<'_>, gemm: &Gemm<'_>, workspace: &mut [f32]) {
    let Gemm { kind, size: GemmSize { m, n, k }, a, b, bias, accumulate } = *gemm;
    let (wide_a, rest) = workspace.split_at_mut(m * k);
    let (wide_b, rest) = rest.split_at_mut(k * n);
    widen(wide_a, a);
    widen(wide_b, b);
    let (a, b) = match kind {
        GemmKind::Nt => (Matrix::new(wide_a, m, k), Matrix::new(wide_b, n, k).transposed()),
        GemmKind::Nn => (Matrix::new(wide_a, m, k), Matrix::new(wide_b, k, n)),
        GemmKind::Tn => (Matrix::new(wide_a, k, m).transposed(), Matrix::new(wide_b, k, n)),
    };
    let sums = &mut rest[..m * n];
    match (c, bias) {
        (Output::F32(c), None) => gemm_f32(c, a, b, accumulate),
        (c, bias) => {
            gemm_f32(sums, a, b, false);
            deliver(c, sums, bias, n, accumulate);
        }
    }
}

/// `c = sums + bias`, or `c += sums + bias` if `accumulate`, in rows of `n`. Results in bf16 are rounded once.
pub(super) fn deliver(
    c: Output<'_>,
    sums: &mut [f32],
    bias: Option<&[f32]>,
    n: usize,
    accumulate: bool,
) {
    if let Some(bias) = bias {
        let rows = sums.par_chunks_exact_mut(n);
        rows.each(|row| row.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias));
    }
    match c {
        Output::Bf16(c) => store(c, sums, accumulate),
        Output::F32(c) if accumulate => {
            let rows = c.par_chunks_exact_mut(n).zip(sums.par_chunks_exact(n));
            rows.each(|(c, sums)| c.iter_mut().zip(sums).for_each(|(c, sum)| *c += sum));
        }
        Output::F32(c) => c.copy_from_slice(sums),
    }
}

/// `to = sums`, or `to += sums` if `accumulate`, rounded once.
pub(super) fn store(to: &mut [bf16], sums: &[f32], accumulate: bool) {
    let chunks = to.par_chunks_mut(1 << 16).zip(sums.par_chunks(1 << 16));
    chunks.each(|(to, sums)| {
        let store = if accumulate { add_rounded_sequential } else { round_sequential };
        store(bits_mut(to), sums);
    });
}
