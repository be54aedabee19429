//! `kernels/knn.cu`: similarities in chunks of the bank, the best of each chunk merged with the best so far.

use super::Vote;
use crate::device::Device;
use crate::device::cuda::{self, Launch};
use crate::eval::Features;
use crate::tensor::{DType, Tensor};

/// The most neighbours that the kernels sort.
pub(super) const K_MAX: usize = 256;

/// Held-out images at a time, and bank images: 64 MiB of similarities.
const QUERIES: usize = 1024;
const COLUMNS: usize = 16384;

const TILE: usize = 64;
const THREADS: [usize; 3] = [256, 1, 1];

/// The class that the neighbours of each query vote for; both sets have unit rows. Waits for the GPU.
pub(super) fn predictions(
    bank: &Features,
    queries: &Features,
    vote: Vote,
    device: &Device,
) -> Vec<i32> {
    let (n, d) = (bank.labels.len(), bank.d);
    let bank_rows = Tensor::from_slice(device, [n, d], &bank.values);
    let labels: Vec<i32> = bank.labels.iter().map(|&label| label as i32).collect();
    let labels = Tensor::from_slice(device, [n], &labels);
    let mut all = Vec::with_capacity(queries.labels.len());
    for rows in queries.values.chunks(QUERIES * d) {
        let rows = Tensor::from_slice(device, [rows.len() / d, d], rows);
        all.extend(nearest(&bank_rows, &labels, &rows, vote).to_vec::<i32>());
    }
    all
}

/// `[queries]` predicted classes.
fn nearest(bank: &Tensor, labels: &Tensor, queries: &Tensor, vote: Vote) -> Tensor {
    let ([n, d], [rows, _]) = (bank.dims("bank"), queries.dims("queries"));
    let (device, gpu) = (bank.device(), bank.device().gpu());
    let mut values = Tensor::empty(device, DType::F32, [rows, vote.k]);
    let mut indices = Tensor::empty(device, DType::I32, [rows, vote.k]);
    let mut predicted = Tensor::empty(device, DType::I32, [rows]);
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
                vote.k as i32,
                i32::from(first > 0),
            );
        }
    }
    // SAFETY: as above; indices are rows of the bank, each of which has a label.
    unsafe {
        cuda::knn_vote(
            each,
            predicted.device_out(),
            values.device_in(),
            indices.device_in(),
            labels.device_in(),
            rows as i32,
            vote.k as i32,
            vote.classes as i32,
            1.0 / vote.temperature,
        );
    }
    predicted
}
