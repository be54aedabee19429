//! A two-dimensional map of features by exact t-SNE (van der Maaten and Hinton 2008, JMLR 9). It uses no random numbers, so
//! that one set of features has one map on any number of threads.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::cpu::{Matrix, gemm_sequential};
use crate::device::Device;

/// Effective number of neighbours; less if there are few rows.
const PERPLEXITY: f32 = 30.0;
/// Number of steps, and of those at the beginning whose attraction is exaggerated.
const STEPS: usize = 400;
const EXAGGERATED: usize = 100;
const EXAGGERATION: f32 = 12.0;
/// Lanes of a sum, so that the compiler may use vectors.
const LANES: usize = 16;

/// Returns a point in the plane for each of the rows `features [n, d]`, compared by their cosines.
///
/// Near rows are near in the plane; distances between groups mean little. Takes `O(n^2)` time and memory: meant for one or two
/// thousand rows. Starts from the two principal components.
///
/// # Panics
/// If the number of features is not a multiple of `d`.
pub fn map(features: &[f32], d: usize, device: &Device) -> Vec<[f32; 2]> {
    assert!(d > 0 && features.len().is_multiple_of(d), "map: rows of {d} features");
    let n = features.len() / d;
    device.host().run(|| match n {
        0 => Vec::new(),
        1 => vec![[0.0; 2]],
        _ => {
            let rows = unit_rows(features, d);
            let start = components(&rows, d);
            descend(&affinities(&rows, n, d), start)
        }
    })
}

fn unit_rows(features: &[f32], d: usize) -> Vec<f32> {
    let mut rows = features.to_vec();
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|v| *v /= norm);
    }
    rows
}

/// Returns the symmetric neighbour probabilities `[n, n]`, which sum to 1.
fn affinities(rows: &[f32], n: usize, d: usize) -> Vec<f32> {
    let mut p = vec![0.0; n * n];
    let all = Matrix::new(rows, n, d);
    gemm_sequential(&mut p, all, Matrix::new(rows, n, d).transposed(), false);
    let entropy = PERPLEXITY.min((n - 1) as f32 / 3.0).max(1.0).ln();
    p.par_chunks_exact_mut(n).enumerate().each(|(i, row)| {
        row.iter_mut().for_each(|cosine| *cosine = (2.0 - 2.0 * *cosine).max(0.0));
        conditional(row, i, entropy);
    });
    for i in 0..n {
        for j in 0..i {
            let both = (p[i * n + j] + p[j * n + i]) / (2 * n) as f32;
            (p[i * n + j], p[j * n + i]) = (both, both);
        }
    }
    p
}

/// Turns squared distances from row `i` into probabilities of the given entropy, by bisection.
fn conditional(row: &mut [f32], i: usize, entropy: f32) {
    // Only differences of distances matter. With the smallest subtracted, not all exponentials underflow.
    let others = || row.iter().enumerate().filter(move |&(j, _)| j != i).map(|(_, &v)| v);
    let nearest = others().fold(f32::INFINITY, f32::min);
    let (mut beta, mut low, mut high) = (1.0_f32, 0.0_f32, f32::INFINITY);
    for _ in 0..64 {
        let (mut sum, mut moment) = (0.0, 0.0);
        for v in others() {
            let weight = (-beta * (v - nearest)).exp();
            sum += weight;
            moment += weight * (v - nearest);
        }
        let found = sum.ln() + beta * moment / sum;
        if (found - entropy).abs() < 1e-4 {
            break;
        }
        if found > entropy {
            low = beta
        } else {
            high = beta
        }
        beta = if high.is_finite() { (low + high) / 2.0 } else { beta * 2.0 };
        if beta > 1e12 {
            break; // many rows coincide: no sharpness tells them apart
        }
    }
    let sum: f32 = others().map(|v| (-beta * (v - nearest)).exp()).sum();
    for (j, v) in row.iter_mut().enumerate() {
        *v = if j == i { 0.0 } else { (-beta * (*v - nearest)).exp() / sum };
    }
}

