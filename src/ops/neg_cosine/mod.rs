//! Negative cosine similarity (SimSiam, eq. 1, arXiv:2011.10566; half of BYOL's regression loss minus a constant):
//! `D = -mean_i <p_i, z_i> / (|p_i| |z_i|)`, `p [n, d]`, `z [n, d]`; a scalar.
//!
//! Norms are at least 1e-12, as in PyTorch's `normalize`. With unit rows `p̂`, `ẑ` and `c_i = <p̂_i, ẑ_i>`,
//! `dp_i = -(ẑ_i - c_i p̂_i) / |p_i| dD / n`, and likewise for `z`; below eps the norm is a constant and the second term
//! vanishes. Sums are in f64 on every device: rows are few and short.

mod cuda;
mod rows;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Tensor, by_activation};

/// Returns the mean negative cosine of rows `p [n, d]` and `z [n, d]`, in `-1..=1`; a scalar. [`Var::detach`] stops the gradient
/// of either side.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let p = Tensor::from_f64(&device, [1, 2], &[2.0, 0.0]);
/// let loss = tape::forward(&mut arena, |tape| ops::neg_cosine(&tape.input(&p), &tape.input(&p)))?;
/// assert_eq!(loss.scalar(), -1.0);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the shapes differ or are empty.
#[track_caller]
pub fn neg_cosine<'t>(p: &Var<'t>, z: &Var<'t>) -> Var<'t> {
    p.tape().expect_inputs("neg_cosine", &[p, z]);
    let [n, d] = p.value().dims("neg_cosine: the predictions");
    assert_eq!(p.shape(), z.shape(), "neg_cosine: {:?} and {:?} differ", p.shape(), z.shape());
    assert!(n > 0 && d > 0, "neg_cosine: the shape {:?} is empty", p.shape());
    let device = p.tape().device().clone();
    let z = &super::cast(z, p.value().dtype());
    let (p_value, z_value) = (p.value().clone(), z.value().clone());
    let mean = |sum: f64| Tensor::from_f64(&device, [], &[-sum / n as f64]);
    let y = match device.kind() {
        DeviceKind::Cpu => by_activation!(p_value.dtype(), T => {
            mean(rows::sum_of_cosines::<T>(p_value.data(), z_value.data(), d))
        }),
        DeviceKind::Cuda => cuda::forward(&p_value, &z_value),
        DeviceKind::Reference => {
            mean(rows::sum_of_cosines::<f64>(p_value.data(), z_value.data(), d))
        }
    };
    let (p_id, z_id) = (p.id(), z.id());
    p.tape().record("neg_cosine", y, &[p, z], move |dy, gradients| {
        let scale = || -dy.scalar() / n as f64; // not on a GPU, which would have to wait
        for (id, x, other) in [(p_id, &p_value, &z_value), (z_id, &z_value, &p_value)] {
            if id == crate::tape::VarId::Constant {
                continue;
            }
            let mut dx = x.empty_like();
            match device.kind() {
                DeviceKind::Cpu => by_activation!(x.dtype(), T => {
                    let (dx, x, other) = (dx.data_mut::<T>(), x.data(), other.data());
                    let scale = scale();
                    device.run(|| rows::gradient(dx, x, other, d, scale));
                }),
                DeviceKind::Cuda => cuda::backward(&mut dx, x, other, &dy),
                DeviceKind::Reference => {
                    rows::gradient::<f64>(dx.data_mut(), x.data(), other.data(), d, scale());
                }
            }
            gradients.add(id, dx);
        }
    })
}
