//! Weighted k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, section 3.4): each of the `k` most similar
//! bank images votes for its class with weight `exp(s / T)`, `s` the cosine.
//!
//! Exact: every pair is compared. Both sets are walked in blocks and of each query only its best neighbours are kept, so that
//! beside the features a million images need no more room than a thousand; a grid of settings costs one search.

mod cuda;

use std::cmp::Ordering;

use rayon::prelude::*;

use crate::cpu::{Matrix, gemm_sequential};
use crate::device::{Device, DeviceKind};
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

/// What a vote answers for one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The class.
    pub class: u32,
    /// Its nearest bank images, best first: the cosine, and the row in the bank.
    pub nearest: Vec<(f32, u32)>,
}

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
    assert!(settings.iter().all(|s| s.k > 0 && s.temperature > 0.0), "knn: {settings:?}");
    let k = settings.iter().map(|s| s.k).max().expect("knn: no settings");
    let classes = classes_of(bank);
    let right = search(bank, queries, k, device, |neighbours, query| {
        let vote = |setting| vote(neighbours, bank, classes, setting) == queries.labels[query];
        settings.iter().map(vote).collect::<Vec<bool>>()
    })?;
    let share = |i: usize| right.iter().filter(|right| right[i]).count() as f64;
    Ok((0..settings.len()).map(|i| share(i) / right.len() as f64).collect())
}

/// The vote's answer for each query, with the `keep` nearest images (at most `knn.k`).
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// As [`accuracy`].
pub fn answers(
    bank: &Features,
    queries: &Features,
    knn: Knn,
    keep: usize,
    device: &Device,
) -> Result<Vec<Answer>> {
    assert!(knn.k > 0 && knn.temperature > 0.0, "knn: {knn:?}");
    let classes = classes_of(bank);
    search(bank, queries, knn.k, device, |neighbours, _| Answer {
        class: vote(neighbours, bank, classes, &knn),
        nearest: neighbours.iter().take(keep).copied().collect(),
    })
}

/// What `each` makes of every query's `k` nearest, best first, and the query's place.
fn search<R: Send>(
    bank: &Features,
    queries: &Features,
    k: usize,
    device: &Device,
    each: impl Fn(&[(f32, u32)], usize) -> R + Sync,
) -> Result<Vec<R>> {
    assert_eq!(bank.d, queries.d, "knn: features of different sizes");
    assert!(!bank.labels.is_empty() && !queries.labels.is_empty(), "knn: an empty set");
    assert!(bank.d > 0, "knn: no features");
    let k = k.min(bank.labels.len());
    match device.kind() {
        // More neighbours than the kernels sort: rare enough for the host.
        DeviceKind::Cuda if k <= cuda::K_MAX => cuda::search(bank, queries, k, device, &each),
        _ => Ok(device.run(|| search_on_host(bank, queries, k, &each))),
    }
}

fn search_on_host<R: Send>(
    bank: &Features,
    queries: &Features,
    k: usize,
    each: impl Fn(&[(f32, u32)], usize) -> R + Sync,
) -> Vec<R> {
    let (n, d, scales) = (bank.labels.len(), bank.d, inverse_norms(&bank.values, bank.d));
    let of_chunk = |(chunk, rows): (usize, &[f32])| {
        let (mut rows, mut block) = (rows.to_vec(), Vec::new());
        let own_scales = inverse_norms(&rows, d);
        to_unit(&mut rows, d, &own_scales);
        let count = rows.len() / d;
        let mut best: Vec<Best> = (0..count).map(|_| Best::new(k)).collect();
        let mut similar = vec![0.0; count * BANK];
        for first in (0..n).step_by(BANK) {
            let columns = BANK.min(n - first);
            block.clear();
            block.extend_from_slice(&bank.values[first * d..][..columns * d]);
            to_unit(&mut block, d, &scales[first..]);
            let similar = &mut similar[..count * columns];
            let all = Matrix::new(&block, columns, d).transposed();
            gemm_sequential(similar, Matrix::new(&rows, count, d), all, false);
            for (best, similar) in best.iter_mut().zip(similar.chunks_exact(columns)) {
                similar.iter().zip(first as u32..).for_each(|(&s, index)| best.show(s, index));
            }
        }
        let queries = best.into_iter().zip(chunk * QUERIES..);
        queries.map(|(best, query)| each(&best.sorted(), query)).collect::<Vec<R>>()
    };
    let chunks: Vec<Vec<R>> =
        queries.values.par_chunks(QUERIES * d).enumerate().map(of_chunk).collect();
    chunks.into_iter().flatten().collect()
}

/// The class for which the nearest `setting.k` of `neighbours`, best first, vote.
fn vote(neighbours: &[(f32, u32)], bank: &Features, classes: usize, setting: &Knn) -> u32 {
    let mut votes = vec![0.0; classes];
    for &(similar, row) in neighbours.iter().take(setting.k) {
        votes[bank.labels[row as usize] as usize] +=
            (f64::from(similar) / setting.temperature).exp();
    }
    (0..classes).fold(0, |best, c| if votes[c] > votes[best] { c } else { best }) as u32
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
        let told = answers(&bank, &queries, grid[1], 2, &device).unwrap();
        let rows = |answer: &Answer| answer.nearest.iter().map(|&(_, row)| row).collect::<Vec<_>>();
        assert_eq!((told[0].class, rows(&told[0])), (1, vec![0, 2]));
        assert_eq!((told[1].class, rows(&told[1])), (1, vec![1, 2]));
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