/// Returns the scores of the rows on their first two principal components, scaled to 1e-4.
fn components(rows: &[f32], d: usize) -> [Vec<f32>; 2] {
    let n = rows.len() / d;
    let mut centred = rows.to_vec();
    let mut mean = vec![0.0; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(mean, v)| *mean += v / n as f32);
    }
    for row in centred.chunks_exact_mut(d) {
        row.iter_mut().zip(&mean).for_each(|(v, mean)| *v -= mean);
    }
    [0, 1].map(|which| {
        // Power iteration from the longest row. The component found is removed from the rows before the next one.
        let length = |row: &[f32]| row.iter().map(|v| v * v).sum::<f32>();
        let rows = || centred.chunks_exact(d);
        let longest = rows().max_by(|a, b| length(a).total_cmp(&length(b)));
        let mut direction = longest.expect("there are rows").to_vec();
        let mut scores = vec![0.0; n];
        for _ in 0..30 {
            let norm = length(&direction).sqrt().max(1e-20);
            direction.iter_mut().for_each(|v| *v /= norm);
            let dot = |row: &[f32]| row.iter().zip(&direction).map(|(a, b)| a * b).sum::<f32>();
            scores = rows().map(dot).collect();
            direction.fill(0.0);
            for (row, &score) in rows().zip(&scores) {
                direction.iter_mut().zip(row).for_each(|(v, x)| *v += score * x);
            }
        }
        let norm = length(&direction).sqrt().max(1e-20);
        for (row, score) in centred.chunks_exact_mut(d).zip(&scores) {
            row.iter_mut().zip(&direction).for_each(|(v, x)| *v -= score * x / norm);
        }
        let scale = (scores.iter().map(|v| v * v).sum::<f32>() / n as f32).sqrt();
        // Identical rows are put on a spiral: at one point no force would separate them.
        let spiral = |i: usize| match which {
            0 => (2.4 * i as f32).cos() * i as f32 / n as f32,
            _ => (2.4 * i as f32).sin() * i as f32 / n as f32,
        };
        let degenerate = scale < 1e-9;
        let position = |(i, v): (usize, &f32)| if degenerate { spiral(i) } else { v / scale };
        scores.iter().enumerate().map(|pair| 1e-4 * position(pair)).collect()
    })
}

/// Gradient descent with momentum and the per-coordinate gains of van der Maaten's implementation.
fn descend(p: &[f32], [mut x, mut y]: [Vec<f32>; 2]) -> Vec<[f32; 2]> {
    let n = x.len();
    let rate = (n as f32 / EXAGGERATION).max(50.0);
    let mut updates = vec![[[0.0_f32; 2], [1.0; 2]]; n]; // the last step, and the gains
    for step in 0..STEPS {
        let (exaggeration, momentum) =
            if step < EXAGGERATED { (EXAGGERATION, 0.5) } else { (1.0, 0.8) };
        let forces: Vec<Forces> = p
            .par_chunks_exact(n)
            .enumerate()
            .map(|(i, row)| Forces::on([x[i], y[i]], row, &x, &y))
            .collect();
        // Each row's sum includes its own weight, which is 1.
        let total = forces.iter().map(|f| f64::from(f.weight)).sum::<f64>() - n as f64;
        let total = total.max(1e-12) as f32;
        for (i, (force, [last, gains])) in forces.iter().zip(&mut updates).enumerate() {
            for (axis, coordinate) in [&mut x[i], &mut y[i]].into_iter().enumerate() {
                let gradient =
                    4.0 * (exaggeration * force.attraction[axis] - force.repulsion[axis] / total);
                let same = (gradient > 0.0) == (last[axis] > 0.0);
                gains[axis] = if same { (gains[axis] * 0.8).max(0.01) } else { gains[axis] + 0.2 };
                last[axis] = momentum * last[axis] - rate * gains[axis] * gradient;
                *coordinate += last[axis];
            }
        }
        for coordinates in [&mut x, &mut y] {
            let mean = coordinates.iter().sum::<f32>() / n as f32;
            coordinates.iter_mut().for_each(|v| *v -= mean);
        }
    }
    x.into_iter().zip(y).map(|(x, y)| [x, y]).collect()
}

