//! The naive f64 path.

use super::{SinkhornDims, share};
use crate::device::Group;

pub(super) fn assign(q: &mut [f64], scores: &[f64], dims: SinkhornDims, group: &Group) {
    let SinkhornDims { b, k, epsilon, iterations } = dims;
    let all_rows = (b * group.size()) as f64;
    let mut max = [scores.iter().copied().fold(f64::NEG_INFINITY, f64::max)];
    group.all_reduce_max("Sinkhorn's maximum", &mut max);
    for (q, s) in q.iter_mut().zip(scores) {
        *q = ((s - max[0]) / epsilon).exp();
    }
    let mut total = [q.iter().sum::<f64>()];
    group.all_reduce_sum("Sinkhorn's sums", &mut total);
    q.iter_mut().for_each(|q| *q /= total[0]);
    for _ in 0..iterations {
        let mut sums: Vec<f64> = (0..k).map(|j| q.iter().skip(j).step_by(k).sum()).collect();
        group.all_reduce_sum("Sinkhorn's sums", &mut sums);
        for row in q.chunks_exact_mut(k) {
            row.iter_mut().zip(&sums).for_each(|(q, sum)| *q *= share(*sum, k as f64));
            let factor = share(row.iter().sum(), all_rows);
            row.iter_mut().for_each(|q| *q *= factor);
        }
    }
    q.iter_mut().for_each(|q| *q *= all_rows);
}
