//! `y = a + b`, element by element: a residual connection without batch norm, or the sum of losses.
//!
//! Both inputs have the gradient `dy`.

mod cuda;

use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{CHUNK, add_into};

/// Returns `a + b`, element by element.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [2], &[1.0, 2.0]);
/// let y = tape::forward(&mut arena, |tape| ops::add(&tape.input(&x), &tape.input(&x)))?;
/// assert_eq!(y.to_f64(), [2.0, 4.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the shapes differ.
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
