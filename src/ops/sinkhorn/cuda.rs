//! `kernels/sinkhorn.cu`: exponentials once, in f32, then column and row sums of them, in f64.

use super::Dims;
use crate::device::cuda::{self, In, Launch};
use crate::tensor::{DType, Tensor};

const THREADS: [usize; 3] = [256, 1, 1];

/// Blocks of the first pass for the largest score.
const MAXIMA: usize = 256;
/// Blocks that a large GPU has work for; few enough that their sums are cheap to add.
const CHUNKS: usize = 64;

/// Fills `q [b, k]`, of f32.
pub(super) fn assign(q: &mut Tensor, scores: &Tensor, dims: Dims) {
    let Dims { b, k, epsilon, iterations } = dims;
    let device = scores.device();
    let flat = |blocks: usize| Launch::new(device.gpu(), [blocks, 1, 1], THREADS);
    let mut e = Tensor::empty(device, DType::F32, [b, k]);
    exponentials(&mut e, scores, (1.0 / epsilon) as f32);

    // By the shape alone, so that sums have one order on every chip.
    let rows = b.div_ceil(CHUNKS);
    let chunks = b.div_ceil(rows);
    let wide = |n: usize| Tensor::empty(device, DType::F64, [n]);
    let (mut partial, mut u, mut v) = (wide(chunks * k), wide(k), wide(b));
    let columns = Launch::new(device.gpu(), [k.div_ceil(256), chunks, 1], THREADS);
    let (of_columns, of_rows) = (flat(k.div_ceil(256)), flat(b.div_ceil(8)));
    let (all_rows, parts) = (b as f64, k as f64);
    let [b, k, rows, chunks] = [b, k, rows, chunks].map(|size| size as i32);
    for iteration in 0..iterations {
        let weights = if iteration == 0 { In::null() } else { v.device_in() };
        // SAFETY: `e` has `b` rows of `k`, `u` a number for each column, `v` for each row, `partial` a row of `k` for
        // each chunk of rows.
        unsafe {
            cuda::sinkhorn_columns(
                columns,
                partial.device_out(),
                e.device_in(),
                weights,
                b,
                k,
                rows,
            );
            cuda::sinkhorn_share(of_columns, u.device_out(), partial.device_in(), chunks, k, parts);
            cuda::sinkhorn_rows(
                of_rows,
                v.device_out(),
                e.device_in(),
                u.device_in(),
                b,
                k,
                all_rows,
            );
        }
    }
    // SAFETY: as above, and `q` has the size of `e`.
    unsafe {
        cuda::sinkhorn_assign(
            of_rows,
            q.device_out(),
            e.device_in(),
            u.device_in(),
            v.device_in(),
            b,
            k,
            all_rows,
        );
    }
}

/// `e = exp((scores - max) / epsilon)`, the largest score found on the GPU.
fn exponentials(e: &mut Tensor, scores: &Tensor, inv_epsilon: f32) {
    let (device, count) = (scores.device(), scores.len());
    let blocks = count.div_ceil(8 * THREADS[0]).min(MAXIMA);
    let mut maxima = Tensor::empty(device, DType::F32, [blocks]);
    let mut max = Tensor::empty(device, DType::F32, []);
    let flat = |blocks: usize| Launch::new(device.gpu(), [blocks, 1, 1], THREADS);
    let n = count as i64;
    // SAFETY: scores and `e` have `n` elements, `maxima` has one for each block.
    unsafe {
        by_dtype!(
            scores.dtype(),
            sinkhorn_max_f32
                | sinkhorn_max_bf16(flat(blocks), maxima.device_out(), scores.device_in(), n)
        );
        let found = maxima.len() as i64;
        cuda::sinkhorn_max_f32(flat(1), max.device_out(), maxima.device_in(), found);
        by_dtype!(
            scores.dtype(),
            sinkhorn_exp_f32
                | sinkhorn_exp_bf16(
                    Launch::over(device.gpu(), count, 8),
                    e.device_out(),
                    scores.device_in(),
                    max.device_in(),
                    n,
                    inv_epsilon
                )
        );
    }
}
