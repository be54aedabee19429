//! Cross-entropy against soft targets, at a temperature: SwAV's swapped prediction (eq. 2, arXiv:2006.09882), distillation
//! and smoothed labels.
//!
//! `x [n, k]` scores, `q [n, k]` targets: `L = -mean_i Σ_j q_ij log softmax(x_i / T)_j`; a scalar.
//! `dx_i = (Σ_j q_ij softmax(x_i / T) - q_i) dL / (n T)`. Targets need not sum to 1, and have no gradient.
//! Distillation (SimCLR v2's reference code) is `T² L` with `q = softmax(teacher / T)`.

mod cuda;
mod rows;

use crate::device::DeviceKind;
use crate::ops::scale;
use crate::tape::Var;
use crate::tensor::Tensor;

/// The mean cross-entropy of scores `x [n, k]`, divided by `temperature > 0`, against `targets [n, k]`; a scalar.
///
/// # Panics
/// When the shapes differ, there are no rows, or the temperature is not positive.
#[track_caller]
pub fn soft_cross_entropy<'t>(x: &Var<'t>, targets: &Tensor, temperature: f64) -> Var<'t> {
    let [n, k] = x.value().dims("soft_cross_entropy: the scores");
    assert_eq!(
        x.shape(),
        targets.shape(),
        "soft_cross_entropy: scores {:?}, targets {:?}",
        x.shape(),
        targets.shape()
    );
    assert!(n > 0 && k > 0, "soft_cross_entropy: no numbers in {:?}", x.shape());
    assert!(temperature > 0.0, "soft_cross_entropy: temperature {temperature}");
    let device = x.tape().device().clone();
    let (x_value, q) = (x.value().clone(), targets.clone());
    let mean = |sum: f64| Tensor::from_f64(&device, [], &[sum / n as f64]);
    let y = match device.kind() {
        DeviceKind::Cpu => {
            let (x, q) = (x_value.data::<f32>(), q.data());
            mean(device.run(|| rows::sum_of_losses(x, q, k, temperature)))
        }
        DeviceKind::Cuda => cuda::forward(&x_value, &q, temperature),
        DeviceKind::Reference => {
            mean(rows::sum_of_losses::<f64>(x_value.data(), q.data(), k, temperature))
        }
    };
    let x_id = x.id();
    x.tape().record("soft_cross_entropy", y, &[x], move |dy, gradients| {
        let mut dx = x_value.empty_like();
        let scale = || dy.scalar() / (n as f64 * temperature); // on a GPU it stays there
        match device.kind() {
            DeviceKind::Cpu => {
                let (dx, x, q) = (dx.data_mut::<f32>(), x_value.data(), q.data());
                let scale = scale();
                device.run(|| rows::gradient(dx, x, q, k, temperature, scale));
            }
            DeviceKind::Cuda => cuda::backward(&mut dx, &x_value, &q, &dy, temperature),
            DeviceKind::Reference => rows::gradient::<f64>(
                dx.data_mut(),
                x_value.data(),
                q.data(),
                k,
                temperature,
                scale(),
            ),
        }
        gradients.add(x_id, dx);
    })
}

/// `T²` times the cross-entropy of `student [n, k]` against `softmax(teacher / T)`, both logits, both at `temperature > 0`:
/// the factor keeps gradients as large at every temperature (google-research/simclr, distillation colab).
///
/// # Panics
/// When the shapes differ, there are no rows, or the temperature is not positive.
#[track_caller]
pub fn distillation<'t>(student: &Var<'t>, teacher: &Tensor, temperature: f64) -> Var<'t> {
    let targets = softmax(teacher, temperature);
    scale(&soft_cross_entropy(student, &targets, temperature), temperature * temperature)
}

/// `softmax(x_i / T)` of the rows of `x [n, k]`, in f32 where `x` is bf16; no gradient.
///
/// # Panics
/// When `x` is not of rank 2 or the temperature is not positive.
#[track_caller]
pub fn softmax(x: &Tensor, temperature: f64) -> Tensor {
    let [_, k] = x.dims("softmax: the scores");
    assert!(temperature > 0.0, "softmax: temperature {temperature}");
    let mut y = Tensor::floats(x.device(), *x.shape());
    match x.device().kind() {
        DeviceKind::Cpu => {
            let (y, x_data) = (y.data_mut::<f32>(), x.data());
            x.device().run(|| rows::softmax(y, x_data, k, temperature));
        }
        DeviceKind::Cuda => cuda::softmax(&mut y, x, temperature),
        DeviceKind::Reference => rows::softmax::<f64>(y.data_mut(), x.data(), k, temperature),
    }
    y
}
