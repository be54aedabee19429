//! The naive f64 path.

use super::InfoNceDims;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Returns the logits of query `i`: that of its key, and those of the negatives that it does not exclude, by row of the queue.
fn logits(i: usize, [q, k, queue]: [&[f64]; 3], dims: &InfoNceDims) -> (f64, Vec<(usize, f64)>) {
    let d = dims.d;
    let row = &q[i * d..][..d];
    let negatives = (0..dims.m).filter(|&j| !dims.skips(i, j));
    let logit = |other: &[f64]| dot(row, other) / dims.temperature;
    (logit(&k[i * d..][..d]), negatives.map(|j| (j, logit(&queue[j * d..][..d]))).collect())
}

/// Fills `lse`, the log-sum-exp of each query, and returns the loss.
pub(super) fn forward(lse: &mut [f64], inputs: [&[f64]; 3], dims: &InfoNceDims) -> f64 {
    let mut sum = 0.0;
    for (i, lse) in lse.iter_mut().enumerate() {
        let (positive, negatives) = logits(i, inputs, dims);
        let max = negatives.iter().fold(positive, |max, (_, v)| max.max(*v));
        let others: f64 = negatives.iter().map(|(_, v)| (v - max).exp()).sum();
        *lse = ((positive - max).exp() + others).ln() + max;
        sum += *lse - positive;
    }
    sum / dims.n as f64
}

pub(super) fn query_gradient(
    dq: &mut [f64],
    inputs: [&[f64]; 3],
    lse: &[f64],
    dims: &InfoNceDims,
    scale: f64,
) {
    let [_, k, queue] = inputs;
    let d = dims.d;
    for (i, dq) in dq.chunks_exact_mut(d).enumerate() {
        let (positive, negatives) = logits(i, inputs, dims);
        for (t, dq) in dq.iter_mut().enumerate() {
            let others: f64 =
                negatives.iter().map(|(j, v)| (v - lse[i]).exp() * queue[j * d + t]).sum();
            *dq = scale * (((positive - lse[i]).exp() - 1.0) * k[i * d + t] + others);
        }
    }
}

pub(super) fn key_gradient(
    dk: &mut [f64],
    [q, k]: [&[f64]; 2],
    lse: &[f64],
    dims: &InfoNceDims,
    scale: f64,
) {
    let d = dims.d;
    for (i, dk) in dk.chunks_exact_mut(d).enumerate() {
        let positive = dot(&q[i * d..][..d], &k[i * d..][..d]) / dims.temperature;
        let weight = scale * ((positive - lse[i]).exp() - 1.0);
        dk.iter_mut().zip(&q[i * d..]).for_each(|(dk, q)| *dk = weight * q);
    }
}
