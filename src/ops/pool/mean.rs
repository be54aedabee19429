//! Global mean pooling; loops generic over the CPU's types and the reference device's f64, with sums in f64.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::cuda;
use crate::device::{Device, DeviceKind};
use crate::tape::Var;
use crate::tensor::{Float, Tensor, by_activation};

/// Returns the mean of `x [n, h, w, c]` over all pixels, `[n, c]`.
///
/// # Panics
/// If `x` does not have rank 4 or has no pixels.
#[track_caller]
pub fn mean_pool<'t>(x: &Var<'t>) -> Var<'t> {
    let [n, h, w, c] = x.value().dims("mean_pool: the input");
    assert!(h * w > 0, "mean_pool: images of {h} x {w} have no mean");
    let device = x.tape().device();
    let mut y = Tensor::empty(device, x.value().dtype(), [n, c]);
    match device.kind() {
        DeviceKind::Cpu => {
            by_activation!(y.dtype(), T => forward::<T>(&mut y, x.value(), device));
        }
        DeviceKind::Cuda => cuda::mean_forward(&mut y, x.value()),
        DeviceKind::Reference => forward::<f64>(&mut y, x.value(), device),
    }
    let (x_id, shape) = (x.id(), *x.shape());
    x.tape().record("mean_pool", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let mut dx = Tensor::empty(device, dy.dtype(), shape);
        match device.kind() {
            DeviceKind::Cpu => {
                by_activation!(dy.dtype(), T => backward::<T>(&mut dx, &dy, device));
            }
            DeviceKind::Cuda => cuda::mean_backward(&mut dx, &dy),
            DeviceKind::Reference => backward::<f64>(&mut dx, &dy, device),
        }
        gradients.add(x_id, dx);
    })
}

fn forward<T: Float>(y: &mut Tensor, x: &Tensor, device: &Device) {
    let c = y.shape()[1].max(1);
    let image = x.shape()[1] * x.shape()[2] * c;
    let (y, x) = (y.data_mut::<T>(), x.data::<T>());
    device.run(|| {
        y.par_chunks_mut(c).zip(x.par_chunks(image)).each(|(y, x)| {
            for (j, y) in y.iter_mut().enumerate() {
                let sum: f64 = x.iter().skip(j).step_by(c).map(|v| v.widen()).sum();
                *y = T::narrow(sum / (image / c) as f64);
            }
        });
    });
}

fn backward<T: Float>(dx: &mut Tensor, dy: &Tensor, device: &Device) {
    let c = dy.shape()[1].max(1);
    let image = dx.shape()[1] * dx.shape()[2] * c;
    let (dx, dy) = (dx.data_mut::<T>(), dy.data::<T>());
    device.run(|| {
        dx.par_chunks_mut(image).zip(dy.par_chunks(c)).each(|(dx, dy)| {
            for pixel in dx.chunks_exact_mut(c) {
                for (dx, &dy) in pixel.iter_mut().zip(dy) {
                    *dx = T::narrow(dy.widen() / (image / c) as f64);
                }
            }
        });
    });
}
