//! The f32 path: `Q_ij = v_i E_ij u_j` with `E` in f32, and the factors `u` of prototypes and `v` of rows in f64. An iteration
//! reads `E` once and writes only the factors.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{SinkhornDims, share};
use crate::cpu::exp::exp_into;
use crate::device::Group;

/// Rows in a parallel task: fixed, so that no sum depends on the number of threads.
const ROWS: usize = 64;

pub(super) fn assign(e: &mut [f32], scores: &[f32], dims: SinkhornDims, group: &Group) {
    let SinkhornDims { b, k, epsilon, iterations } = dims;
    let all_rows = (b * group.size()) as f64;
    let mut max = [scores.iter().copied().fold(f32::NEG_INFINITY, f32::max)];
    group.all_reduce_max("Sinkhorn's maximum", &mut max);
    let inv = 1.0 / epsilon;
    e.par_chunks_mut(ROWS * k).zip(scores.par_chunks(ROWS * k)).each(|(e, s)| {
        exp_into(e, s, inv, f64::from(max[0]) * inv);
    });
    // The initial division of `Q` by its sum cancels in the first division by column.
    let (mut u, mut v) = (vec![1.0; k], vec![1.0; b]);
    for _ in 0..iterations {
        let mut sums = column_sums(e, &v, k);
        group.all_reduce_sum("Sinkhorn's sums", &mut sums);
        u.iter_mut().zip(&sums).for_each(|(u, sum)| *u = share(*sum, k as f64));
        v.par_chunks_mut(ROWS).zip(e.par_chunks(ROWS * k)).each(|(v, e)| {
            for (v, row) in v.iter_mut().zip(e.chunks_exact(k)) {
                *v = share(dot(row, &u), all_rows);
            }
        });
    }
    e.par_chunks_mut(k).zip(&v).each(|(row, v)| {
        scale(row, &u, v * all_rows);
    });
}

/// Returns `Σ_j E_ij u_j` of a row, in lanes that are added in order.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn dot(row: &[f32], u: &[f64]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    for (row, u) in row.chunks(LANES).zip(u.chunks(LANES)) {
        for (sum, (e, u)) in sums.iter_mut().zip(row.iter().zip(u)) {
            *sum += f64::from(*e) * u;
        }
    }
    sums.iter().sum()
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_scaled(sums: &mut [f64], row: &[f32], v: f64) {
    sums.iter_mut().zip(row).for_each(|(sum, e)| *sum += f64::from(*e) * v);
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn scale(row: &mut [f32], u: &[f64], v: f64) {
    row.iter_mut().zip(u).for_each(|(e, u)| *e = (f64::from(*e) * u * v) as f32);
}

/// Returns `Σ_i v_i E_ij` for each column; the partial sums of blocks are added in order.
fn column_sums(e: &[f32], v: &[f64], k: usize) -> Vec<f64> {
    let blocks: Vec<Vec<f64>> = e
        .par_chunks(ROWS * k)
        .zip(v.par_chunks(ROWS))
        .map(|(e, v)| {
            let mut sums = vec![0.0; k];
            for (row, v) in e.chunks_exact(k).zip(v) {
                add_scaled(&mut sums, row, *v);
            }
            sums
        })
        .collect();
    let mut sums = vec![0.0; k];
    for block in blocks {
        sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    sums
}
