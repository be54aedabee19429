//! Convolution of images `x [n, h, w, c]` with filters `w [k, r, s, c]`, without bias:
//! `y[n, p, q, k] = Σ_{r, s, c} x[n, p stride + r - pad, q stride + s - pad, c] w[k, r, s, c]`, zero outside the image.
//!
//! `dx` is the correlation of `dy` with the flipped filters, `dw` the correlation of `x` with `dy`.

mod cuda;
mod reference;

use super::gemm::Moments;
pub use crate::cpu::conv2d::Conv2dDims;
use crate::cpu::conv2d::{self as cpu, Direction};
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Tensor, TensorMut};

/// The part of this operation that [`kernels`](super::kernels) exports.
pub(super) mod kernels {
    pub use crate::cpu::conv2d::{
        Direction, data_gradient, forward, weight_gradient, workspace_len,
    };
}

/// Convolves `x [n, h, w, c]` with `w [k, r, s, c]`. Returns `[n, p, q, k]`.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [1, 1, 3, 1], &[1.0, 2.0, 4.0]);
/// let w = Tensor::from_f64(&device, [1, 1, 2, 1], &[1.0, -1.0]);
/// let y = tape::forward(&mut arena, |tape| ops::conv2d(&tape.input(&x), &tape.input(&w), 1, 0))?;
/// assert_eq!(y.to_f64(), [-1.0, -2.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// As [`Conv2dDims::new`]; on a GPU also if the sizes exceed its kernels' 31-bit indices.
#[track_caller]
pub fn conv2d<'t>(x: &Var<'t>, w: &Var<'t>, stride: usize, pad: usize) -> Var<'t> {
    conv2d_with_moments(x, w, stride, pad, None).0
}

/// [`conv2d`] that also returns the moments of its output for a batch norm of `groups` groups, if a GPU kernel supports them.
#[track_caller]
pub(crate) fn conv2d_with_moments<'t>(
    x: &Var<'t>,
    w: &Var<'t>,
    stride: usize,
    pad: usize,
    groups: Option<usize>,
) -> (Var<'t>, Option<Moments>) {
    x.tape().expect_inputs("conv2d", &[x, w]);
    let d = Conv2dDims::new(
        x.value().dims("conv2d: the input"),
        w.value().dims("conv2d: the filters"),
        stride,
        pad,
    );
    let device = x.tape().device().clone();
    let x = &super::cast(x, w.value().dtype());
    let (x_value, w_value) = (x.value().clone(), w.value().clone());
    let mut y = Tensor::empty(&device, x_value.dtype(), [d.n, d.p, d.q, d.k]);
    let moments = forward(&mut y, &x_value, &w_value, &d, groups);
    let (x_id, w_id) = (x.id(), w.id());
    let y = x.tape().record("conv2d", y, &[x, w], move |dy, gradients| {
        if let Some((mut dw, accumulate)) = gradients.target(w_id, w_value.shape()) {
            weight_gradient(&mut dw, &x_value, &dy, &d, accumulate);
        }
        let mut own = None;
        if let Some((mut dx, accumulate)) = gradients.target_like(x_id, &x_value, &mut own) {
            data_gradient(&mut dx, &dy, &w_value, &d, accumulate);
        }
        if let Some(dx) = own {
            gradients.add(x_id, dx);
        }
    });
    (y, moments)
}

/// Computes `y` from `x` and `w`, and its moments as [`conv2d_with_moments`].
#[track_caller]
pub(crate) fn forward(
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    d: &Conv2dDims,
    groups: Option<usize>,
) -> Option<Moments> {
    if d.is_empty() {
        y.view_mut().fill(0.0);
        return None;
    }
    match x.device().kind() {
        DeviceKind::Cpu => {
            let mut workspace = workspace(x, d, Direction::Forward);
            let (y, x_data, w) = (y.data_mut(), x.data(), w.data());
            x.device().run(|| cpu::forward(y, x_data, w, workspace.data_mut(), d));
        }
        DeviceKind::Cuda => {
            cuda::check(d);
            return cuda::forward(y, x, w, d, groups);
        }
        DeviceKind::Reference => reference::forward(y.data_mut(), x.data(), w.data(), d),
    }
    None
}

/// Computes `dw` from `x` and `dy`, or adds it to the contents of `dw` if `accumulate`.
pub(crate) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    x: &Tensor,
    dy: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    if d.is_empty() {
        if !accumulate {
            dw.fill(0.0);
        }
        return;
    }
    match x.device().kind() {
        DeviceKind::Cpu => {
            let mut workspace = workspace(x, d, Direction::WeightGradient);
            let (dw, x_data, dy) = (dw.data_mut(), x.data(), dy.data());
            let workspace = workspace.data_mut();
            x.device().run(|| cpu::weight_gradient(dw, x_data, dy, workspace, d, accumulate));
        }
        DeviceKind::Cuda => cuda::weight_gradient(dw, x, dy, d, accumulate),
        DeviceKind::Reference => {
            reference::weight_gradient(dw.data_mut(), x.data(), dy.data(), d, accumulate);
        }
    }
}

/// Computes `dx` from `dy` and `w`, or adds it to the contents of `dx` if `accumulate`.
pub(crate) fn data_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    w: &Tensor,
    d: &Conv2dDims,
    accumulate: bool,
) {
    if d.is_empty() {
        if !accumulate {
            dx.fill(0.0);
        }
        return;
    }
    match dy.device().kind() {
        DeviceKind::Cpu => {
            let mut workspace = workspace(dy, d, Direction::DataGradient);
            let (dx, dy_data, w) = (dx.data_mut(), dy.data(), w.data());
            let workspace = workspace.data_mut();
            dy.device().run(|| cpu::data_gradient(dx, dy_data, w, workspace, d, accumulate));
        }
        DeviceKind::Cuda => cuda::data_gradient(dx, dy, w, d, accumulate),
        DeviceKind::Reference => {
            reference::data_gradient(dx.data_mut(), dy.data(), w.data(), d, accumulate);
        }
    }
}

fn workspace(x: &Tensor, d: &Conv2dDims, direction: Direction) -> Tensor {
    Tensor::floats(x.device(), [cpu::workspace_len(d, direction)])
}
