//! Convolution of images `x [n, h, w, c]` with filters `w [k, r, s, c]`, without bias:
//! `y[n, p, q, k] = Σ_{r, s, c} x[n, p stride + r - pad, q stride + s - pad, c] w[k, r, s, c]`, zero outside the image.
//!
//! `dx` is the correlation of `dy` with the flipped filters, `dw` the correlation of `x` with `dy`.

mod cuda;
mod reference;

use super::gemm::Moments;
use crate::cpu::bf16;
pub use crate::cpu::conv2d::Conv2dDims;
use crate::cpu::conv2d::{self as cpu, Direction};
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{DType, Tensor, TensorMut};

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

/// [`conv2d`] that also returns the moments of its output for a batch norm of `groups` groups, if a kernel has them.
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
        let [mut own_dw, mut own_dx] = [None, None];
        let dw = match device.kind() {
            DeviceKind::Cuda => gradients.target(w_id, w_value.shape()), // of any dtype
            _ => gradients.target_as(w_id, DType::of(&device), w_value.shape(), &mut own_dw),
        };
        if let Some((mut dw, accumulate)) = dw {
            weight_gradient(&mut dw, &x_value, &dy, &d, accumulate);
        }
        if let Some((mut dx, accumulate)) = gradients.target_like(x_id, &x_value, &mut own_dx) {
            data_gradient(&mut dx, &dy, &w_value, &d, accumulate);
        }
        for (id, own) in [(w_id, own_dw), (x_id, own_dx)] {
            if let Some(own) = own {
                gradients.add(id, own);
            }
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
            let workspace = workspace.data_mut();
            if x.dtype() == DType::Bf16 {
                return forward_in_bf16(y, x, w, workspace, d, groups);
            }
            let (y, x_data, w) = (y.data_mut(), x.data(), w.data());
            x.device().run(|| cpu::forward(y, x_data, w, workspace, d));
        }
        DeviceKind::Cuda => {
            cuda::check(d);
            return cuda::forward(y, x, w, d, groups).map(Moments::Blocks);
        }
        DeviceKind::Reference => reference::forward(y.data_mut(), x.data(), w.data(), d),
    }
    None
}

/// [`forward`] on a CPU in bf16, with moments if each group has whole images.
fn forward_in_bf16(
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    workspace: &mut [f32],
    d: &Conv2dDims,
    groups: Option<usize>,
) -> Option<Moments> {
    let (y, x_data, w) = (y.data_mut(), x.data(), w.data());
    let groups = groups.filter(|groups| d.n.is_multiple_of(*groups));
    let mut moments = groups.map(|groups| {
        let of = || Tensor::floats(x.device(), [groups, d.k]);
        (of(), of())
    });
    let wanted = moments.as_mut().map(|(mean, variance)| bf16::Moments {
        groups: mean.shape()[0],
        mean: mean.data_mut(),
        variance: variance.data_mut(),
    });
    x.device().run(|| bf16::conv2d::forward(y, x_data, w, wanted, workspace, d));
    moments.map(|(mean, variance)| Moments::Groups { mean, variance })
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
            let (dw, workspace) = (dw.data_mut(), workspace.data_mut());
            if x.dtype() == DType::Bf16 {
                let (x_data, dy) = (x.data(), dy.data());
                let run =
                    || bf16::conv2d::weight_gradient(dw, x_data, dy, workspace, d, accumulate);
                x.device().run(run);
            } else {
                let (x_data, dy) = (x.data(), dy.data());
                x.device().run(|| cpu::weight_gradient(dw, x_data, dy, workspace, d, accumulate));
            }
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
            let workspace = workspace.data_mut();
            if dy.dtype() == DType::Bf16 {
                let (dx, dy_data, w) = (dx.data_mut(), dy.data(), w.data());
                let run = || bf16::conv2d::data_gradient(dx, dy_data, w, workspace, d, accumulate);
                dy.device().run(run);
            } else {
                let (dx, dy_data, w) = (dx.data_mut(), dy.data(), w.data());
                dy.device().run(|| cpu::data_gradient(dx, dy_data, w, workspace, d, accumulate));
            }
        }
        DeviceKind::Cuda => cuda::data_gradient(dx, dy, w, d, accumulate),
        DeviceKind::Reference => {
            reference::data_gradient(dx.data_mut(), dy.data(), w.data(), d, accumulate);
        }
    }
}

fn workspace(x: &Tensor, d: &Conv2dDims, direction: Direction) -> Tensor {
    let len = match x.dtype() {
        DType::Bf16 => bf16::conv2d::workspace_len(d, direction),
        _ => cpu::workspace_len(d, direction),
    };
    Tensor::floats(x.device(), [len])
}
