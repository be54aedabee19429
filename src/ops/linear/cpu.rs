//! The path for f32, by GEMMs of `cpu::gemm` in blocks of rows, and for bf16, by those of `cpu::bf16`.

use super::LinearDims;
use crate::cpu::bf16::{self, Gemm, GemmKind, GemmSize, Output};
use crate::cpu::{Matrix, gemm};
use crate::tensor::{Activation, DType, Tensor, TensorMut};

pub(super) fn forward(
    y: &mut TensorMut<'_>,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    dims: LinearDims,
) {
    let LinearDims { n, d, k } = dims;
    let bias = bias.map(Tensor::data::<f32>);
    if x.dtype() == DType::Bf16 {
        let size = GemmSize { m: n, n: k, k: d };
        return gemm_in_bf16(GemmKind::Nt, y, [x, w], bias, size, false);
    }
    let (y, x_data, w) = (y.data_mut(), x.data(), w.data());
    x.device().run(|| {
        if let Some(bias) = bias {
            y.chunks_exact_mut(k.max(1)).for_each(|row| row.copy_from_slice(bias));
        }
        let (x, w) = (Matrix::new(x_data, n, d), Matrix::new(w, k, d));
        gemm(y, x, w.transposed(), bias.is_some());
    });
}

pub(super) fn input_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    w: &Tensor,
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    if dy.dtype() == DType::Bf16 {
        let size = GemmSize { m: n, n: d, k };
        return gemm_in_bf16(GemmKind::Nn, dx, [dy, w], None, size, accumulate);
    }
    let (dx, dy_data, w) = (dx.data_mut(), dy.data(), w.data());
    dy.device().run(|| gemm(dx, Matrix::new(dy_data, n, k), Matrix::new(w, k, d), accumulate));
}

pub(super) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    dy: &Tensor,
    x: &Tensor,
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    if dy.dtype() == DType::Bf16 {
        let size = GemmSize { m: k, n: d, k: n };
        return gemm_in_bf16(GemmKind::Tn, dw, [dy, x], None, size, accumulate);
    }
    let (dw, dy_data, x) = (dw.data_mut(), dy.data(), x.data());
    dy.device().run(|| {
        gemm(dw, Matrix::new(dy_data, n, k).transposed(), Matrix::new(x, n, d), accumulate);
    });
}

/// A GEMM of two bf16 matrices into a tensor of f32, for gradients of parameters, or of bf16.
fn gemm_in_bf16(
    kind: GemmKind,
    c: &mut TensorMut<'_>,
    [a, b]: [&Tensor; 2],
    bias: Option<&[f32]>,
    size: GemmSize,
    accumulate: bool,
) {
    let mut workspace = Tensor::floats(a.device(), [bf16::gemm_workspace_len(kind, size)]);
    let workspace = workspace.data_mut();
    let c = match c.dtype() {
        DType::Bf16 => Output::Bf16(c.data_mut()),
        _ => Output::F32(c.data_mut()),
    };
    let gemm = Gemm { kind, size, a: a.data(), b: b.data(), bias, accumulate };
    a.device().run(|| bf16::gemm(c, &gemm, workspace));
}

pub(super) fn bias_gradient<T: Activation>(db: &mut [f32], dy: &[T], accumulate: bool) {
    if !accumulate {
        db.fill(0.0);
    }
    for row in dy.chunks_exact(db.len().max(1)) {
        for (db, dy) in db.iter_mut().zip(row) {
            *db += dy.load();
        }
    }
}
