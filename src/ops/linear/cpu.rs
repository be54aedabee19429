//! The f32 path: GEMMs of `cpu::gemm`, in blocks of rows.

use super::LinearDims;
use crate::cpu::{Matrix, gemm};

pub(super) fn forward(y: &mut [f32], x: &[f32], w: &[f32], bias: Option<&[f32]>, dims: LinearDims) {
    let LinearDims { n, d, k } = dims;
    if let Some(bias) = bias {
        y.chunks_exact_mut(k.max(1)).for_each(|row| row.copy_from_slice(bias));
    }
    gemm(y, Matrix::new(x, n, d), Matrix::new(w, k, d).transposed(), bias.is_some());
}

pub(super) fn input_gradient(
    dx: &mut [f32],
    dy: &[f32],
    w: &[f32],
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    gemm(dx, Matrix::new(dy, n, k), Matrix::new(w, k, d), accumulate);
}

pub(super) fn weight_gradient(
    dw: &mut [f32],
    dy: &[f32],
    x: &[f32],
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    gemm(dw, Matrix::new(dy, n, k).transposed(), Matrix::new(x, n, d), accumulate);
}

pub(super) fn bias_gradient(db: &mut [f32], dy: &[f32], accumulate: bool) {
    if !accumulate {
        db.fill(0.0);
    }
    for row in dy.chunks_exact(db.len().max(1)) {
        for (db, dy) in db.iter_mut().zip(row) {
            *db += dy;
        }
    }
}
