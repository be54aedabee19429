//! The f32 path: tiles of similarities, blocks of queries in parallel. A tile stays in cache from its GEMM to its exponentials.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::InfoNceDims;
use crate::cpu::exp::{exp, sum_of_exp};
use crate::cpu::{Matrix, gemm_sequential};
use crate::ops::gemm::similarity::FIXED_MAXIMUM_FROM;

/// Queries in a parallel task, and rows of the queue in a tile.
const BLOCK: usize = 64;
const TILE: usize = 256;

pub(super) fn workspace_len(dims: &InfoNceDims) -> usize {
    dims.n.div_ceil(BLOCK) * BLOCK * TILE
}

/// Calls `f(first row of the queue, similarities [block, columns], columns)` for each tile of a block of queries. Rows that a
/// query excludes have similarity -inf.
fn tiles(
    tile: &mut [f32],
    [q, queue]: [&[f32]; 2],
    first_query: usize,
    block: usize,
    dims: &InfoNceDims,
    mut f: impl FnMut(usize, &mut [f32], usize),
) {
    let (m, d) = (dims.m, dims.d);
    let own = Matrix::new(&q[first_query * d..], block, d);
    for first in (0..m).step_by(TILE) {
        let columns = TILE.min(m - first);
        let similarities = &mut tile[..block * columns];
        let others = Matrix::new(&queue[first * d..], columns, d).transposed();
        gemm_sequential(similarities, own, others, false);
        for (r, row) in similarities.chunks_exact_mut(columns).enumerate() {
            for j in dims.skipped(first_query + r, first..first + columns) {
                row[j - first] = f32::NEG_INFINITY;
            }
        }
        f(first, similarities, columns);
    }
}

/// `<q_i, k_i> / T`.
fn positive(i: usize, [q, k]: [&[f32]; 2], dims: &InfoNceDims) -> f64 {
    let d = dims.d;
    let pairs = q[i * d..][..d].iter().zip(&k[i * d..][..d]);
    pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / dims.temperature
}

/// Fills `lse`, the log-sum-exp of each query, and returns the loss.
pub(super) fn forward(
    lse: &mut [f32],
    workspace: &mut [f32],
    [q, k, queue]: [&[f32]; 3],
    dims: &InfoNceDims,
) -> f64 {
    let inv_t = (1.0 / dims.temperature) as f32;
    let fixed = dims.temperature >= FIXED_MAXIMUM_FROM;
    let tasks = lse.par_chunks_mut(BLOCK).zip(workspace.par_chunks_mut(BLOCK * TILE));
    tasks.enumerate().each(|(b, (lse, tile))| {
        let mut sums = [0.0_f64; BLOCK];
        let mut maxima = [inv_t; BLOCK];
        for r in 0..lse.len() {
            let own = positive(b * BLOCK + r, [q, k], dims);
            if !fixed {
                maxima[r] = own as f32;
            }
            sums[r] = (own - f64::from(maxima[r])).exp();
        }
        tiles(tile, [q, queue], b * BLOCK, lse.len(), dims, |_, similarities, columns| {
            for (r, row) in similarities.chunks_exact(columns).enumerate() {
                if !fixed {
                    let max = row.iter().fold(maxima[r], |max, s| max.max(s * inv_t));
                    if max > maxima[r] {
                        sums[r] *= f64::from((maxima[r] - max).exp());
                        maxima[r] = max;
                    }
                }
                sums[r] += sum_of_exp(row, f64::from(inv_t), f64::from(maxima[r]));
            }
        });
        for (r, lse) in lse.iter_mut().enumerate() {
            *lse = (sums[r].ln() + f64::from(maxima[r])) as f32;
        }
    });
    let losses = lse.iter().enumerate().map(|(i, &l)| f64::from(l) - positive(i, [q, k], dims));
    losses.sum::<f64>() / dims.n as f64
}

pub(super) fn query_gradient(
    dq: &mut [f32],
    workspace: &mut [f32],
    [q, k, queue]: [&[f32]; 3],
    lse: &[f32],
    dims: &InfoNceDims,
    scale: f64,
) {
    let d = dims.d;
    let inv_t = (1.0 / dims.temperature) as f32;
    let tasks = dq.par_chunks_mut(BLOCK * d).zip(workspace.par_chunks_mut(BLOCK * TILE));
    tasks.enumerate().each(|(b, (dq, tile))| {
        let block = dq.len() / d;
        for (r, dq) in dq.chunks_exact_mut(d).enumerate() {
            let i = b * BLOCK + r;
            let weight = key_weight(i, [q, k], lse, dims, scale);
            dq.iter_mut().zip(&k[i * d..]).for_each(|(dq, k)| *dq = weight * k);
        }
        tiles(tile, [q, queue], b * BLOCK, block, dims, |first, weights, columns| {
            for (r, row) in weights.chunks_exact_mut(columns).enumerate() {
                let lse = lse[b * BLOCK + r];
                weigh(row, lse, inv_t, scale as f32);
            }
            let weights = Matrix::new(weights, block, columns);
            gemm_sequential(dq, weights, Matrix::new(&queue[first * d..], columns, d), true);
        });
    });
}

/// `scale (p_i+ - 1)`.
fn key_weight(i: usize, pair: [&[f32]; 2], lse: &[f32], dims: &InfoNceDims, scale: f64) -> f32 {
    (scale * ((positive(i, pair, dims) - f64::from(lse[i])).exp_m1())) as f32
}

pub(super) fn key_gradient(
    dk: &mut [f32],
    pair: [&[f32]; 2],
    lse: &[f32],
    dims: &InfoNceDims,
    scale: f64,
) {
    let d = dims.d;
    for (i, dk) in dk.chunks_exact_mut(d).enumerate() {
        let weight = key_weight(i, pair, lse, dims, scale);
        dk.iter_mut().zip(&pair[0][i * d..]).for_each(|(dk, q)| *dk = weight * q);
    }
}

/// Turns the similarities of a row into `scale p`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn weigh(row: &mut [f32], lse: f32, inv_t: f32, scale: f32) {
    row.iter_mut().for_each(|weight| *weight = scale * exp(*weight * inv_t - lse));
}
