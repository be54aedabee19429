//! `y = a + b`, element by element: the join of a residual block without batch norm, and the sum of gradients.
//!
//! `dy` flows on to both inputs unchanged.

mod cuda;

use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{CHUNK, add_into};

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
