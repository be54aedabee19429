//! Launches `kernels/sinkhorn.cu`: exponentials in f32, recomputed in each pass, with column and row sums in f64.

use super::SinkhornDims;
use crate::device::cuda::{self, In, Launch, int};
use crate::device::{Group, Reduction};
use crate::tensor::{DType, Tensor, reduce_over_ranks, sum_over_ranks};

const THREADS: [usize; 3] = [256, 1, 1];

/// Maximum number of blocks in the first pass of the maximum.
const MAXIMA: usize = 256;

/// Rows in a block that sums columns. Depends on the shape alone, so that sums have the same order on every chip. Few rows are
/// spread over more blocks; with sixteen, the kernel's maximum, partial sums take a quarter of the memory of bf16 scores.
pub(crate) fn rows_per_chunk(b: usize) -> usize {
    if b < 2048 { 8 } else { 16 }
}

/// Fills `q [b, k]`, f32.
pub(super) fn assign(q: &mut Tensor, scores: &Tensor, dims: SinkhornDims, group: &Group) {
    let SinkhornDims { b, k, epsilon, iterations } = dims;
    let device = scores.device();
    let launch = |grid: usize, block| Launch::new(device.gpu(), [grid, 1, 1], block);
    let mut max = largest(scores);
    if group.size() > 1 {
        reduce_over_ranks(&mut max, group, "Sinkhorn's maximum", Reduction::Max);
    }
    let rows = rows_per_chunk(b);
    let chunks = b.div_ceil(rows);
    let wide = |n: usize| Tensor::empty(device, DType::F64, [n]);
    let (mut partial, mut u) = (wide(chunks * k), wide(k));
    let all_rows = (b * group.size()) as f64;
    let (parts, inv_epsilon) = (k as f64, (1.0 / epsilon) as f32);
    let (of_chunks, of_rows) = (launch(chunks, THREADS), launch(b.div_ceil(8), THREADS));
    let of_columns = launch(k.div_ceil(32), [32, 8, 1]);
    let [b, k, rows, chunks] = [b, k, rows, chunks].map(int);
    for iteration in 0..iterations {
        let factors = if iteration == 0 { In::null() } else { u.device_in() };
        // SAFETY: `scores` has `b` rows of `k`, `u` has `k` elements, `partial` has one row of `k` per chunk of rows.
        unsafe {
            by_dtype!(
                scores.dtype(),
                sinkhorn_columns_f32
                    | sinkhorn_columns_bf16(
                        of_chunks,
                        partial.device_out(),
                        scores.device_in(),
                        max.device_in(),
                        factors,
                        b,
                        k,
                        rows,
                        all_rows,
                        inv_epsilon,
                    )
            );
            let (u, partial) = (u.device_out(), partial.device_in());
            let own = if group.size() > 1 { 0.0 } else { parts }; // 0 asks for the sums themselves
            cuda::sinkhorn_column_factors(of_columns, u, partial, chunks, k, own);
        }
        if group.size() > 1 {
            sum_over_ranks(&mut u, group, "Sinkhorn's sums");
            let sums = u.copy();
            // SAFETY: as above, with the sums of all ranks as the only chunk.
            unsafe {
                cuda::sinkhorn_column_factors(
                    of_columns,
                    u.device_out(),
                    sums.device_in(),
                    1,
                    k,
                    parts,
                );
            }
        }
    }
    // SAFETY: as above, and `q` has the size of the scores.
    unsafe {
        by_dtype!(
            scores.dtype(),
            sinkhorn_assign_f32
                | sinkhorn_assign_bf16(
                    of_rows,
                    q.device_out(),
                    scores.device_in(),
                    max.device_in(),
                    u.device_in(),
                    b,
                    k,
                    all_rows,
                    inv_epsilon,
                )
        );
    }
}

/// Returns the largest score, on the GPU.
fn largest(scores: &Tensor) -> Tensor {
    let (device, count) = (scores.device(), scores.len());
    let blocks = count.div_ceil(8 * THREADS[0]).min(MAXIMA);
    let mut maxima = Tensor::empty(device, DType::F32, [blocks]);
    let mut max = Tensor::empty(device, DType::F32, []);
    let flat = |blocks: usize| Launch::new(device.gpu(), [blocks, 1, 1], THREADS);
    let n = count as i64;
    // SAFETY: `scores` has `n` elements, and `maxima` has one per block.
    unsafe {
        by_dtype!(
            scores.dtype(),
            sinkhorn_max_f32
                | sinkhorn_max_bf16(flat(blocks), maxima.device_out(), scores.device_in(), n)
        );
        let found = maxima.len() as i64;
        cuda::sinkhorn_max_f32(flat(1), max.device_out(), maxima.device_in(), found);
    }
    max
}
