//! `kernels/knn.cu`: similarities in chunks of the bank, the best of each chunk merged with the best so far.

use rayon::prelude::*;

use super::{Knn, classes_of, count, inverse_norms, to_unit};
use crate::device::Device;
use crate::device::cuda::{self, Launch};
use crate::error::Result;
use crate::eval::Features;
use crate::tensor::{DType, Shape, Tensor};

/// The most neighbours that the kernels sort.
pub(super) const K_MAX: usize = 256;

/// Held-out images at a time, and bank images: 64 MiB of similarities.
const QUERIES: usize = 1024;
const COLUMNS: usize = 16384;

const TILE: usize = 64;
const THREADS: [usize; 3] = [256, 1, 1];

/// Queries that are right under each setting. Waits for the GPU.
pub(super) fn hits(
    bank: &Features,
    queries: &Features,
    k: usize,
    settings: &[Knn],
    device: &Device,
) -> Result<Vec<usize>> {
    let (bank_rows, classes) = (unit_rows(&bank.values, bank.d, device), classes_of(bank));
    let mut hits = vec![0; settings.len()];
    let chunks = queries.values.chunks(QUERIES * bank.d);
    for (rows, truth) in chunks.zip(queries.labels.chunks(QUERIES)) {
        let (values, indices) = nearest(&bank_rows, &unit_rows(rows, bank.d, device), k);
        let (values, indices) = (values.to_vec::<f32>(), indices.to_vec::<i32>());
        device.check()?; // after a failure they are no neighbours
        let of_row = |((values, indices), &truth): ((&[f32], &[i32]), &u32)| {
            let label = |(&similar, &index): (&f32, &i32)| (similar, bank.labels[index as usize]);
            let neighbours: Vec<(f32, u32)> = values.iter().zip(indices).map(label).collect();
            let mut hits = vec![0; settings.len()];
            count(&mut hits, &neighbours, truth, settings, classes);
            hits
        };
        let rows = values.par_chunks(k).zip(indices.par_chunks(k)).zip(truth);
        let found: Vec<Vec<usize>> = device.run(|| rows.map(of_row).collect());
        for row in found {
            hits.iter_mut().zip(row).for_each(|(hits, hit)| *hits += hit);
        }
    }
    Ok(hits)
}

/// Rows `[n, d]` on the GPU, each of unit length; on the host they are scaled in chunks.
fn unit_rows(rows: &[f32], d: usize, device: &Device) -> Tensor {
    let mut all = Tensor::empty(device, DType::F32, [rows.len() / d, d]);
    for (i, chunk) in rows.chunks(COLUMNS * d).enumerate() {
        let mut chunk = chunk.to_vec();
        let scales = inverse_norms(&chunk, d);
        to_unit(&mut chunk, d, &scales);
        all.view_mut().slice(i * COLUMNS * d, Shape::from([chunk.len()])).write(&chunk);
    }
    all
}

/// The `k` nearest of each query, best first: similarities and bank rows, `[queries, k]`.
fn nearest(bank: &Tensor, queries: &Tensor, k: usize) -> (Tensor, Tensor) {
    let ([n, d], [rows, _]) = (bank.dims("bank"), queries.dims("queries"));
    let (device, gpu) = (bank.device(), bank.device().gpu());
    let mut values = Tensor::empty(device, DType::F32, [rows, k]);
    let mut indices = Tensor::empty(device, DType::I32, [rows, k]);
    let each = Launch::new(gpu, [rows, 1, 1], THREADS);
    for first in (0..n).step_by(COLUMNS) {
        let columns = COLUMNS.min(n - first);
        let mut similar = Tensor::empty(device, DType::F32, [rows, columns]);
        let tiles = Launch::new(gpu, [rows.div_ceil(TILE), columns.div_ceil(TILE), 1], THREADS);
        // SAFETY: the bank's rows `first..first + columns` exist, and each query has a row of the rest; `k <= K_MAX`.
        unsafe {
            cuda::knn_similarities(
                tiles,
                similar.device_out(),
                queries.device_in(),
                bank.device_in(),
                rows as i32,
                first as i32,
                columns as i32,
                d as i32,
            );
            cuda::knn_top_k(
                each,
                values.device_out(),
                indices.device_out(),
                similar.device_in(),
                rows as i32,
                first as i32,
                columns as i32,
                k as i32,
                i32::from(first > 0),
            );
        }
    }
    (values, indices)
}
