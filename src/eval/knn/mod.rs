//! Weighted k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, section 3.4): each of the `k` most similar
//! bank images votes for its class with weight `exp(s / T)`, `s` the cosine.

mod cuda;

use rayon::prelude::*;

use crate::device::{Device, DeviceKind, Matrix, product_alone};
use crate::error::Result;
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

/// A vote with its numbers settled.
#[derive(Clone, Copy, Debug)]
struct Vote {
    /// At most as many as the bank has.
    k: usize,
    temperature: f64,
    classes: usize,
}

/// The share, in `0..=1`, of `queries` whose weighted vote among `bank` is their own class. Exact: every pair is compared, a
/// few rows at a time. Ties go to the lower class, equal similarities to the earlier bank image.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the features differ in size, there are none, or a setting is 0.
pub fn accuracy(bank: &Features, queries: &Features, knn: Knn, device: &Device) -> Result<f64> {
    assert_eq!(bank.d, queries.d, "knn: features of different sizes");
    assert!(!bank.labels.is_empty() && !queries.labels.is_empty(), "knn: an empty set");
    assert!(knn.k > 0 && knn.temperature > 0.0, "knn: {knn:?}");
    let (bank, queries) = (bank.clone().normalised(), queries.clone().normalised());
    let classes = bank.labels.iter().max().map_or(0, |&l| l as usize + 1);
    let k = knn.k.min(bank.labels.len());
    let vote = Vote { k, temperature: knn.temperature, classes };
    let predicted = match device.kind() {
        // More neighbours than the kernels sort, or a bank without features: rare enough for the host.
        DeviceKind::Cuda if k <= cuda::K_MAX && bank.d > 0 => {
            let predicted = cuda::predictions(&bank, &queries, vote, device);
            device.check()?; // after a failure they are no classes
            predicted
        }
        _ => device.run(|| predictions(&bank, &queries, vote)),
    };
    let hits = predicted.iter().zip(&queries.labels).filter(|(got, want)| **got as u32 == **want);
    Ok(hits.count() as f64 / queries.labels.len() as f64)
}

/// The class that the neighbours of each query vote for; both sets have unit rows.
fn predictions(bank: &Features, queries: &Features, vote: Vote) -> Vec<i32> {
    let (n, d) = (bank.labels.len(), bank.d);
    let chunks = queries.values.par_chunks(CHUNK * d).zip(queries.labels.par_chunks(CHUNK));
    let of_chunk = |(rows, labels): (&[f32], &[u32])| {
        let mut similar = vec![0.0; labels.len() * n];
        let rows = Matrix::new(rows, labels.len(), d);
        let all = Matrix::new(&bank.values, n, d).transposed();
        product_alone(&mut similar, rows, all, false);
        let mut order = Vec::with_capacity(n);
        let of_row = |similar| voted(similar, &bank.labels, &mut order, vote);
        similar.chunks_exact(n).map(of_row).collect::<Vec<_>>()
    };
    chunks.flat_map_iter(of_chunk).collect()
}

/// The class that the rows most similar to one query vote for. `order` is room to sort in.
fn voted(similar: &[f32], labels: &[u32], order: &mut Vec<u32>, vote: Vote) -> i32 {
    let Vote { k, temperature, classes } = vote;
    order.clear();
    order.extend(0..similar.len() as u32);
    let closer =
        |a: &u32, b: &u32| similar[*b as usize].total_cmp(&similar[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, closer);
    }
    order[..k].sort_unstable_by(closer); // one order of summation
    let mut votes = vec![0.0; classes];
    for &i in &order[..k] {
        let weight = (f64::from(similar[i as usize]) / temperature).exp();
        votes[labels[i as usize] as usize] += weight;
    }
    let mut best = 0;
    for (class, &vote) in votes.iter().enumerate() {
        if vote > votes[best] {
            best = class;
        }
    }
    best as i32
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
        assert_eq!(accuracy(&bank, &queries, sharp, &device).unwrap(), 1.0);
        // Without weights the three others win.
        let flat = Knn { k: 4, temperature: 1e6 };
        assert_eq!(accuracy(&bank, &queries, flat, &device).unwrap(), 0.5);
    }
}
