//! Losses over pairs that SimCLR's authors compared with NT-Xent (Chen et al. 2020, table 2, arXiv:2002.05709), for rows of any
//! length.
//!
//! `z [2n, d]`, view after view: the positive of row `i` is row `p = (i + n) mod 2n`, its negatives are the other `2n - 2`.
//! With `s_ij = <z_i, z_j>`, `L = mean_i l_i`, where `mean_j` is over the negatives:
//!
//! - [`PairLoss::Xent`]: `l_i = log Σ_{j != i} exp(s_ij / T) - s_ip / T`;
//! - [`PairLoss::Logistic`]: `l_i = -log σ(s_ip / T) - mean_j log σ(-s_ij / T)`;
//! - [`PairLoss::Margin`]: `l_i = mean_j max(s_ij - s_ip + m, 0)`; T has no effect.
//!
//! Semi-hard mining keeps at most one negative per row: the most similar of those less similar than the positive. With
//! `G_ij = dl_i / ds_ij`, `dz = (G + Gᵀ) z dL / 2n`.
//!
//! The forward pass saves `G`, `[2n, 2n]`: these losses are for ablations at small batches. For NT-Xent on unit rows use
//! [`nt_xent`](super::nt_xent()), which stores nothing of that size. There are no CUDA kernels.

mod rows;

use crate::cpu::{Matrix, gemm};
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::Tensor;

/// The loss of a row, from its positive and its negatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PairLoss {
    /// NT-Xent, for rows of any length.
    Xent,
    /// NT-Logistic.
    Logistic {
        /// Whether a row keeps only its semi-hard negative.
        semi_hard: bool,
    },
    /// The margin triplet loss.
    Margin {
        /// m, >= 0.
        margin: f64,
        /// Whether a row keeps only its semi-hard negative.
        semi_hard: bool,
    },
}

fn no_cuda() -> ! {
    panic!("pair_loss has no CUDA kernels: compute on the CPU")
}

/// Returns the mean loss over the `2n` rows of `z [2n, d]`, view after view; a scalar. `temperature > 0`. Several ranks each compute
/// the loss of all their rows.
///
/// # Panics
/// If the number of rows is odd or less than 4 (one pair has no negatives), the temperature is not positive, the margin is negative or NaN,
/// or the device is a GPU.
#[track_caller]
pub fn pair_loss<'t>(z: &Var<'t>, loss: PairLoss, temperature: f64) -> Var<'t> {
    let z = &super::rows::gather_ranks(z, 2);
    let [rows, d] = z.value().dims("pair_loss: the embeddings");
    assert!(
        rows.is_multiple_of(2) && rows >= 4,
        "pair_loss: {rows} rows, expected two views of 2 or more"
    );
    assert!(temperature > 0.0, "pair_loss: temperature {temperature}");
    if let PairLoss::Margin { margin, .. } = loss {
        assert!(margin >= 0.0, "pair_loss: margin {margin}");
    }
    let device = z.tape().device().clone();
    let z = &super::in_f32_on_a_cpu(z);
    let z_value = z.value().clone();
    let mut weights = Tensor::floats(&device, [rows, rows]); // similarities, then G
    let sum = match device.kind() {
        DeviceKind::Cpu => {
            let (z, weights) = (z_value.data(), weights.data_mut());
            device.run(|| {
                let all = Matrix::new(z, rows, d);
                gemm(weights, all, all.transposed(), false);
                rows::losses::<f32>(weights, rows, loss, temperature)
            })
        }
        DeviceKind::Cuda => no_cuda(),
        DeviceKind::Reference => {
            let (z, weights) = (z_value.data::<f64>(), weights.data_mut::<f64>());
            for (place, weight) in weights.iter_mut().enumerate() {
                let (i, j) = (place / rows, place % rows);
                *weight = (0..d).map(|t| z[i * d + t] * z[j * d + t]).sum();
            }
            rows::losses::<f64>(weights, rows, loss, temperature)
        }
    };
    let y = Tensor::from_f64(&device, [], &[sum / rows as f64]);
    let z_id = z.id();
    z.tape().record("pair_loss", y, &[z], move |dy, gradients| {
        let scale = dy.scalar() / rows as f64;
        let mut dz = z_value.empty_like();
        match device.kind() {
            DeviceKind::Cpu => {
                let (dz, z, weights) =
                    (dz.data_mut::<f32>(), z_value.data(), weights.data::<f32>());
                device.run(|| {
                    let (all, weights) =
                        (Matrix::new(z, rows, d), Matrix::new(weights, rows, rows));
                    gemm(dz, weights, all, false);
                    gemm(dz, weights.transposed(), all, true);
                });
                dz.iter_mut().for_each(|dz| *dz *= scale as f32);
            }
            DeviceKind::Cuda => no_cuda(),
            DeviceKind::Reference => {
                let (z, g) = (z_value.data::<f64>(), weights.data::<f64>());
                for (place, dz) in dz.data_mut::<f64>().iter_mut().enumerate() {
                    let (i, t) = (place / d, place % d);
                    let pair = |j: usize| (g[i * rows + j] + g[j * rows + i]) * z[j * d + t];
                    *dz = scale * (0..rows).map(pair).sum::<f64>();
                }
            }
        }
        gradients.add(z_id, dz);
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::arena::{Arena, Layout};
    use crate::device::Device;

    #[test]
    #[should_panic(expected = "pair_loss: margin NaN")]
    fn a_margin_is_a_number_from_0_up() {
        let mut arena = Arena::new(&Arc::new(Layout::new()), &Device::reference(), 1);
        let z = Tensor::from_f64(arena.device(), [4, 2], &[0.0; 8]);
        let _ = crate::tape::step(&mut arena, |tape| {
            pair_loss(&tape.input(&z), PairLoss::Margin { margin: f64::NAN, semi_hard: false }, 1.0)
        });
    }
}
