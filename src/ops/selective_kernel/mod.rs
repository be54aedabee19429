//! Selective kernels (Li et al. 2019, arXiv:1903.06586) as in SimCLR v2: attention over two streams of channels.
//!
//! `x [n, h, w, 2c]` holds stream 0 in the first `c` channels and stream 1 in the last. [`stream_mean`] is the input
//! of the attention: `g [n, c]`, the mean over pixels of the sum of both. [`stream_select`] weights them by `logits [n, 2c]`:
//! with `a = sigmoid(logit_0 - logit_1)`, the softmax over two, `y = a x_0 + (1 - a) x_1`, `[n, h, w, c]`
//! (google-research/simclr, `resnet.py`: `sk_conv2d`; both of its streams are 3x3, without dilation).
//!
//! Backward: `dx_0 = a dy`, `dx_1 = (1 - a) dy`, `dlogit_0 = -dlogit_1 = a (1 - a) Σ_hw dy (x_0 - x_1)`; of the mean,
//! `dx_0 = dx_1 = dg / (h w)`.

mod cuda;
mod streams;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Tensor, by_activation};

#[track_caller]
fn streams_of(x: &Var<'_>, what: &str) -> [usize; 3] {
    let [n, h, w, channels] = x.value().dims(what);
    assert!(
        channels.is_multiple_of(2) && channels > 0 && h * w > 0,
        "{what} {:?} must be two streams of pixels",
        x.shape()
    );
    [n, h * w, channels / 2]
}

/// Returns the mean over pixels of the sum of both streams of `x [n, h, w, 2c]`, `[n, c]`.
///
/// # Panics
/// If the number of channels is odd or there are no pixels.
#[track_caller]
pub fn stream_mean<'t>(x: &Var<'t>) -> Var<'t> {
    let dims @ [n, _, c] = streams_of(x, "stream_mean: the input");
    let device = x.tape().device();
    let mut g = Tensor::empty(device, x.value().dtype(), [n, c]);
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.value().dtype(), T => {
            let (g, x) = (g.data_mut::<T>(), x.value().data());
            device.run(|| streams::mean(g, x, c));
        }),
        DeviceKind::Cuda => cuda::mean(&mut g, x.value(), dims),
        DeviceKind::Reference => streams::mean::<f64>(g.data_mut(), x.value().data(), c),
    }
    let (x_id, shape) = (x.id(), *x.shape());
    x.tape().record("stream_mean", g, &[x], move |dg, gradients| {
        let device = dg.device();
        let mut dx = Tensor::empty(device, dg.dtype(), shape);
        match device.kind() {
            DeviceKind::Cpu => by_activation!(dg.dtype(), T => {
                let (dx, dg) = (dx.data_mut::<T>(), dg.data());
                device.run(|| streams::mean_gradient(dx, dg, c));
            }),
            DeviceKind::Cuda => cuda::mean_gradient(&mut dx, &dg, dims),
            DeviceKind::Reference => {
                streams::mean_gradient::<f64>(dx.data_mut(), dg.data(), c);
            }
        }
        gradients.add(x_id, dx);
    })
}

/// Returns both streams of `x [n, h, w, 2c]` weighted by the softmax, per channel, of `logits [n, 2c]`: `[n, h, w, c]`.
///
/// # Panics
/// If the shapes do not fit, the number of channels is odd or there are no pixels.
#[track_caller]
pub fn stream_select<'t>(x: &Var<'t>, logits: &Var<'t>) -> Var<'t> {
    x.tape().expect_inputs("stream_select", &[x, logits]);
    let dims @ [n, _, c] = streams_of(x, "stream_select: the input");
    assert_eq!(
        **logits.shape(),
        [n, 2 * c],
        "stream_select: logits {:?} for {:?}",
        logits.shape(),
        x.shape()
    );
    let device = x.tape().device().clone();
    let mut shape = *x.shape();
    shape = crate::tensor::Shape::from([shape[0], shape[1], shape[2], c]);
    let logits = &super::cast(logits, x.value().dtype());
    let mut y = Tensor::empty(&device, x.value().dtype(), shape);
    let (x_value, logits_value) = (x.value().clone(), logits.value().clone());
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x_value.dtype(), T => {
            let (y, x, logits) = (y.data_mut::<T>(), x_value.data(), logits_value.data());
            device.run(|| streams::select(y, x, logits, c));
        }),
        DeviceKind::Cuda => cuda::select(&mut y, &x_value, &logits_value, dims),
        DeviceKind::Reference => {
            streams::select::<f64>(y.data_mut(), x_value.data(), logits_value.data(), c);
        }
    }
    let (x_id, logits_id) = (x.id(), logits.id());
    x.tape().record("stream_select", y, &[x, logits], move |dy, gradients| {
        let (mut dx, mut dlogits) = (x_value.empty_like(), logits_value.empty_like());
        match device.kind() {
            DeviceKind::Cpu => by_activation!(x_value.dtype(), T => {
                let (dx, dlogits) = (dx.data_mut::<T>(), dlogits.data_mut());
                let (dy, x, logits) = (dy.data(), x_value.data(), logits_value.data());
                device.run(|| streams::select_gradient([dx, dlogits], [dy, x, logits], c));
            }),
            DeviceKind::Cuda => {
                cuda::select_gradient([&mut dx, &mut dlogits], [&dy, &x_value, &logits_value], dims)
            }
            DeviceKind::Reference => streams::select_gradient::<f64>(
                [dx.data_mut(), dlogits.data_mut()],
                [dy.data(), x_value.data(), logits_value.data()],
                c,
            ),
        }
        gradients.add(x_id, dx);
        gradients.add(logits_id, dlogits);
    })
}
