//! `y = a + b`, element by element: the join of a residual block without batch norm, and the sum of gradients.
//!
//! `dy` flows on to both inputs unchanged.

mod cuda;

use rayon::prelude::*;

use crate::device::{Device, DeviceKind};
use crate::ops::CHUNK;
use crate::tape::Var;
use crate::tensor::{Tensor, TensorMut};

/// `a + b`, both of one shape.
///
/// # Panics
/// When the shapes differ.
#[track_caller]
pub fn add<'t>(a: &Var<'t>, b: &Var<'t>) -> Var<'t> {
    assert_eq!(a.shape(), b.shape(), "add: {:?} and {:?} differ", a.shape(), b.shape());
    let device = a.tape().device();
    let y = match device.kind() {
        DeviceKind::Cpu => {
            let mut y = a.value().empty_like();
            let (sum, a, b) = (y.data_mut::<f32>(), a.value().data(), b.value().data());
            let terms = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
            device.run(|| {
                sum.par_chunks_mut(CHUNK).zip(terms).for_each(
                    |(sum, (a, b)): (_, (&[f32], &[f32]))| {
                        sum.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum = a + b);
                    },
                );
            });
            y
        }
        DeviceKind::Cuda => cuda::forward(a.value(), b.value()),
        DeviceKind::Reference => {
            let mut y = a.value().copy();
            add_into(device, &mut y.view_mut(), b.value());
            y
        }
    };
    let (a_id, b_id) = (a.id(), b.id());
    a.tape().record("add", y, &[a, b], move |dy, gradients| {
        gradients.add(a_id, dy.clone());
        gradients.add(b_id, dy);
    })
}

/// `sum += x`, in the type of `sum`.
pub(crate) fn add_into(device: &Device, sum: &mut TensorMut<'_>, x: &Tensor) {
    match device.kind() {
        DeviceKind::Cpu => {
            let (sum, x) = (sum.data_mut::<f32>(), x.data::<f32>());
            device.run(|| {
                sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(sum, x)| {
                    for (sum, x) in sum.iter_mut().zip(x) {
                        *sum += x;
                    }
                });
            });
        }
        DeviceKind::Cuda => cuda::add_into(sum, &x.cast(sum.dtype())),
        DeviceKind::Reference => {
            for (sum, x) in sum.data_mut::<f64>().iter_mut().zip(x.data::<f64>()) {
                *sum += x;
            }
        }
    }
}
