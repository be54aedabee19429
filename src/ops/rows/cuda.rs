//! Launches `kernels/rows.cu`: 16 bytes per thread if the alignment allows it.

use crate::device::Device;
use crate::device::cuda::{Launch, int};
use crate::tensor::{DType, Tensor};

/// A launch over `rows` rows of `length` elements: threads along a row, and as many rows per block as fit.
fn over(device: &Device, rows: usize, length: usize, dtype: DType) -> Launch<'_> {
    const THREADS: usize = 256;
    let along = along(length, dtype);
    let down = THREADS / along;
    Launch::new(device.gpu(), [rows.div_ceil(down), 1, 1], [along, down, 1])
}

/// Number of threads for the 16-byte vectors of a row.
fn along(length: usize, dtype: DType) -> usize {
    length.div_ceil(16 / dtype.size()).next_power_of_two().min(256)
}

/// Number of elements in a row of `x`.
fn row_length(x: &Tensor) -> usize {
    x.shape()[1..].iter().product()
}

/// `y_i = x_index[i]`; rows out of range are NaN.
pub(super) fn gather(y: &mut Tensor, x: &Tensor, index: &Tensor) {
    let (device, length) = (x.device().clone(), row_length(x));
    let launch = over(&device, index.len(), length, x.dtype());
    // As many rows as it writes, if the indices are distinct.
    let read = index.len().min(x.shape()[0]) * length * x.dtype().size();
    let (n, m, length) = (int(index.len()), int(x.shape()[0]), length as i64);
    // SAFETY: `x` has `m` rows of this length and `y` has `n`; the kernel checks an index before it uses it.
    unsafe {
        by_dtype!(
            x.dtype(),
            gather_rows_f32
                | gather_rows_bf16(
                    launch,
                    y.device_out(),
                    x.device_in().reading(read),
                    index.device_in(),
                    n,
                    m,
                    length
                )
        );
    }
}

/// `dx_r`, the sum of `dy_i` over `index[i] = r`, in order of `i`.
pub(super) fn scatter(dx: &mut Tensor, dy: &Tensor, index: &Tensor) {
    let (device, length) = (dy.device().clone(), row_length(dy));
    let (n, m) = (int(index.len()), int(dx.shape()[0]));
    // One block per row, in full warps, which search the index together.
    let threads = along(length, dy.dtype()).max(32);
    let launch = Launch::new(device.gpu(), [dx.shape()[0], 1, 1], [threads, 1, 1]);
    let (length, dtype) = (length as i64, dy.dtype());
    // SAFETY: as in `gather`, with source and destination exchanged.
    unsafe {
        by_dtype!(
            dtype,
            scatter_rows_f32
                | scatter_rows_bf16(
                    launch,
                    dx.device_out(),
                    dy.device_in(),
                    index.device_in(),
                    n,
                    m,
                    length
                )
        );
    }
}

/// Writes `rows` to rows `at..` of `to`, wrapping at the end; `at` is an element on the GPU.
pub(super) fn write(to: &mut Tensor, at: &Tensor, rows: &Tensor) {
    let (device, length) = (rows.device().clone(), row_length(rows));
    let launch = over(&device, rows.shape()[0], length, rows.dtype());
    let written = rows.len().min(to.len()) * rows.dtype().size();
    let (n, m, length) = (int(rows.shape()[0]), int(to.shape()[0]), length as i64);
    // SAFETY: `to` has `m` rows of this length, `rows` has `n`; the kernel takes row numbers modulo `m`.
    unsafe {
        by_dtype!(
            rows.dtype(),
            write_rows_f32
                | write_rows_bf16(
                    launch,
                    to.device_out().writing(written),
                    rows.device_in(),
                    at.device_in(),
                    n,
                    m,
                    length
                )
        );
    }
}

/// Inserts `rows` at the front of `queue` and moves the others back; the oldest drop out.
pub(super) fn push(queue: &mut Tensor, rows: &Tensor) {
    let (device, length) = (rows.device().clone(), row_length(rows));
    let launch = over(&device, rows.shape()[0], length, rows.dtype());
    // All but the oldest rows move.
    let moved = queue.len().saturating_sub(rows.len()) * rows.dtype().size();
    let (n, m, length) = (int(rows.shape()[0]), int(queue.shape()[0]), length as i64);
    // SAFETY: `queue` has `m` rows of this length, `rows` has `n <= m`.
    unsafe {
        by_dtype!(
            rows.dtype(),
            push_rows_f32
                | push_rows_bf16(
                    launch,
                    queue.device_out().reading(moved),
                    rows.device_in(),
                    n,
                    m,
                    length
                )
        );
    }
}
