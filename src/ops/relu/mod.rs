//! `y = max(x, 0)`, element by element; `dx = dy` where `y > 0`, else 0.
//!
//! The backward pass recomputes the mask from `y`, which the next operation saves anyway. At 0 the gradient is 0, as in PyTorch.

mod cuda;

use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::CHUNK;

/// Returns `max(x, 0)`, element by element. NaN propagates.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [3], &[-1.0, 0.0, 2.0]);
/// let y = tape::forward(&mut arena, |tape| ops::relu(&tape.input(&x)))?;
/// assert_eq!(y.to_f64(), [0.0, 0.0, 2.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
pub fn relu<'t>(x: &Var<'t>) -> Var<'t> {
    let device = x.tape().device().clone();
    let mut y = x.value().empty_like();
    match device.kind() {
        DeviceKind::Cpu => {
            let (y, x) = (y.data_mut::<f32>(), x.value().data::<f32>());
            device.run(|| {
                y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = if *x < 0.0 { 0.0 } else { *x }; // unlike `max`, propagates NaN
                    }
                });
            });
        }
        DeviceKind::Cuda => cuda::forward(&mut y, x.value()),
        DeviceKind::Reference => {
            for (y, x) in y.data_mut::<f64>().iter_mut().zip(x.value().data::<f64>()) {
                *y = if *x < 0.0 { 0.0 } else { *x };
            }
        }
    }
    let (x_id, saved) = (x.id(), y.clone());
    x.tape().record("relu", y, &[x], move |dy, gradients| {
        let mut dx = dy.empty_like();
        match device.kind() {
            DeviceKind::Cpu => {
                let (dx, dy, y) = (dx.data_mut::<f32>(), dy.data::<f32>(), saved.data::<f32>());
                device.run(|| {
                    let inputs = dy.par_chunks(CHUNK).zip(y.par_chunks(CHUNK));
                    dx.par_chunks_mut(CHUNK).zip(inputs).for_each(|(dx, (dy, y))| {
                        for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
                            *dx = if *y > 0.0 { *dy } else { 0.0 };
                        }
                    });
                });
            }
            DeviceKind::Cuda => cuda::backward(&mut dx, &dy, &saved),
            DeviceKind::Reference => {
                let (dy, y) = (dy.data::<f64>(), saved.data::<f64>());
                for ((dx, dy), y) in dx.data_mut::<f64>().iter_mut().zip(dy).zip(y) {
                    *dx = if *y > 0.0 { *dy } else { 0.0 };
                }
            }
        }
        gradients.add(x_id, dx);
    })
}
