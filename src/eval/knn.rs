//! Weighted k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, section 3.4): each of the `k` most similar
//! bank images votes for its class with weight `exp(s / T)`, `s` the cosine.

use rayon::prelude::*;

use crate::device::{Device, Matrix, product_alone};
use crate::eval::Features;

/// Settings of the vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knn {
    /// Neighbours that vote; as many as there are if fewer.
    pub k: usize,
    /// T, > 0.
    pub temperature: f64,
}

impl Default for Knn {
    /// k = 200, T = 0.1, as MoCo's demo, lightly and vissl have it.
    fn default() -> Self {
        Self { k: 200, temperature: 0.1 }
    }
}

/// Held-out images of one task; memory is this many rows of the bank's length a thread.
const CHUNK: usize = 16;

/// The share, in `0..=1`, of `queries` whose weighted vote among `bank` is their own class. Exact: every pair is compared, a
/// few rows at a time. Ties go to the lower class, equal similarities to the earlier bank image.
///
/// # Panics
/// When the features differ in size, there are none, or a setting is 0.
pub fn accuracy(bank: &Features, queries: &Features, knn: Knn, device: &Device) -> f64 {
    assert_eq!(bank.d, queries.d, "knn: features of different sizes");
    assert!(!bank.labels.is_empty() && !queries.labels.is_empty(), "knn: an empty set");
    assert!(knn.k > 0 && knn.temperature > 0.0, "knn: {knn:?}");
    let (bank, queries) = (bank.clone().normalised(), queries.clone().normalised());
    let (n, d, k) = (bank.labels.len(), bank.d, knn.k.min(bank.labels.len()));
    let classes = bank.labels.iter().max().map_or(0, |&l| l as usize + 1);
    let right: usize = device.run(|| {
        queries
            .values
            .par_chunks(CHUNK * d)
            .zip(queries.labels.par_chunks(CHUNK))
            .map(|(rows, labels)| {
                let mut similar = vec![0.0; labels.len() * n];
                let rows = Matrix::new(rows, labels.len(), d);
                product_alone(
                    &mut similar,
                    rows,
                    Matrix::new(&bank.values, n, d).transposed(),
                    false,
                );
                let mut order: Vec<u32> = Vec::with_capacity(n);
                let hits = similar.chunks_exact(n).zip(labels).filter(|(similar, label)| {
                    order.clear();
                    order.extend(0..n as u32);
                    let closer = |a: &u32, b: &u32| {
                        similar[*b as usize].total_cmp(&similar[*a as usize]).then(a.cmp(b))
                    };
                    if k < n {
                        order.select_nth_unstable_by(k - 1, closer);
                    }
                    order[..k].sort_unstable_by(closer); // one order of summation
                    let mut votes = vec![0.0; classes];
                    for &i in &order[..k] {
                        let weight = (f64::from(similar[i as usize]) / knn.temperature).exp();
                        votes[bank.labels[i as usize] as usize] += weight;
                    }
                    let mut best = 0;
                    for (class, &vote) in votes.iter().enumerate() {
                        if vote > votes[best] {
                            best = class;
                        }
                    }
                    best == **label as usize
                });
                hits.count()
            })
            .sum()
    });
    right as f64 / queries.labels.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(rows: &[([f32; 2], u32)]) -> Features {
        Features {
            values: rows.iter().flat_map(|(row, _)| *row).collect(),
            d: 2,
            labels: rows.iter().map(|(_, label)| *label).collect(),
            skipped: Vec::new(),
        }
    }

    #[test]
    fn near_neighbours_outvote_many_far_ones() {
        let bank = features(&[([1.0, 0.0], 0), ([0.0, 1.0], 1), ([0.1, 1.0], 1), ([-0.1, 1.0], 1)]);
        let queries = features(&[([5.0, 0.4], 0), ([0.0, 0.2], 1)]);
        let device = Device::cpu(2).unwrap();
        let sharp = Knn { k: 4, temperature: 0.1 };
        assert_eq!(accuracy(&bank, &queries, sharp, &device), 1.0);
        // Without weights the three others win.
        let flat = Knn { k: 4, temperature: 1e6 };
        assert_eq!(accuracy(&bank, &queries, flat, &device), 0.5);
    }
}
