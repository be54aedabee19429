//! Cross-entropy with soft targets at a temperature: SwAV's swapped prediction (eq. 2, arXiv:2006.09882), distillation and
//! label smoothing.
//!
//! `x [n, k]` scores, `q [n, k]` targets: `L = -mean_i Σ_j q_ij log softmax(x_i / T)_j`; a scalar.
//! `dx_i = (Σ_j q_ij softmax(x_i / T) - q_i) dL / (n T)`. Targets need not sum to 1, and have no gradient.
//! Distillation (SimCLR v2's reference code) is `T² L` with `q = softmax(teacher / T)`.

mod cuda;
mod rows;

use crate::device::DeviceKind;
use crate::ops::{in_f32_on_a_cpu, scale};
use crate::tape::Var;
use crate::tensor::{DType, Tensor};

/// Returns the mean cross-entropy of scores `x [n, k]`, divided by `temperature > 0`, and `targets [n, k]`; a scalar.
///
/// # Panics
/// If the shapes differ or are empty, or the temperature is not positive.
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
    assert!(n > 0 && k > 0, "soft_cross_entropy: the shape {:?} is empty", x.shape());
    assert!(temperature > 0.0, "soft_cross_entropy: temperature {temperature}");
    let device = x.tape().device().clone();
    targets.expect_on(&device, "soft_cross_entropy");
    let x = &in_f32_on_a_cpu(x);
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
        let scale = || dy.scalar() / (n as f64 * temperature); // not on a GPU, which would have to wait
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

/// Returns `T²` times the cross-entropy of `student [n, k]` and `softmax(teacher / T)`; a scalar. Both arguments are logits, both
/// are divided by `temperature > 0`. The factor keeps gradients independent of the temperature (google-research/simclr,
/// distillation colab).
///
/// # Panics
/// If the shapes differ or are empty, or the temperature is not positive.
#[track_caller]
pub fn distillation<'t>(student: &Var<'t>, teacher: &Tensor, temperature: f64) -> Var<'t> {
    let targets = softmax(teacher, temperature);
    scale(&soft_cross_entropy(student, &targets, temperature), temperature * temperature)
}

/// Returns `softmax(x_i / T)` of the rows of `x [n, k]`, without a gradient; f32, even if `x` is bf16.
///
/// # Panics
/// If `x` does not have rank 2 or the temperature is not positive.
#[track_caller]
pub fn softmax(x: &Tensor, temperature: f64) -> Tensor {
    let [_, k] = x.dims("softmax: the scores");
    assert!(temperature > 0.0, "softmax: temperature {temperature}");
    let mut y = Tensor::floats(x.device(), *x.shape());
    match x.device().kind() {
        DeviceKind::Cpu => {
            let (y, x) = (y.data_mut::<f32>(), x.cast(DType::F32));
            x.device().run(|| rows::softmax(y, x.data(), k, temperature));
        }
        DeviceKind::Cuda => cuda::softmax(&mut y, x, temperature),
        DeviceKind::Reference => rows::softmax::<f64>(y.data_mut(), x.data(), k, temperature),
    }
    y
}
