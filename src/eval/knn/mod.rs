//! Weighted k-nearest-neighbour accuracy (Wu et al. 2018, arXiv:1805.01978, section 3.4): each of the `k` most similar
//! bank images votes for its class with weight `exp(s / T)`, `s` the cosine.
//!
//! The search is exact: every pair is compared. Both sets are processed in blocks and only the best neighbours of each query
//! are kept, so that apart from the features a million images need no more memory than a thousand. A grid of settings costs
//! one search.

mod cuda;

use std::cmp::Ordering;

use rayon::prelude::*;

use crate::cpu::{Matrix, gemm_sequential};
use crate::device::{Device, DeviceKind};
use crate::error::Result;
use crate::eval::Features;
use crate::eval::features::{check_finite, some_readable};

/// The settings of the vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Knn {
    /// Number of neighbours that vote; all bank images if there are fewer.
    pub k: usize,
    /// T, > 0.
    pub temperature: f64,
}

impl Default for Knn {
    /// k = 200, T = 0.1, as in MoCo's demo, lightly and vissl.
    fn default() -> Self {
        Self { k: 200, temperature: 0.1 }
    }
}

/// Held-out images per task, and bank images per block.
const QUERIES: usize = 64;
const BANK: usize = 1024;

/// The result of the vote for one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The class with the most votes.
    pub class: u32,
    /// The nearest bank images, best first: cosine, and row in the bank.
    pub nearest: Vec<(f32, u32)>,
}

/// Returns the share, in `0..=1`, of `queries` for which the weighted vote of their neighbours in `bank` gives their own class.
///
/// Tied votes go to the lower class, equal similarities to the earlier bank image.
///
/// # Errors
/// If a set is empty, a feature is NaN or infinite, or the device fails.
///
/// # Panics
/// If the features differ in length, or a setting is 0.
pub fn accuracy(bank: &Features, queries: &Features, knn: Knn, device: &Device) -> Result<f64> {
    Ok(accuracies(bank, queries, &[knn], device)?[0])
}

/// Returns [`accuracy`] under each of `settings`, from one search.
///
/// # Errors
/// If the device fails.
///
/// # Panics
/// As [`accuracy`], or if `settings` is empty.
pub fn accuracies(
    bank: &Features,
    queries: &Features,
    settings: &[Knn],
    device: &Device,
) -> Result<Vec<f64>> {
    assert!(settings.iter().all(|s| s.k > 0 && s.temperature > 0.0), "knn: {settings:?}");
    let k = settings.iter().map(|s| s.k).max().expect("knn: no settings");
    let classes = classes_of(bank);
    let correct = search(bank, queries, k, device, |neighbours, query| {
        let vote = |setting| vote(neighbours, bank, classes, setting) == queries.labels[query];
        settings.iter().map(vote).collect::<Vec<bool>>()
    })?;
    let count = |i: usize| correct.iter().filter(|correct| correct[i]).count() as f64;
    Ok((0..settings.len()).map(|i| count(i) / correct.len() as f64).collect())
}

/// Returns the vote's result for each query, with the `keep` nearest images (at most `knn.k`).
///
/// # Errors
/// If the device fails.
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

/// Calls `each` with the `k` nearest bank images of every query, best first, and the query's index; returns the results in the
/// order of the queries.
fn search<R: Send>(
    bank: &Features,
    queries: &Features,
    k: usize,
    device: &Device,
    each: impl Fn(&[(f32, u32)], usize) -> R + Sync,
) -> Result<Vec<R>> {
    assert_eq!(bank.d, queries.d, "knn: features of different lengths");
    assert!(bank.d > 0, "knn: no features");
    for (what, set) in [("training", bank), ("held-out", queries)] {
        some_readable(set.labels.len(), &set.skipped)?;
        let name = |row: usize| format!("{what} image {}", set.images()[row]);
        check_finite(&set.values, set.d, "features", name)?;
    }
    let k = k.min(bank.labels.len());
    match device.kind() {
        // For more neighbours than the kernels sort the host is fast enough: the case is rare.
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
                similar.iter().zip(first as u32..).for_each(|(&s, index)| best.offer(s, index));
            }
        }
        let queries = best.into_iter().zip(chunk * QUERIES..);
        queries.map(|(best, query)| each(&best.sorted(), query)).collect::<Vec<R>>()
    };
    let chunks: Vec<Vec<R>> =
        queries.values.par_chunks(QUERIES * d).enumerate().map(of_chunk).collect();
    chunks.into_iter().flatten().collect()
}

/// Returns the class that the nearest `setting.k` of `neighbours`, best first, vote for.
fn vote(neighbours: &[(f32, u32)], bank: &Features, classes: usize, setting: &Knn) -> u32 {
    let mut votes = vec![0.0; classes];
    // Relative to the nearest: at a small temperature the exponentials would overflow, and all votes be infinite.
    let nearest = neighbours.first().map_or(0.0, |&(similar, _)| f64::from(similar));
    for &(similar, row) in neighbours.iter().take(setting.k) {
        votes[bank.labels[row as usize] as usize] +=
            ((f64::from(similar) - nearest) / setting.temperature).exp();
    }
    (0..classes).fold(0, |best, c| if votes[c] > votes[best] { c } else { best }) as u32
}

