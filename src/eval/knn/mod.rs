//! Weighted k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, section 3.4): each of the `k` most similar
//! bank images votes for its class with weight `exp(s / T)`, `s` the cosine.
//!
//! Exact: every pair is compared. Both sets are walked in blocks and of each query only its best neighbours are kept, so that
//! beside the features a million images need no more room than a thousand; a grid of settings costs one search.

mod cuda;

use std::cmp::Ordering;

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

/// Held-out images of one task, and bank images that they meet at a time.
const QUERIES: usize = 64;
const BANK: usize = 1024;

/// The share, in `0..=1`, of `queries` whose weighted vote among `bank` is their own class. Ties go to the lower class, equal
/// similarities to the earlier bank image.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the features differ in size, there are none, or a setting is 0.
pub fn accuracy(bank: &Features, queries: &Features, knn: Knn, device: &Device) -> Result<f64> {
    Ok(accuracies(bank, queries, &[knn], device)?[0])
}

/// [`accuracy`] under each of `settings`, from one search.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// As [`accuracy`], or when there are no settings.
pub fn accuracies(
    bank: &Features,
    queries: &Features,
    settings: &[Knn],
    device: &Device,
) -> Result<Vec<f64>> {
    assert_eq!(bank.d, queries.d, "knn: features of different sizes");
    assert!(!bank.labels.is_empty() && !queries.labels.is_empty(), "knn: an empty set");
    assert!(bank.d > 0, "knn: no features");
    assert!(settings.iter().all(|s| s.k > 0 && s.temperature > 0.0), "knn: {settings:?}");
    let k = settings.iter().map(|s| s.k).max().expect("knn: no settings").min(bank.labels.len());
    let hits = match device.kind() {
        // More neighbours than the kernels sort: rare enough for the host.
        DeviceKind::Cuda if k <= cuda::K_MAX => cuda::hits(bank, queries, k, settings, device)?,
        _ => device.run(|| hits(bank, queries, k, settings)),
    };
    Ok(hits.into_iter().map(|hits| hits as f64 / queries.labels.len() as f64).collect())
}

/// Queries that are right under each setting.
fn hits(bank: &Features, queries: &Features, k: usize, settings: &[Knn]) -> Vec<usize> {
    let (n, d, scales) = (bank.labels.len(), bank.d, inverse_norms(&bank.values, bank.d));
    let classes = classes_of(bank);
    let of_chunk = |(rows, truth): (&[f32], &[u32])| {
        let (mut rows, mut block) = (rows.to_vec(), Vec::new());
        let own_scales = inverse_norms(&rows, d);
        to_unit(&mut rows, d, &own_scales);
        let mut best: Vec<Best> = truth.iter().map(|_| Best::new(k)).collect();
        let mut similar = vec![0.0; truth.len() * BANK];
        for first in (0..n).step_by(BANK) {
            let columns = BANK.min(n - first);
            block.clear();
            block.extend_from_slice(&bank.values[first * d..][..columns * d]);
            to_unit(&mut block, d, &scales[first..]);
            let similar = &mut similar[..truth.len() * columns];
            let all = Matrix::new(&block, columns, d).transposed();
            product_alone(similar, Matrix::new(&rows, truth.len(), d), all, false);
            for (best, similar) in best.iter_mut().zip(similar.chunks_exact(columns)) {
                similar.iter().zip(first as u32..).for_each(|(&s, index)| best.show(s, index));
            }
        }
        let neighbours = best.into_iter().map(Best::sorted);
        let mut hits = vec![0; settings.len()];
        for (neighbours, &truth) in neighbours.zip(truth) {
            let of = |&(similar, index): &(f32, u32)| (similar, bank.labels[index as usize]);
            let neighbours: Vec<(f32, u32)> = neighbours.iter().map(of).collect();
            count(&mut hits, &neighbours, truth, settings, classes);
        }
        hits
    };
    let sum = |a: Vec<usize>, b: Vec<usize>| a.iter().zip(b).map(|(a, b)| a + b).collect();
    let rows = queries.values.par_chunks(QUERIES * d);
    let chunks = rows.zip(queries.labels.par_chunks(QUERIES));
    chunks.map(of_chunk).reduce(|| vec![0; settings.len()], sum)
}

/// Adds a query to the hits of the settings under which its neighbours `(similarity, class)`, best first, vote for `truth`.
fn count(
    hits: &mut [usize],
    neighbours: &[(f32, u32)],
    truth: u32,
    settings: &[Knn],
    classes: usize,
) {
    let mut votes = vec![0.0; classes];
    for (hits, setting) in hits.iter_mut().zip(settings) {
        votes.fill(0.0);
        for &(similar, class) in neighbours.iter().take(setting.k) {
            votes[class as usize] += (f64::from(similar) / setting.temperature).exp();
        }
        let best = (0..classes).fold(0, |best, c| if votes[c] > votes[best] { c } else { best });
        *hits += usize::from(best as u32 == truth);
    }
}

fn classes_of(bank: &Features) -> usize {
    bank.labels.iter().max().map_or(0, |&l| l as usize + 1)
}

/// One over the length of each row.
fn inverse_norms(rows: &[f32], d: usize) -> Vec<f32> {
    let inverse = |row: &[f32]| {
        let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        (1.0 / norm.max(1e-12)) as f32
    };
    rows.par_chunks(d).map(inverse).collect()
}

fn to_unit(rows: &mut [f32], d: usize, scales: &[f32]) {
    for (row, scale) in rows.chunks_exact_mut(d).zip(scales) {
        row.iter_mut().for_each(|v| *v *= scale);
    }
}

/// The `k` best of all `(similarity, index)` that it is shown by rising index.
struct Best {
    k: usize,
    found: Vec<(f32, u32)>,
    /// What a newcomer must exceed, once there are `k`.
    least: Option<f32>,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { k, found: Vec::with_capacity(2 * k), least: None }
    }

    fn show(&mut self, similar: f32, index: u32) {
        if self.least.is_some_and(|least| similar.total_cmp(&least) != Ordering::Greater) {
            return;
        }
        self.found.push((similar, index));
        if self.found.len() == 2 * self.k {
            self.found.select_nth_unstable_by(self.k - 1, closer);
            self.found.truncate(self.k);
            self.least = Some(self.found[self.k - 1].0);
        }
    }

    /// Best first.
    fn sorted(mut self) -> Vec<(f32, u32)> {
        self.found.sort_unstable_by(closer);
        self.found.truncate(self.k);
        self.found
    }
}

fn closer(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Philox, Purpose};

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
        let knn = |k, temperature| Knn { k, temperature };
        // Without weights the three others win; without neighbours but one nobody outvotes.
        let grid = [knn(4, 0.1), knn(4, 1e6), knn(1, 1e6), knn(9, 0.1)];
        assert_eq!(accuracies(&bank, &queries, &grid, &device).unwrap(), [1.0, 0.5, 1.0, 1.0]);
        assert_eq!(accuracy(&bank, &queries, grid[1], &device).unwrap(), 0.5);
    }

    #[test]
    fn the_best_are_those_of_a_whole_sort() {
        let mut rng = Philox::new(2, Purpose::Test, 0, 0);
        // Of few levels, so that many are equal.
        let all: Vec<(f32, u32)> = (0..500).map(|i| (rng.below(40) as f32 - 20.0, i)).collect();
        let mut order = all.clone();
        order.sort_by(closer);
        for k in [1, 7, 200, 500, 600] {
            let mut best = Best::new(k);
            all.iter().for_each(|&(similar, index)| best.show(similar, index));
            assert_eq!(best.sorted(), order[..k.min(500)], "{k}");
        }
    }
}
