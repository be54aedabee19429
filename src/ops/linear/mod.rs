//! Linear layer: `y = x Wᵀ + b` with `x [n, d]`, `W [k, d]`, `b [k]`, `y [n, k]`.
//!
//! `dx = dy W`, `dW = dyᵀ x`, `db = Σ_n dy`. A 1x1 convolution is the same GEMM over pixels.

mod cpu;
mod cuda;
mod reference;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Tensor, by_activation};

/// The sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
struct LinearDims {
    n: usize,
    d: usize,
    k: usize,
}

/// Returns `x Wᵀ + b`, `[n, k]`, in the type of `w`.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [1, 2], &[1.0, 2.0]);
/// let w = Tensor::from_f64(&device, [3, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
/// let y = tape::forward(&mut arena, |tape| ops::linear(&tape.input(&x), &tape.input(&w), None))?;
/// assert_eq!(y.to_f64(), [1.0, 2.0, 3.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the shapes `x [n, d]`, `w [k, d]` and `bias [k]` do not fit.
#[track_caller]
pub fn linear<'t>(x: &Var<'t>, w: &Var<'t>, bias: Option<&Var<'t>>) -> Var<'t> {
    x.tape().expect_inputs("linear", &[x, w]);
    x.tape().expect_inputs("linear", bias.as_slice());
    let [n, d] = x.value().dims("linear: the input");
    let [k, w_d] = w.value().dims("linear: the weights");
    assert_eq!(d, w_d, "linear: input {:?} and weights {:?} do not fit", x.shape(), w.shape());
    if let Some(bias) = bias {
        assert_eq!(**bias.shape(), [k], "linear: bias {:?} for {k} outputs", bias.shape());
    }
    let dims = LinearDims { n, d, k };
    let device = x.tape().device().clone();
    let x = &super::cast(x, w.value().dtype());
    let mut y = Tensor::empty(&device, x.value().dtype(), [n, k]);
    let (x_value, w_value) = (x.value().clone(), w.value().clone());
    match device.kind() {
        DeviceKind::Cpu => {
            cpu::forward(&mut y.view_mut(), &x_value, &w_value, bias.map(|b| b.value()), dims);
        }
        DeviceKind::Cuda => {
            cuda::forward(&mut y, &x_value, &w_value, bias.map(|b| b.value()), dims);
        }
        DeviceKind::Reference => reference::forward(
            y.data_mut(),
            x_value.data(),
            w_value.data(),
            bias.map(|b| b.value().data()),
            dims,
        ),
    }
    let (x_id, w_id, bias_id) = (x.id(), w.id(), bias.map(Var::id));
    let mut inputs = vec![x, w];
    inputs.extend(bias);
    x.tape().record("linear", y, &inputs, move |dy, gradients| {
        if let Some((mut dx, accumulate)) = gradients.target(x_id, x_value.shape()) {
            match device.kind() {
                DeviceKind::Cpu => cpu::input_gradient(&mut dx, &dy, &w_value, dims, accumulate),
                DeviceKind::Cuda => cuda::input_gradient(&mut dx, &dy, &w_value, dims, accumulate),
                DeviceKind::Reference => reference::input_gradient(
                    dx.data_mut(),
                    dy.data(),
                    w_value.data(),
                    dims,
                    accumulate,
                ),
            }
        }
        if let Some((mut dw, accumulate)) = gradients.target(w_id, w_value.shape()) {
            match device.kind() {
                DeviceKind::Cpu => cpu::weight_gradient(&mut dw, &dy, &x_value, dims, accumulate),
                DeviceKind::Cuda => cuda::weight_gradient(&mut dw, &dy, &x_value, dims, accumulate),
                DeviceKind::Reference => reference::weight_gradient(
                    dw.data_mut(),
                    dy.data(),
                    x_value.data(),
                    dims,
                    accumulate,
                ),
            }
        }
        if let Some(id) = bias_id
            && let Some((mut db, accumulate)) = gradients.target(id, &[k].into())
        {
            match device.kind() {
                DeviceKind::Cpu => {
                    let db = db.data_mut();
                    by_activation!(dy.dtype(), T => cpu::bias_gradient::<T>(db, dy.data(), accumulate));
                }
                DeviceKind::Cuda => cuda::bias_gradient(&mut db, &dy, dims, accumulate),
                DeviceKind::Reference => {
                    reference::bias_gradient(db.data_mut(), dy.data(), accumulate);
                }
            }
        }
    })
}
