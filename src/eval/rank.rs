//! What features are worth, without labels: RankMe and LiDAR, two effective ranks that follow the accuracy of linear probes.

use super::spectrum::{cholesky, gram, products, solve_lower, symmetric_eigenvalues, transposed};

/// Added to each share, so that its logarithm exists (RankMe, equation 3; LiDAR, section 3).
const EPSILON: f64 = 1e-7;

/// Added to the diagonal of the scatter within images (LiDAR, section 3).
const DELTA: f64 = 1e-4;

/// RankMe of rows `[n, d]`: `exp` of the entropy of the singular values' shares, not centred (Garrido et al. 2023,
/// arXiv:2210.02885, equation 3). From 1 to `min(n, d)`; 0 without rows. A rank can only be measured up to the number of rows.
///
/// # Panics
/// If the number of values is not a multiple of `d`.
pub fn rank_me(rows: &[f32], d: usize) -> f64 {
    assert!(d > 0 && rows.len().is_multiple_of(d), "rank_me: rows of {d} features");
    let n = rows.len() / d;
    let rows: Vec<f64> = rows.iter().map(|&v| f64::from(v)).collect();
    let squares = if n < d { products(&rows, d) } else { gram(&rows, d) };
    let values = symmetric_eigenvalues(squares, n.min(d));
    effective(values.into_iter().map(|value| value.max(0.0).sqrt()))
}

/// LiDAR of the features `[n * views, d]` of `n` images in `views` augmented views each, image after image: the effective rank of the
/// matrix of linear discriminant analysis that tells images apart, `W^-1/2 B W^-1/2` with the scatter `B` of the images' means and
/// the scatter `W` within images (Thilak et al. 2024, arXiv:2312.04000). Directions in which views of one image differ as much as
/// images do count for little. From 1 to `min(n - 1, d)`; 0 if there are fewer than two images.
///
/// # Panics
/// If the number of values is not a multiple of `views * d`, or `views` is less than 2.
pub fn lidar(features: &[f32], d: usize, views: usize) -> f64 {
    assert!(views >= 2 && d > 0, "lidar: {views} views of {d} features");
    assert!(features.len().is_multiple_of(views * d), "lidar: {views} views of each image");
    let n = features.len() / (views * d);
    if n < 2 {
        return 0.0;
    }
    let mut means = vec![0.0; n * d];
    let mut within: Vec<f64> = features.iter().map(|&v| f64::from(v)).collect();
    for (mean, image) in means.chunks_exact_mut(d).zip(within.chunks_exact_mut(views * d)) {
        for view in image.chunks_exact(d) {
            mean.iter_mut().zip(view).for_each(|(mean, v)| *mean += v / views as f64);
        }
        for view in image.chunks_exact_mut(d) {
            view.iter_mut().zip(&*mean).for_each(|(v, mean)| *v -= mean);
        }
    }
    let mut scatter = gram(&within, d);
    scatter.iter_mut().for_each(|v| *v /= (n * views) as f64);
    (0..d).for_each(|i| scatter[i * d + i] += DELTA);
    for j in 0..d {
        let mean = means.iter().skip(j).step_by(d).sum::<f64>() / n as f64;
        means.iter_mut().skip(j).step_by(d).for_each(|v| *v -= mean);
    }
    if !cholesky(&mut scatter, d) {
        return f64::NAN; // features that are not finite
    }
    // The eigenvalues of W^-1/2 B W^-1/2 are those of L^-1 B L^-T with W = L L^T.
    solve_lower(&scatter, d, &mut means);
    let squares = if n < d { products(&means, d) } else { products(&transposed(&means, n, d), n) };
    let values = symmetric_eigenvalues(squares, n.min(d));
    effective(values.into_iter().map(|value| value.max(0.0)))
}

/// `exp` of the entropy of the shares.
fn effective(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let total: f64 = values.clone().sum();
    if total == 0.0 {
        return 0.0;
    }
    values.map(|value| value / total + EPSILON).map(|p| -p * p.ln()).sum::<f64>().exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Philox, Purpose};

    /// Numbers that numpy can make, too.
    fn wave(n: usize, d: usize) -> Vec<f32> {
        (0..n * d)
            .map(|i| (((i * i) as f64 * 0.137).sin() + (i % d) as f64 / d as f64) as f32)
            .collect()
    }

    /// The definitions as they stand, by numpy 2 in f64: `svd`, and `eigh` of `W^-1/2 B W^-1/2`.
    #[test]
    fn both_ranks_are_those_of_their_definitions() {
        for (n, d, rank) in RANK_ME {
            let found = rank_me(&wave(n, d), d);
            assert!((found / rank - 1.0).abs() < 1e-6, "[{n}, {d}]: {found}, numpy {rank}");
        }
        for (n, views, d, rank) in LIDAR {
            let found = lidar(&wave(n * views, d), d, views);
            assert!(
                (found / rank - 1.0).abs() < 1e-6,
                "[{n}, {views}, {d}]: {found}, numpy {rank}"
            );
        }
    }

    const RANK_ME: [(usize, usize, f64); 3] =
        [(40, 8, 7.445212552934818), (6, 20, 5.622261558211105), (1, 5, 0.9999998999999999)];
    const LIDAR: [(usize, usize, usize, f64); 2] =
        [(30, 4, 6, 5.708788511180147), (5, 3, 12, 1.5434646943031443)];

    #[test]
    fn ranks_count_directions() {
        let mut rng = Philox::new(5, Purpose::Test, 0, 0);
        let (n, d, used) = (500, 16, 4);
        let rows: Vec<f32> =
            (0..n * d).map(|i| if i % d < used { rng.normal() as f32 } else { 0.0 }).collect();
        assert!((rank_me(&rows, d) - used as f64).abs() < 0.1);
        assert!((rank_me(&vec![1.0; n * d], d) - 1.0).abs() < 0.01);
        assert_eq!(rank_me(&vec![0.0; n * d], d), 0.0);
        // Views that differ from each other as much as images do tell nothing; images that differ in one direction tell one.
        let views = 5;
        let mut image = 0.0;
        let one: Vec<f32> = (0..n * d)
            .map(|i| {
                if i % (views * d) == 0 {
                    image = rng.normal();
                }
                (if i % d == 0 { 100.0 * image } else { 0.0 } + 0.1 * rng.normal()) as f32
            })
            .collect();
        assert!((lidar(&one, d, views) - 1.0).abs() < 0.01, "{}", lidar(&one, d, views));
        let many: Vec<f32> = (0..n * d).map(|_| rng.normal() as f32).collect();
        assert!(lidar(&many, d, views) > 12.0);
        assert_eq!(lidar(&many[..views * d], d, views), 0.0);
    }
}
