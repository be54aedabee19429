//! Loops over rows, generic over the CPU's f32 and the reference device's f64; the arithmetic is in f64.

use rayon::prelude::*;

use super::PairLoss;
use crate::tensor::Float;

/// Replaces similarities `[rows, rows]` by `G` and returns the sum of the rows' losses.
pub(super) fn losses<T: Float>(
    similarities: &mut [T],
    rows: usize,
    loss: PairLoss,
    temperature: f64,
) -> f64 {
    let one = |(i, row): (usize, &mut [T])| {
        let s: Vec<f64> = row.iter().map(|s| s.widen()).collect();
        let mut g = vec![0.0; rows];
        let own = row_loss(&mut g, &s, i, loss, temperature);
        row.iter_mut().zip(g).for_each(|(to, g)| *to = T::narrow(g));
        own
    };
    let each: Vec<f64> = similarities.par_chunks_mut(rows).enumerate().map(one).collect();
    each.iter().sum() // in row order
}

/// Returns the loss of row `i` of similarities `s`, and adds its derivatives to `g`, which must be zero.
fn row_loss(g: &mut [f64], s: &[f64], i: usize, loss: PairLoss, t: f64) -> f64 {
    let positive = (i + s.len() / 2) % s.len();
    let negatives = |semi_hard: bool| -> Vec<usize> {
        let all = (0..s.len()).filter(|&j| j != i && j != positive);
        if !semi_hard {
            return all.collect();
        }
        let farther = all.filter(|&j| s[j] < s[positive]);
        farther.max_by(|&a, &b| s[a].total_cmp(&s[b])).into_iter().collect()
    };
    match loss {
        PairLoss::Xent => {
            let others = || (0..s.len()).filter(|&j| j != i);
            let max = others().map(|j| s[j] / t).fold(f64::NEG_INFINITY, f64::max);
            let lse = others().map(|j| (s[j] / t - max).exp()).sum::<f64>().ln() + max;
            others().for_each(|j| g[j] = (s[j] / t - lse).exp() / t);
            g[positive] -= 1.0 / t;
            lse - s[positive] / t
        }
        PairLoss::Logistic { semi_hard } => {
            let chosen = negatives(semi_hard);
            let share = 1.0 / chosen.len().max(1) as f64;
            g[positive] = -sigmoid(-s[positive] / t) / t;
            chosen.iter().for_each(|&j| g[j] = share * sigmoid(s[j] / t) / t);
            let apart: f64 = chosen.iter().map(|&j| softplus(s[j] / t)).sum();
            softplus(-s[positive] / t) + share * apart
        }
        PairLoss::Margin { margin, semi_hard } => {
            let chosen = negatives(semi_hard);
            let share = 1.0 / chosen.len().max(1) as f64;
            let mut sum = 0.0;
            for j in chosen {
                let violation = s[j] - s[positive] + margin;
                if violation > 0.0 {
                    g[j] = share;
                    g[positive] -= share;
                    sum += share * violation;
                }
            }
            sum
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + exp(x))`, without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_semi_hard_negative_is_the_nearest_that_is_farther_than_the_positive() {
        // Row 0 of six: its positive is row 3.
        let s = [1.0, 0.8, 0.1, 0.5, 0.3, -0.2];
        let mut g = [0.0; 6];
        let loss = PairLoss::Margin { margin: 1.0, semi_hard: true };
        assert!((row_loss(&mut g, &s, 0, loss, 1.0) - 0.8).abs() < 1e-12);
        assert_eq!(g, [0.0, 0.0, 0.0, -1.0, 1.0, 0.0]);
        // If no negative is farther, nothing is pushed.
        let s = [1.0, 0.8, 0.7, 0.5, 0.9, 0.6];
        assert_eq!(row_loss(&mut [0.0; 6], &s, 0, loss, 1.0), 0.0);
    }

    #[test]
    fn large_similarities_do_not_overflow() {
        let s = [900.0, -800.0, 850.0, 700.0];
        for loss in [PairLoss::Xent, PairLoss::Logistic { semi_hard: false }] {
            let mut g = [0.0; 4];
            let own = row_loss(&mut g, &s, 0, loss, 0.1);
            assert!(own.is_finite() && g.iter().all(|g| g.is_finite()), "{own} {g:?}");
        }
    }
}
