//! `kernels/sinkhorn.cu`: exponentials in f32, made anew in each pass, column and row sums of them in f64.

use super::SinkhornDims;
use crate::device::cuda::{self, In, Launch};
use crate::tensor::{DType, Tensor};

const THREADS: [usize; 3] = [256, 1, 1];

/// Blocks of the first pass for the largest score.
const MAXIMA: usize = 256;

/// Rows of a block that sums columns: by the shape alone, so that sums have one order on every chip. Few rows get more
/// blocks, and sixteen, all that the kernel takes, make partial sums a quarter of what scores of bf16 are.
pub(crate) fn rows_per_chunk(b: usize) -> usize {
    if b < 2048 { 8 } else { 16 }
}

/// Fills `q [b, k]`, of f32.
pub(super) fn assign(q: &mut Tensor, scores: &Tensor, dims: SinkhornDims) {
    let SinkhornDims { b, k, epsilon, iterations } = dims;
    let device = scores.device();
    let launch = |grid: usize, block| Launch::new(device.gpu(), [grid, 1, 1], block);
    let max = largest(scores);
    let rows = rows_per_chunk(b);
    let chunks = b.div_ceil(rows);
    let wide = |n: usize| Tensor::empty(device, DType::F64, [n]);
    let (mut partial, mut u) = (wide(chunks * k), wide(k));
    let (all_rows, parts, inv_epsilon) = (b as f64, k as f64, (1.0 / epsilon) as f32);
    let (of_chunks, of_rows) = (launch(chunks, THREADS), launch(b.div_ceil(8), THREADS));
    let of_columns = launch(k.div_ceil(32), [32, 8, 1]);
    let [b, k, rows, chunks] = [b, k, rows, chunks].map(|size| size as i32);
    for iteration in 0..iterations {
        let factors = if iteration == 0 { In::null() } else { u.device_in() };
        // SAFETY: scores are `b` rows of `k`, `u` a number for each column, `partial` a row of `k` for each chunk of rows.
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
            cuda::sinkhorn_column_factors(
                of_columns,
                u.device_out(),
                partial.device_in(),
                chunks,
                k,
                parts,
            );
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

/// The largest score, on the GPU.
fn largest(scores: &Tensor) -> Tensor {
    let (device, count) = (scores.device(), scores.len());
    let blocks = count.div_ceil(8 * THREADS[0]).min(MAXIMA);
    let mut maxima = Tensor::empty(device, DType::F32, [blocks]);
    let mut max = Tensor::empty(device, DType::F32, []);
    let flat = |blocks: usize| Launch::new(device.gpu(), [blocks, 1, 1], THREADS);
    let n = count as i64;
    // SAFETY: there are `n` scores, and `maxima` has one for each block.
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
