//! Loops over rows, generic over the CPU's f32 and the reference device's f64: exponentials in that type, sums in f64 in lanes
//! that are added in order.

use crate::cpu::parallel::Each;
use bytemuck::{cast_slice, cast_slice_mut};
use multiversion::multiversion;
use rayon::prelude::*;

use crate::cpu::exp;
use crate::tensor::{DType, Float};

/// Rows in one partial sum: fixed, so that no result depends on the number of threads.
const ROWS: usize = 32;
const LANES: usize = 16;

/// Returns `Σ exp(factor x - shift)`.
fn sum_of_exp<T: Float>(x: &[T], factor: f64, shift: f64) -> f64 {
    match T::DTYPE {
        DType::F64 => x.iter().map(|v| (v.widen() * factor - shift).exp()).sum(),
        _ => exp::sum_of_exp(cast_slice(x), factor, shift),
    }
}

/// Fills `y = exp(factor x - shift)`.
fn exp_into<T: Float>(y: &mut [T], x: &[T], factor: f64, shift: f64) {
    match T::DTYPE {
        DType::F64 => {
            let pairs = y.iter_mut().zip(x);
            pairs.for_each(|(y, x)| *y = T::narrow((x.widen() * factor - shift).exp()));
        }
        _ => exp::exp_into(cast_slice_mut(y), cast_slice(x), factor, shift),
    }
}

/// Returns `log Σ exp(factor x)`.
fn log_sum_exp<T: Float>(x: &[T], factor: f64) -> f64 {
    let max = x.iter().fold(f64::NEG_INFINITY, |max, v| max.max(v.widen()));
    sum_of_exp(x, factor, max * factor).ln() + max * factor
}

/// Returns `Σ q (lse - factor x)`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn loss<T: Float>(x: &[T], q: &[T], factor: f64, lse: f64) -> f64 {
    let mut sums = [0.0; LANES];
    for (x, q) in x.chunks(LANES).zip(q.chunks(LANES)) {
        for (sum, (x, q)) in sums.iter_mut().zip(x.iter().zip(q)) {
            *sum += q.widen() * (lse - x.widen() * factor);
        }
    }
    sums.iter().sum()
}

/// Replaces `p` in `dx` by `scale (mass p - q)`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn difference<T: Float>(dx: &mut [T], q: &[T], mass: f64, scale: f64) {
    for (dx, q) in dx.iter_mut().zip(q) {
        *dx = T::narrow(scale * (mass * dx.widen() - q.widen()));
    }
}

pub(super) fn sum_of_losses<T: Float>(x: &[T], q: &[T], k: usize, temperature: f64) -> f64 {
    let factor = 1.0 / temperature;
    let of_row = |(x, q): (&[T], &[T])| loss(x, q, factor, log_sum_exp(x, factor));
    let blocks = x.par_chunks(ROWS * k).zip(q.par_chunks(ROWS * k));
    let sums: Vec<f64> = blocks
        .map(|(x, q)| x.chunks_exact(k).zip(q.chunks_exact(k)).map(of_row).sum::<f64>())
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
    let factor = 1.0 / temperature;
    let rows = dx.par_chunks_mut(k).zip(x.par_chunks(k)).zip(q.par_chunks(k));
    rows.each(|((dx, x), q)| {
        let mass: f64 = q.iter().map(|q| q.widen()).sum();
        exp_into(dx, x, factor, log_sum_exp(x, factor));
        difference(dx, q, mass, scale);
    });
}

pub(super) fn softmax<T: Float>(y: &mut [T], x: &[T], k: usize, temperature: f64) {
    let factor = 1.0 / temperature;
    let rows = y.par_chunks_mut(k.max(1)).zip(x.par_chunks(k.max(1)));
    rows.each(|(y, x)| exp_into(y, x, factor, log_sum_exp(x, factor)));
}