fn classes_of(bank: &Features) -> usize {
    bank.labels.iter().max().map_or(0, |&l| l as usize + 1)
}

/// Returns the reciprocal norm of each row; 0 for a row of zeros.
fn inverse_norms(rows: &[f32], d: usize) -> Vec<f64> {
    let inverse = |row: &[f32]| {
        let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 { 1.0 / norm } else { 0.0 }
    };
    rows.par_chunks(d).map(inverse).collect()
}

/// Norms whose reciprocals f32 holds at full precision, with room to spare.
const PLAIN: std::ops::Range<f64> = 1e-30..1e30;

fn to_unit(rows: &mut [f32], d: usize, scales: &[f64]) {
    for (row, &scale) in rows.chunks_exact_mut(d).zip(scales) {
        if PLAIN.contains(&scale) {
            row.iter_mut().for_each(|v| *v *= scale as f32);
        } else {
            row.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
        }
    }
}

/// Keeps the `k` best of all `(similarity, index)` that are offered in the order of their indices.
struct Best {
    k: usize,
    found: Vec<(f32, u32)>,
    /// The similarity that a candidate must exceed, once there are `k`.
    threshold: Option<f32>,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { k, found: Vec::with_capacity(2 * k), threshold: None }
    }

    fn offer(&mut self, similar: f32, index: u32) {
        if self
            .threshold
            .is_some_and(|threshold| similar.total_cmp(&threshold) != Ordering::Greater)
        {
            return;
        }
        self.found.push((similar, index));
        if self.found.len() == 2 * self.k {
            self.found.select_nth_unstable_by(self.k - 1, closer);
            self.found.truncate(self.k);
            self.threshold = Some(self.found[self.k - 1].0);
        }
    }

    /// Returns the best, best first.
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
        // Without weights the three far images win; with a single neighbour nothing outvotes it.
        let grid = [knn(4, 0.1), knn(4, 1e6), knn(1, 1e6), knn(9, 0.1)];
        assert_eq!(accuracies(&bank, &queries, &grid, &device).unwrap(), [1.0, 0.5, 1.0, 1.0]);
        assert_eq!(accuracy(&bank, &queries, grid[1], &device).unwrap(), 0.5);
        let answered = answers(&bank, &queries, grid[1], 2, &device).unwrap();
        let rows = |answer: &Answer| answer.nearest.iter().map(|&(_, row)| row).collect::<Vec<_>>();
        assert_eq!((answered[0].class, rows(&answered[0])), (1, vec![0, 2]));
        assert_eq!((answered[1].class, rows(&answered[1])), (1, vec![1, 2]));
    }

    #[test]
    fn a_small_temperature_leaves_the_vote_to_the_nearest_neighbour() {
        let bank = features(&[([1.0, 0.0], 1), ([0.9, 0.2], 0), ([0.8, 0.3], 0), ([0.0, 1.0], 0)]);
        let queries = features(&[([1.0, 0.01], 1), ([0.0, 1.0], 0)]);
        let device = Device::cpu(1).unwrap();
        for temperature in [0.002, 0.0014, 0.001, 1e-6, 1e-300, f64::MIN_POSITIVE] {
            let knn = Knn { k: 4, temperature };
            assert_eq!(accuracy(&bank, &queries, knn, &device).unwrap(), 1.0, "{temperature}");
        }
    }

    #[test]
    fn the_scale_of_features_does_not_change_the_neighbours() {
        let rows = [([1.0, 0.0], 0), ([0.0, 1.0], 1), ([0.1, 1.0], 1), ([-0.1, 1.0], 1)];
        let scaled = |scale: f32| features(&rows.map(|([a, b], l)| ([a * scale, b * scale], l)));
        let device = Device::cpu(1).unwrap();
        let knn = Knn { k: 1, temperature: 0.1 };
        for scale in [1e-42, 1e-36, 1e-20, 1.0, 1e20, 3e38] {
            let set = scaled(scale);
            assert_eq!(accuracy(&set, &set, knn, &device).unwrap(), 1.0, "{scale}");
        }
        for wrong in [f32::NAN, f32::INFINITY] {
            let (good, mut bad) = (scaled(1.0), scaled(1.0));
            bad.values[5] = wrong;
            for (bank, queries, what) in [(&bad, &good, "training"), (&good, &bad, "held-out")] {
                let error = accuracy(bank, queries, knn, &device).unwrap_err().to_string();
                assert!(error.starts_with(&format!("{what} image 2: the features")), "{error}");
            }
        }
        let error = accuracy(&Features::none(2), &scaled(1.0), knn, &device).unwrap_err();
        assert_eq!(error.to_string(), "there are no images to evaluate on");
    }

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        let mut rng = Philox::new(2, Purpose::Test, 0, 0);
        // Few levels, so that many are equal.
        let all: Vec<(f32, u32)> = (0..500).map(|i| (rng.below(40) as f32 - 20.0, i)).collect();
        let mut order = all.clone();
        order.sort_by(closer);
        for k in [1, 7, 200, 500, 600] {
            let mut best = Best::new(k);
            all.iter().for_each(|&(similar, index)| best.offer(similar, index));
            assert_eq!(best.sorted(), order[..k.min(500)], "{k}");
        }
    }
}
