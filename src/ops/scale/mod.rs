//! `y = factor x`, and the mean of scalars, which combine losses.

mod cuda;

use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::ops::add;
use crate::tape::Var;
use crate::tensor::CHUNK;
use crate::tensor::Tensor;

/// Returns `factor x`, element by element.
pub fn scale<'t>(x: &Var<'t>, factor: f64) -> Var<'t> {
    let y = scaled(x.value(), factor);
    let x_id = x.id();
    x.tape().record("scale", y, &[x], move |dy, gradients| {
        gradients.add(x_id, scaled(&dy, factor));
    })
}

/// Returns the mean of scalars, for instance of several losses.
///
/// # Panics
/// If `terms` is empty or the shapes differ.
#[track_caller]
pub fn mean<'t>(terms: &[Var<'t>]) -> Var<'t> {
    let (first, rest) = terms.split_first().expect("mean: no terms");
    let sum = rest.iter().fold(first.clone(), |sum, term| add(&sum, term));
    scale(&sum, 1.0 / terms.len() as f64)
}

fn scaled(x: &Tensor, factor: f64) -> Tensor {
    let mut y = x.empty_like();
    match x.device().kind() {
        DeviceKind::Cpu => {
            let (y, x_data, factor) = (y.data_mut::<f32>(), x.data::<f32>(), factor as f32);
            x.device().run(|| {
                y.par_chunks_mut(CHUNK).zip(x_data.par_chunks(CHUNK)).for_each(|(y, x)| {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = factor * x;
                    }
                });
            });
        }
        DeviceKind::Cuda => cuda::scale(&mut y, x, factor as f32),
        DeviceKind::Reference => {
            for (y, x) in y.data_mut::<f64>().iter_mut().zip(x.data::<f64>()) {
                *y = factor * x;
            }
        }
    }
    y
}
