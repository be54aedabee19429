//! Launches `kernels/knn.cu`: similarities in chunks of the bank; the best of each chunk are merged with the best so far.

use rayon::prelude::*;

use super::{inverse_norms, to_unit};
use crate::device::Device;
use crate::device::cuda::{self, Launch, int};
use crate::error::Result;
use crate::eval::Features;
use crate::ops::gemm::similarity::{SplitRows, THREADS, TILE};
use crate::tensor::{DType, Shape, Tensor};

/// The most neighbours that the kernels sort.
pub(super) const K_MAX: usize = 256;

/// Held-out images and bank images per chunk: 64 MiB of similarities.
const QUERIES: usize = 1024;
const COLUMNS: usize = 16384;

/// Terms of a bf16 split. With three, a similarity is as accurate as one computed in f32.
const TERMS: usize = 3;

/// Calls `each` with the `k` nearest bank images of every query and the query's index. Waits for the GPU.
pub(super) fn search<R: Send>(
    bank: &Features,
    queries: &Features,
    k: usize,
    device: &Device,
    each: impl Fn(&[(f32, u32)], usize) -> R + Sync,
) -> Result<Vec<R>> {
    let bank_rows = unit_rows(&bank.values, bank.d, device);
    let mut all = Vec::with_capacity(queries.labels.len());
    for (chunk, rows) in queries.values.chunks(QUERIES * bank.d).enumerate() {
        let (values, indices) = nearest(&bank_rows, &unit_rows(rows, bank.d, device), k);
        let (values, indices) = (values.to_vec::<f32>(), indices.to_vec::<i32>());
        device.check()?; // a failed device yields NaN, not neighbours
        let of_row = |(row, (values, indices)): (usize, (&[f32], &[i32]))| {
            let both = values.iter().zip(indices);
            let neighbours: Vec<(f32, u32)> = both.map(|(&s, &index)| (s, index as u32)).collect();
            each(&neighbours, chunk * QUERIES + row)
        };
        let rows = values.par_chunks(k).zip(indices.par_chunks(k)).enumerate();
        all.extend(device.run(|| rows.map(of_row).collect::<Vec<R>>()));
    }
    Ok(all)
}

/// Copies rows `[n, d]` to the GPU, each scaled to unit length. The host scales them in chunks.
fn unit_rows(rows: &[f32], d: usize, device: &Device) -> Tensor {
    let mut all = Tensor::empty(device, DType::F32, [rows.len() / d, d]);
    for (i, chunk) in rows.chunks(COLUMNS * d).enumerate() {
        let mut chunk = chunk.to_vec();
        let scales = device.run(|| inverse_norms(&chunk, d));
        to_unit(&mut chunk, d, &scales);
        all.view_mut().slice(i * COLUMNS * d, Shape::from([chunk.len()])).write(&chunk);
    }
    all
}

/// Returns the `k` nearest of each query, best first: similarities and bank rows, `[queries, k]`.
fn nearest(bank: &Tensor, queries: &Tensor, k: usize) -> (Tensor, Tensor) {
    let ([n, _], [rows, _]) = (bank.dims("bank"), queries.dims("queries"));
    let (device, gpu) = (bank.device(), bank.device().gpu());
    let mut values = Tensor::empty(device, DType::F32, [rows, k]);
    let mut indices = Tensor::empty(device, DType::I32, [rows, k]);
    let each = Launch::new(gpu, [rows, 1, 1], [256, 1, 1]);
    let queries = SplitRows::split(queries, TERMS);
    for first in (0..n).step_by(COLUMNS) {
        let columns = COLUMNS.min(n - first);
        let chunk = SplitRows::split(&bank.rows(first, columns), TERMS);
        let mut similar = Tensor::empty(device, DType::F32, [rows, columns]);
        let tiles = Launch::new(gpu, [rows.div_ceil(TILE) * columns.div_ceil(TILE), 1, 1], THREADS);
        // SAFETY: the bank has rows `first..first + columns`; all other tensors have a row per query; `k <= K_MAX`.
        unsafe {
            cuda::knn_similarities(
                tiles,
                similar.device_out(),
                queries.device_in(),
                chunk.device_in(),
                int(rows),
                int(columns),
                chunk.pitch(),
                chunk.terms(),
            );
            cuda::knn_top_k(
                each,
                values.device_out(),
                indices.device_out(),
                similar.device_in(),
                int(rows),
                int(first),
                int(columns),
                int(k),
                i32::from(first > 0),
            );
        }
    }
    (values, indices)
}
