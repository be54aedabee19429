//! The naive f64 path.

use super::NtXentDims;

fn similarity(z: &[f64], d: usize, i: usize, j: usize) -> f64 {
    (0..d).map(|t| z[i * d + t] * z[j * d + t]).sum()
}

/// Fills `lse`, the log-sum-exp of each row, and returns the loss.
pub(super) fn forward(lse: &mut [f64], z: &[f64], dims: NtXentDims) -> f64 {
    let NtXentDims { rows, d, temperature } = dims;
    let mut sum = 0.0;
    for (i, lse) in lse.iter_mut().enumerate() {
        let others: Vec<f64> =
            (0..rows).filter(|&j| j != i).map(|j| similarity(z, d, i, j) / temperature).collect();
        let max = others.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        *lse = others.iter().map(|v| (v - max).exp()).sum::<f64>().ln() + max;
        sum += *lse - similarity(z, d, i, dims.positive(i)) / temperature;
    }
    sum / rows as f64
}

/// `dz = scale * d(sum of row losses) / d(s / T)`, chained to `z`.
pub(super) fn backward(dz: &mut [f64], z: &[f64], lse: &[f64], dims: NtXentDims, scale: f64) {
    let NtXentDims { rows, d, temperature } = dims;
    dz.fill(0.0);
    for i in 0..rows {
        for j in (0..rows).filter(|&j| j != i) {
            let logit = similarity(z, d, i, j) / temperature;
            let target = if j == dims.positive(i) { 2.0 } else { 0.0 };
            let weight = (logit - lse[i]).exp() + (logit - lse[j]).exp() - target;
            for t in 0..d {
                dz[i * d + t] += scale * weight * z[j * d + t];
            }
        }
    }
}
