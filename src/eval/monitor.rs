//! The collapse monitor: measures how widely unit embeddings `z [n, d]` are spread.

use serde::{Deserialize, Serialize};

use super::spectrum::{products, symmetric_eigenvalues};
use crate::tensor::Tensor;

/// How widely embeddings are spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Standard deviation of a channel, averaged over channels, times `sqrt(d)`: about 1 when embeddings fill the sphere, 0 when
    /// they have collapsed to a point (SimSiam, section 4.1).
    pub std: f64,
    /// `exp` of the entropy of the normalised singular values of the centred embeddings (Roy and Vetterli 2007): how many
    /// directions the embeddings use, at most `min(n - 1, d)`.
    pub effective_rank: f64,
    /// `ln` of the mean of `exp(-2 |x - y|^2)` over pairs (Wang and Isola 2020, arXiv:2005.10242, equation 6, t = 2): about -4 at
    /// best with many channels, 0 for a single point. Checkpoints of versions that did not measure it lack it.
    #[serde(default)]
    pub uniformity: f64,
}

/// The most rows that are used: the Gram matrix of more would cost more than it tells.
const ROWS: usize = 128;

/// Measures the spread of `z [n, d]`; `n >= 2`.
///
/// # Panics
/// If `z` is not of rank 2.
pub fn spread(z: &Tensor) -> Spread {
    let [all, d] = z.dims("spread: the embeddings");
    // Evenly over the rows, because the first half may hold one view only.
    let n = all.min(ROWS);
    let values = z.to_f64();
    let mut rows: Vec<Vec<f64>> =
        (0..n).map(|i| values[i * all / n.max(1) * d..][..d].to_vec()).collect();
    let uniformity = uniformity(&rows);
    for j in 0..d {
        let mean = rows.iter().map(|row| row[j]).sum::<f64>() / n as f64;
        rows.iter_mut().for_each(|row| row[j] -= mean);
    }
    let stds = (0..d).map(|j| (rows.iter().map(|r| r[j] * r[j]).sum::<f64>() / n as f64).sqrt());
    let std = stds.sum::<f64>() / (d as f64).sqrt();

    let products = products(&rows.concat(), d);
    let singular: Vec<f64> =
        symmetric_eigenvalues(products, n).into_iter().map(|v| v.max(0.0).sqrt()).collect();
    let total: f64 = singular.iter().sum();
    let entropy: f64 = singular
        .iter()
        .map(|s| s / total.max(f64::MIN_POSITIVE))
        .filter(|&p| p > 1e-12)
        .map(|p| -p * p.ln())
        .sum();
    Spread { std, effective_rank: entropy.exp(), uniformity }
}

fn uniformity(rows: &[Vec<f64>]) -> f64 {
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
    let pairs = (0..rows.len()).flat_map(|i| (0..i).map(move |j| (i, j)));
    let sum: f64 = pairs.map(|(i, j)| (-2.0 * apart(&rows[i], &rows[j])).exp()).sum();
    let count = rows.len() * rows.len().saturating_sub(1) / 2;
    (sum / count.max(1) as f64).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, Philox, Purpose};

    fn unit_rows(n: usize, d: usize, directions: usize) -> Tensor {
        let mut rng = Philox::new(5, Purpose::Test, 0, 0);
        let mut values = vec![0.0; n * d];
        for row in values.chunks_exact_mut(d) {
            row[..directions].fill_with(|| rng.normal());
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        Tensor::from_f64(&Device::reference(), [n, d], &values)
    }

    #[test]
    fn random_directions_are_spread_and_a_point_is_not() {
        let healthy = spread(&unit_rows(128, 16, 16));
        assert!((healthy.std - 1.0).abs() < 0.05, "{healthy:?}");
        assert!(healthy.effective_rank > 15.0, "{healthy:?}");
        assert!((-4.0..-3.0).contains(&healthy.uniformity), "{healthy:?}");
        let flat = spread(&unit_rows(128, 16, 3));
        assert!((2.5..3.01).contains(&flat.effective_rank), "{flat:?}");
        let point = Tensor::from_f64(&Device::reference(), [8, 2], &[0.6, 0.8].repeat(8));
        assert!(spread(&point).std < 1e-9);
        assert!(spread(&point).uniformity.abs() < 1e-9);
        let across = Tensor::from_f64(&Device::reference(), [2, 2], &[1.0, 0.0, -1.0, 0.0]);
        assert!((spread(&across).uniformity + 8.0).abs() < 1e-9);
    }
}
