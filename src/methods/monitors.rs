//! Readings that show a practitioner how training goes, read from the device once an epoch
//! ([`Method::monitors`](super::Method::monitors)).

use serde::{Deserialize, Serialize};

use crate::arena::Arena;
use crate::tensor::Tensor;

/// The value of a monitor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reading {
    /// One number.
    Number(f64),
    /// Counts of values in each of [`BINS`] equal bins of `-1..=1`.
    Histogram(Vec<u32>),
}

/// Readings by the names of their monitors.
pub type Readings = Vec<(&'static str, Reading)>;

/// Number of bins of a histogram of cosines.
pub const BINS: usize = 20;

/// Rows that are compared with each other. More pairs would cost more than they reveal.
const ROWS: usize = 64;

/// Rows of a queue with which they are compared.
const NEGATIVES: usize = 256;

/// At most `limit` rows of `x [n, d]`, evenly spaced, normalised to unit length.
fn unit_rows(x: &Tensor, limit: usize) -> Vec<Vec<f64>> {
    let [n, d] = x.dims("monitors: the rows");
    let values = x.to_f64();
    let count = n.min(limit);
    let unit = |i: usize| {
        let row = &values[i * n / count.max(1) * d..][..d];
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
        row.iter().map(|v| v / norm).collect()
    };
    (0..count).map(unit).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn histogram(cosines: &[f64]) -> Reading {
    let mut bins = vec![0; BINS];
    for cosine in cosines.iter().filter(|c| c.is_finite()) {
        let bin = ((cosine + 1.0) / 2.0 * BINS as f64) as usize;
        bins[bin.min(BINS - 1)] += 1;
    }
    Reading::Histogram(bins)
}

/// Means and histograms of two sets of cosines: of each row of `a [n, d]` with the same row of `b [n, d]`, and with `negatives
/// [m, d]` if given, otherwise with the other rows of `b`.
pub(super) fn similarities(a: &Tensor, b: &Tensor, negatives: Option<&Tensor>) -> Readings {
    let (a, b) = (unit_rows(a, ROWS), unit_rows(b, ROWS));
    let positive: Vec<f64> = a.iter().zip(&b).map(|(a, b)| dot(a, b)).collect();
    let mut negative = Vec::new();
    let others = negatives.map(|rows| unit_rows(rows, NEGATIVES));
    for (i, a) in a.iter().enumerate() {
        match &others {
            Some(rows) => negative.extend(rows.iter().map(|row| dot(a, row))),
            None => {
                let rest = b.iter().enumerate().filter(|&(j, _)| j != i);
                negative.extend(rest.map(|(_, b)| dot(a, b)));
            }
        }
    }
    vec![
        // The mean squared distance of positive pairs (Wang and Isola 2020, arXiv:2005.10242, equation 5, alpha = 2).
        ("alignment", Reading::Number(2.0 - 2.0 * mean(&positive))),
        ("positive_similarity", Reading::Number(mean(&positive))),
        ("negative_similarity", Reading::Number(mean(&negative))),
        ("positive_histogram", histogram(&positive)),
        ("negative_histogram", histogram(&negative)),
    ]
}

/// The mean cosine of each row of `a [n, d]` with the same row of `b [n, d]`.
pub(super) fn mean_cosine(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (unit_rows(a, ROWS), unit_rows(b, ROWS));
    mean(&a.iter().zip(&b).map(|(a, b)| dot(a, b)).collect::<Vec<_>>())
}

/// The lag of a momentum encoder: `|online - other| / |online|` over all parameters.
pub(super) fn distance(online: &Arena, other: &Arena) -> (&'static str, Reading) {
    let apart = online.values().squared_distance(other.values());
    let size = online.values().squared_norm();
    ("target_distance", Reading::Number((apart / size.max(f64::MIN_POSITIVE)).sqrt()))
}

/// `ln(candidates) - loss`: a lower bound, in nats, on the mutual information of two views. It cannot exceed `ln(candidates)`
/// (van den Oord et al. 2018, section 2.3, arXiv:1807.03748). `loss` is InfoNCE of one direction.
pub(super) fn information(candidates: usize, loss: f64) -> (&'static str, Reading) {
    ("mutual_information_bound", Reading::Number((candidates as f64).ln() - loss))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn number(readings: &Readings, name: &str) -> f64 {
        match readings.iter().find(|(known, _)| *known == name) {
            Some((_, Reading::Number(value))) => *value,
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn similarities_are_cosines_with_the_same_row_and_with_other_rows() {
        let device = Device::reference();
        let a = Tensor::from_f64(&device, [2, 2], &[2.0, 0.0, 0.0, 1.0]);
        let b = Tensor::from_f64(&device, [2, 2], &[1.0, 0.0, 0.6, 0.8]);
        let readings = similarities(&a, &b, None);
        assert!((number(&readings, "positive_similarity") - 0.9).abs() < 1e-12);
        assert!((number(&readings, "alignment") - 0.2).abs() < 1e-12);
        assert!((number(&readings, "negative_similarity") - 0.3).abs() < 1e-12);
        let queue = Tensor::from_f64(&device, [1, 2], &[-1.0, 0.0]);
        let readings = similarities(&a, &b, Some(&queue));
        assert!((number(&readings, "negative_similarity") + 0.5).abs() < 1e-12);
        let Reading::Histogram(bins) = &readings[4].1 else { panic!("{readings:?}") };
        assert_eq!((bins[0], bins[10], bins.iter().sum::<u32>()), (1, 1, 2));
    }

    #[test]
    fn a_loss_at_chance_level_bounds_mutual_information_by_zero() {
        let (_, Reading::Number(bound)) = information(65_537, 65_537_f64.ln()) else { panic!() };
        assert!(bound.abs() < 1e-12);
    }
}
