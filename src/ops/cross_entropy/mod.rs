//! Softmax cross-entropy: `L = mean_i (lse(x_i) - x_i[label_i])` over `x [n, k]` and labels `0..k`; a scalar.
//!
//! `dx_i = (softmax(x_i) - onehot(label_i)) dL / n`.

mod cuda;

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Returns the mean cross-entropy of logits `x [n, k]` and `labels [n]` (i32, each in `0..k`); a scalar.
///
/// A GPU cannot report a label that is out of range: loss and gradient are NaN instead.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let (logits, labels) = (Tensor::zeros(&device, [1, 2]), Tensor::from_slice(&device, [1], &[0_i32]));
/// let loss = tape::forward(&mut arena, |tape| ops::cross_entropy(&tape.input(&logits), &labels))?;
/// assert_eq!(loss.scalar(), 2.0_f64.ln());
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the shapes do not fit, `n` is 0, or, on the host, a label is out of range.
#[track_caller]
pub fn cross_entropy<'t>(x: &Var<'t>, labels: &Tensor) -> Var<'t> {
    let [n, k] = x.value().dims("cross_entropy: the logits");
    assert_eq!(**labels.shape(), [n], "cross_entropy: labels {:?}, {n} rows", labels.shape());
    assert!(n > 0, "cross_entropy: no rows");
    let device = x.tape().device().clone();
    labels.expect_on(&device, "cross_entropy");
    let x = &super::in_f32_on_a_cpu(x);
    let (x_value, labels) = (x.value().clone(), labels.clone());
    let x_id = x.id();
    if device.kind() == DeviceKind::Cuda {
        let y = cuda::forward(&x_value, &labels, [n, k]);
        return x.tape().record("cross_entropy", y, &[x], move |dy, gradients| {
            gradients.add(x_id, cuda::backward(&x_value, &labels, &dy, [n, k]));
        });
    }
    let bad = labels.data::<i32>().iter().find(|&&l| l < 0 || l as usize >= k);
    assert!(bad.is_none(), "cross_entropy: label {} of {k} classes", bad.unwrap_or(&0));
    let rows: f64 = match device.kind() {
        DeviceKind::Cpu => {
            // Losses of rows in f64, summed in order.
            x_value
                .data::<f32>()
                .chunks_exact(k)
                .zip(labels.data::<i32>())
                .map(|(row, &label)| {
                    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = row.iter().map(|&v| f64::from((v - max).exp())).sum();
                    sum.ln() + f64::from(max) - f64::from(row[label as usize])
                })
                .sum()
        }
        // The reference device; the GPU returned above.
        _ => {
            let rows = x_value.data::<f64>().chunks_exact(k).zip(labels.data::<i32>());
            rows.map(|(row, &label)| log_sum_exp(row) - row[label as usize]).sum()
        }
    };
    let y = Tensor::from_f64(&device, [], &[rows / n as f64]);
    x.tape().record("cross_entropy", y, &[x], move |dy, gradients| {
        let mut dx = x_value.empty_like();
        let scale = dy.scalar() / n as f64;
        match device.kind() {
            DeviceKind::Cpu => {
                let (dx, x) = (dx.data_mut::<f32>(), x_value.data::<f32>());
                let rows = x.par_chunks(k).zip(labels.data::<i32>());
                let softmax = |(dx, (x, &label)): (&mut [f32], (&[f32], &i32))| {
                    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let mut sum = 0.0;
                    for (dx, x) in dx.iter_mut().zip(x) {
                        *dx = (x - max).exp();
                        sum += f64::from(*dx);
                    }
                    let factor = (scale / sum) as f32;
                    dx.iter_mut().for_each(|dx| *dx *= factor);
                    dx[label as usize] -= scale as f32;
                };
                device.run(|| dx.par_chunks_mut(k).zip(rows).each(softmax));
            }
            _ => {
                let rows = x_value.data::<f64>().chunks_exact(k).zip(labels.data::<i32>());
                let rows = dx.data_mut::<f64>().chunks_exact_mut(k).zip(rows);
                for (dx, (x, &label)) in rows {
                    let lse = log_sum_exp(x);
                    for (j, (dx, x)) in dx.iter_mut().zip(x).enumerate() {
                        let target = f64::from(j == label as usize);
                        *dx = ((x - lse).exp() - target) * scale;
                    }
                }
            }
        }
        gradients.add(x_id, dx);
    })
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter().map(|v| (v - max).exp()).sum::<f64>().ln() + max
}
