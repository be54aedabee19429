//! Row by row, one generic loop for both devices: exponentials in the device's type, sums in f64.

use rayon::prelude::*;

use crate::tensor::{DType, Float};

/// Rows of one partial sum: fixed, so that no result depends on the number of threads.
const ROWS: usize = 32;

/// In the device's type: half the time of f64's in f32, and as exact as its results are.
fn exp<T: Float>(v: f64) -> f64 {
    match T::DTYPE {
        DType::F64 => v.exp(),
        _ => f64::from((v as f32).exp()),
    }
}

/// `log Σ exp(x / T)`.
fn log_sum_exp<T: Float>(x: &[T], temperature: f64) -> f64 {
    let max = x.iter().map(|v| v.widen()).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| exp::<T>((v.widen() - max) / temperature)).sum();
    sum.ln() + max / temperature
}

pub(super) fn sum_of_losses<T: Float>(x: &[T], q: &[T], k: usize, temperature: f64) -> f64 {
    let loss = |(x, q): (&[T], &[T])| {
        let lse = log_sum_exp(x, temperature);
        let terms = x.iter().zip(q).map(|(x, q)| q.widen() * (lse - x.widen() / temperature));
        terms.sum::<f64>()
    };
    let blocks = x.par_chunks(ROWS * k).zip(q.par_chunks(ROWS * k));
    let sums: Vec<f64> = blocks
        .map(|(x, q)| x.chunks_exact(k).zip(q.chunks_exact(k)).map(loss).sum::<f64>())
        .collect();
    sums.iter().sum()
}

pub(super) fn gradient<T: Float>(
    dx: &mut [T],
    x: &[T],
    q: &[T],
    k: usize,
    temperature: f64,
    scale: f64,
) {
    let rows = dx.par_chunks_mut(k).zip(x.par_chunks(k)).zip(q.par_chunks(k));
    rows.for_each(|((dx, x), q)| {
        let lse = log_sum_exp(x, temperature);
        let mass: f64 = q.iter().map(|q| q.widen()).sum();
        for (dx, (x, q)) in dx.iter_mut().zip(x.iter().zip(q)) {
            let p = exp::<T>(x.widen() / temperature - lse);
            *dx = T::narrow(scale * (mass * p - q.widen()));
        }
    });
}

pub(super) fn softmax<T: Float>(y: &mut [T], x: &[T], k: usize, temperature: f64) {
    y.par_chunks_mut(k.max(1)).zip(x.par_chunks(k.max(1))).for_each(|(y, x)| {
        let lse = log_sum_exp(x, temperature);
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::narrow(exp::<T>(x.widen() / temperature - lse));
        }
    });
}
