//! The naive f64 path.

use super::NtXentDims;

/// The similarity of row `i` of this rank and row `j` of all.
fn similarity([own, all]: [&[f64]; 2], d: usize, i: usize, j: usize) -> f64 {
    (0..d).map(|t| own[i * d + t] * all[j * d + t]).sum()
}

/// Fills `lse`, the log-sum-exp of each row of this rank, and returns their mean loss.
pub(super) fn forward(lse: &mut [f64], z: [&[f64]; 2], dims: NtXentDims) -> f64 {
    let NtXentDims { rows, all, d, temperature, .. } = dims;
    let mut sum = 0.0;
    for (i, lse) in lse.iter_mut().enumerate() {
        let others: Vec<f64> = (0..all)
            .filter(|&j| j != dims.place(i))
            .map(|j| similarity(z, d, i, j) / temperature)
            .collect();
        let max = others.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        *lse = others.iter().map(|v| (v - max).exp()).sum::<f64>().ln() + max;
        sum += *lse - similarity(z, d, i, dims.place(dims.positive(i))) / temperature;
    }
    sum / rows as f64
}

/// `dz = scale * d(sum of all row losses) / d(s / T)`, chained to this rank's rows. `lse` is that of all rows.
pub(super) fn backward(dz: &mut [f64], z: [&[f64]; 2], lse: &[f64], dims: NtXentDims, scale: f64) {
    let NtXentDims { rows, all, d, temperature, .. } = dims;
    dz.fill(0.0);
    for i in 0..rows {
        let own = dims.place(i);
        for j in (0..all).filter(|&j| j != own) {
            let logit = similarity(z, d, i, j) / temperature;
            let target = if j == dims.place(dims.positive(i)) { 2.0 } else { 0.0 };
            let weight = (logit - lse[own]).exp() + (logit - lse[j]).exp() - target;
            for t in 0..d {
                dz[i * d + t] += scale * weight * z[1][j * d + t];
            }
        }
    }
}
