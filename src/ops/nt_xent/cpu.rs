//! The f32 path: tiles of similarities, blocks of rows in parallel. A tile stays in cache from its GEMM to its exponentials.

use multiversion::multiversion;
use rayon::prelude::*;

use super::NtXentDims;
use crate::cpu::exp::{exp, sum_of_exp};
use crate::cpu::parallel::Each;
use crate::cpu::{Matrix, gemm_sequential};
use crate::ops::gemm::similarity::FIXED_MAXIMUM_FROM;

/// Rows in a parallel task, and columns in a tile.
const BLOCK: usize = 64;
const TILE: usize = 256;

pub(super) fn workspace_len(dims: NtXentDims) -> usize {
    dims.rows.div_ceil(BLOCK) * BLOCK * TILE
}

/// Calls `f(first column, similarities [block, columns], columns)` for each tile of a block of rows.
fn tiles(
    tile: &mut [f32],
    [own, all]: [&[f32]; 2],
    first_row: usize,
    block: usize,
    dims: NtXentDims,
    mut f: impl FnMut(usize, &mut [f32], usize),
) {
    let d = dims.d;
    let own = Matrix::new(&own[first_row * d..], block, d);
    for first in (0..dims.all).step_by(TILE) {
        let columns = TILE.min(dims.all - first);
        let similarities = &mut tile[..block * columns];
        let others = Matrix::new(&all[first * d..], columns, d).transposed();
        gemm_sequential(similarities, own, others, false);
        f(first, similarities, columns);
    }
}

/// Fills `lse`, the log-sum-exp of each row of this rank, and returns their mean loss. `z` are this rank's rows and all.
pub(super) fn forward(
    lse: &mut [f32],
    workspace: &mut [f32],
    z: [&[f32]; 2],
    dims: NtXentDims,
) -> f64 {
    let inv_t = (1.0 / dims.temperature) as f32;
    let fixed = dims.temperature >= FIXED_MAXIMUM_FROM;
    let tasks = lse.par_chunks_mut(BLOCK).zip(workspace.par_chunks_mut(BLOCK * TILE));
    tasks.enumerate().each(|(b, (lse, tile))| {
        let mut sums = [0.0_f64; BLOCK];
        let mut maxima = [if fixed { inv_t } else { f32::NEG_INFINITY }; BLOCK];
        tiles(tile, z, b * BLOCK, lse.len(), dims, |first, similarities, columns| {
            for (r, row) in similarities.chunks_exact_mut(columns).enumerate() {
                let own = dims.place(b * BLOCK + r);
                if (first..first + columns).contains(&own) {
                    row[own - first] = f32::NEG_INFINITY; // a row is not its own negative
                }
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
    let (d, z) = (dims.d, z[0]);
    let losses = lse.iter().enumerate().map(|(i, &lse)| {
        let (own, positive) = (&z[i * d..][..d], &z[dims.positive(i) * d..][..d]);
        let s: f64 = own.iter().zip(positive).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        f64::from(lse) - s / dims.temperature
    });
    losses.sum::<f64>() / dims.rows as f64
}

/// Fills `dz`, the gradient of this rank's rows. `lse` is that of all rows.
pub(super) fn backward(
    dz: &mut [f32],
    workspace: &mut [f32],
    z: [&[f32]; 2],
    lse: &[f32],
    dims: NtXentDims,
    scale: f64,
) {
    let d = dims.d;
    let (inv_t, scale) = ((1.0 / dims.temperature) as f32, scale as f32);
    let tasks = dz.par_chunks_mut(BLOCK * d).zip(workspace.par_chunks_mut(BLOCK * TILE));
    tasks.enumerate().each(|(b, (dz, tile))| {
        let block = dz.len() / d;
        dz.fill(0.0);
        tiles(tile, z, b * BLOCK, block, dims, |first, weights, columns| {
            for (r, row) in weights.chunks_exact_mut(columns).enumerate() {
                let own = dims.place(b * BLOCK + r);
                both_ways(row, lse[own], &lse[first..], inv_t, scale);
                let positive = dims.place(dims.positive(b * BLOCK + r));
                if (first..first + columns).contains(&own) {
                    row[own - first] = 0.0;
                }
                if (first..first + columns).contains(&positive) {
                    row[positive - first] -= 2.0 * scale;
                }
            }
            let weights = Matrix::new(weights, block, columns);
            gemm_sequential(dz, weights, Matrix::new(&z[1][first * d..], columns, d), true);
        });
    });
}

/// Turns the similarities of a row into `scale (p_ij + p_ji)`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn both_ways(row: &mut [f32], own: f32, others: &[f32], inv_t: f32, scale: f32) {
    for (weight, other) in row.iter_mut().zip(others) {
        let logit = *weight * inv_t;
        *weight = scale * (exp(logit - own) + exp(logit - other));
    }
}