/// The attraction of a point, before exaggeration, and its repulsion, before division by the sum of all weights.
struct Forces {
    attraction: [f32; 2],
    repulsion: [f32; 2],
    weight: f32,
}

impl Forces {
    fn on([px, py]: [f32; 2], p: &[f32], x: &[f32], y: &[f32]) -> Self {
        let mut sums = [[0.0_f32; LANES]; 5];
        let mut add = |lane: usize, p: f32, x: f32, y: f32| {
            let (dx, dy) = (px - x, py - y);
            let weight = 1.0 / (1.0 + dx * dx + dy * dy);
            let (near, far) = (p * weight, weight * weight);
            sums[0][lane] += near * dx;
            sums[1][lane] += near * dy;
            sums[2][lane] += far * dx;
            sums[3][lane] += far * dy;
            sums[4][lane] += weight;
        };
        let in_chunks = p.len() / LANES * LANES;
        let chunks = p.chunks_exact(LANES).zip(x.chunks_exact(LANES)).zip(y.chunks_exact(LANES));
        for ((p, x), y) in chunks {
            for lane in 0..LANES {
                add(lane, p[lane], x[lane], y[lane]);
            }
        }
        (in_chunks..p.len()).for_each(|j| add(j - in_chunks, p[j], x[j], y[j]));
        let [ax, ay, rx, ry, weight] = sums.map(|lanes| lanes.iter().sum::<f32>());
        Self { attraction: [ax, ay], repulsion: [rx, ry], weight }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Philox, Purpose};

    /// `n` rows of 8 around one of three directions, row `i` around direction `i % 3`.
    fn groups(n: usize) -> Vec<f32> {
        let mut rng = Philox::new(3, Purpose::Test, 0, 0);
        let row = |i: usize| (0..8).map(move |j| f32::from(u8::from(j == i % 3)));
        (0..n).flat_map(row).map(|v| v + 0.1 * rng.normal() as f32).collect()
    }

    #[test]
    fn groups_are_separate_and_the_number_of_threads_does_not_matter() {
        let rows = groups(150);
        let places = map(&rows, 8, &Device::cpu(2).unwrap());
        assert_eq!(places, map(&rows, 8, &Device::cpu(1).unwrap()));
        let apart = |a: [f32; 2], b: [f32; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
        for i in 0..150 {
            let others = (0..150).filter(|&j| j != i);
            let nearest = others.min_by(|&a, &b| {
                apart(places[i], places[a]).total_cmp(&apart(places[i], places[b]))
            });
            assert_eq!(nearest.unwrap() % 3, i % 3);
        }
    }

    #[test]
    fn neighbours_have_the_wanted_perplexity() {
        let rows = unit_rows(&groups(120), 8);
        let p = affinities(&rows, 120, 8);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-4);
        let mut row: Vec<f32> = (0..100).map(|j| j as f32 / 10.0).collect();
        conditional(&mut row, 0, 30_f32.ln());
        let entropy: f32 = row.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        assert!((entropy.exp() - 30.0).abs() < 0.1, "{}", entropy.exp());
    }

    #[test]
    fn few_rows_and_identical_rows_have_finite_positions() {
        let device = Device::cpu(1).unwrap();
        for n in [0, 1, 2, 3, 40] {
            let places = map(&[1.0, 0.0].repeat(n), 2, &device);
            assert!(places.len() == n && places.iter().flatten().all(|v| v.is_finite()), "{n}");
        }
    }
}
