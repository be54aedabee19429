//! Rows on the unit sphere: `y_i = x_i / max(|x_i|, eps)`, `x [n, d]`, eps 1e-12 (PyTorch's `normalize`).
//! Losses read unit rows, so the output is f32 even if `x` is bf16.
//!
//! `dx_i = (dy_i - y_i <y_i, dy_i>) / |x_i|`; below eps the norm is a constant and `dx_i = dy_i / eps`.

mod cuda;

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::arena::{Arena, Param, Parts};
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Activation, Float, Tensor, TensorMut, by_activation};

/// Lower bound of the norm in the division.
pub(crate) const EPS: f64 = 1e-12;

/// Scales each row of `x [n, d]` to unit length. The output is f32, even if `x` is bf16.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [1, 2], &[3.0, 4.0]);
/// let y = tape::forward(&mut arena, |tape| ops::l2_normalize(&tape.input(&x)))?;
/// assert_eq!(y.to_f64(), [0.6, 0.8]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If `x` does not have rank 2.
#[track_caller]
pub fn l2_normalize<'t>(x: &Var<'t>) -> Var<'t> {
    let [n, d] = x.value().dims("l2_normalize: the input");
    let device = x.tape().device().clone();
    let mut y = Tensor::floats(&device, [n, d]);
    let mut norms = Tensor::floats(&device, [n]);
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.value().dtype(), T => {
            let (y, norms, x) = (y.data_mut(), norms.data_mut(), x.value().data::<T>());
            device.run(|| forward_cpu(y, norms, x, d));
        }),
        DeviceKind::Cuda => cuda::forward(&mut y, &mut norms, x.value()),
        DeviceKind::Reference => {
            forward_reference(y.data_mut(), norms.data_mut(), x.value().data(), d);
        }
    }
    let (x_id, dtype, saved) = (x.id(), x.value().dtype(), y.clone());
    x.tape().record("l2_normalize", y, &[x], move |dy, gradients| {
        let mut dx = Tensor::empty(&device, dtype, [n, d]);
        match device.kind() {
            DeviceKind::Cpu => by_activation!(dtype, T => {
                let (dy, y, norms) = (dy.data(), saved.data(), norms.data());
                let dx = dx.data_mut::<T>();
                device.run(|| backward_cpu(dx, dy, y, norms, d));
            }),
            DeviceKind::Cuda => cuda::backward(&mut dx, &dy, &saved, &norms),
            DeviceKind::Reference => {
                backward_reference(dx.data_mut(), dy.data(), saved.data(), norms.data(), d);
            }
        }
        gradients.add(x_id, dx);
    })
}

/// Scales each row of a parameter `[n, d]` to unit length in place, without a gradient. SwAV does this to its prototypes before
/// each step.
///
/// # Panics
/// If the parameter does not have rank 2.
#[track_caller]
pub fn normalize_rows(arena: &mut Arena, param: Param) {
    assert_eq!(param.shape().len(), 2, "normalize_rows: {:?} is not a matrix", param.shape());
    arena.layout().expect_param(param);
    let (device, d) = (arena.device().clone(), param.shape()[1].max(1));
    match device.kind() {
        DeviceKind::Cpu => {
            let mut x = arena.value_mut(param);
            x.data_mut::<f32>().chunks_exact_mut(d).for_each(normalize_row);
        }
        DeviceKind::Cuda => {
            let Parts { values, working, .. } = arena.parts();
            cuda::in_place(&device, &mut of(values, param), working.map(|all| of(all, param)));
        }
        DeviceKind::Reference => {
            let mut x = arena.value_mut(param);
            x.data_mut::<f64>().chunks_exact_mut(d).for_each(normalize_row);
        }
    }
}

/// The part of one of the arena's tensors that belongs to a parameter.
fn of(all: &mut Tensor, param: Param) -> TensorMut<'_> {
    all.view_mut().slice(param.offset(), *param.shape())
}

fn normalize_row<T: Float>(row: &mut [T]) {
    let norm = row.iter().map(|v| v.widen().powi(2)).sum::<f64>().sqrt().max(EPS);
    row.iter_mut().for_each(|v| *v = T::narrow(v.widen() / norm));
}

fn forward_cpu<T: Activation>(y: &mut [f32], norms: &mut [f32], x: &[T], d: usize) {
    let rows = y.par_chunks_mut(d.max(1)).zip(x.par_chunks(d.max(1)));
    rows.zip(norms).each(|((y, x), norm)| {
        let square: f64 = x.iter().map(|v| v.widen().powi(2)).sum();
        *norm = square.sqrt() as f32;
        let scale = 1.0 / norm.max(EPS as f32);
        for (y, x) in y.iter_mut().zip(x) {
            *y = x.load() * scale;
        }
    });
}

fn backward_cpu<T: Activation>(dx: &mut [T], dy: &[f32], y: &[f32], norms: &[f32], d: usize) {
    let inputs = dy.par_chunks(d.max(1)).zip(y.par_chunks(d.max(1))).zip(norms);
    dx.par_chunks_mut(d.max(1)).zip(inputs).each(|(dx, ((dy, y), &norm))| {
        let scale = 1.0 / norm.max(EPS as f32);
        let dot = if norm > EPS as f32 {
            y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum::<f64>() as f32
        } else {
            0.0
        };
        for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
            *dx = T::store((dy - y * dot) * scale);
        }
    });
}

fn forward_reference(y: &mut [f64], norms: &mut [f64], x: &[f64], d: usize) {
    for (i, norm) in norms.iter_mut().enumerate() {
        let row = i * d..(i + 1) * d;
        *norm = x[row.clone()].iter().map(|v| v * v).sum::<f64>().sqrt();
        for j in row {
            y[j] = x[j] / norm.max(EPS);
        }
    }
}

fn backward_reference(dx: &mut [f64], dy: &[f64], y: &[f64], norms: &[f64], d: usize) {
    for (i, &norm) in norms.iter().enumerate() {
        let row = i * d..(i + 1) * d;
        let dot: f64 = row.clone().map(|j| y[j] * dy[j]).sum();
        for j in row {
            let along = if norm > EPS { y[j] * dot } else { 0.0 };
            dx[j] = (dy[j] - along) / norm.max(EPS);
        }
    }
}
