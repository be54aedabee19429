//! GEMM in f32 over slices, on the `gemm-f32` crate: the only place that passes it raw pointers.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

/// Rows of the result per task. Fixed, like `COLUMNS`, so that sums do not depend on the number of threads.
const BLOCK: usize = 64;
/// Columns of the result per task, for results of at most `BLOCK` rows.
const COLUMNS: usize = 128;

/// A matrix inside a slice: element `(i, j)` at `i * row + j * column`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix.
    #[track_caller]
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert!(
            rows.checked_mul(columns).is_some_and(|len| len <= data.len()),
            "matrix: {rows} x {columns} in {} elements",
            data.len()
        );
        Self { data, rows, columns, row: columns, column: 1 }
    }

    /// Its transpose.
    pub(crate) fn transposed(self) -> Self {
        let Self { data, rows, columns, row, column } = self;
        Self { data, rows: columns, columns: rows, row: column, column: row }
    }

    /// `count` rows, starting at `from`.
    fn rows_from(self, from: usize, count: usize) -> Self {
        Self { data: &self.data[from * self.row..], rows: count, ..self }
    }

    /// `count` columns, starting at `from`.
    fn columns_from(self, from: usize, count: usize) -> Self {
        Self { data: &self.data[from * self.column..], columns: count, ..self }
    }
}

/// `c = a b`, or `c += a b` if `accumulate`; `c` row-major. Parallel over blocks of rows, or over blocks of columns if rows are
/// few; the terms of each sum are added in a fixed order.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn gemm(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    assert_eq!(c.len(), a.rows * b.columns, "gemm: the result is {} x {}", a.rows, b.columns);
    if c.is_empty() {
        return;
    }
    let n = b.columns;
    if a.rows <= BLOCK && a.columns > 0 && n >= 2 * COLUMNS {
        let start = SharedPointer(c.as_mut_ptr());
        (0..n.div_ceil(COLUMNS)).into_par_iter().each(|i| {
            let first = i * COLUMNS;
            let b = b.columns_from(first, COLUMNS.min(n - first));
            // SAFETY: `c` has `a.rows` rows of `n`, and only this task accesses these columns of it.
            unsafe { gemm_at(start.at(first), n, a, b, accumulate) };
        });
        return;
    }
    c.par_chunks_mut(BLOCK * b.columns).enumerate().each(|(i, c)| {
        let rows = c.len() / b.columns;
        gemm_sequential(c, a.rows_from(i * BLOCK, rows), b, accumulate);
    });
}

/// [`gemm`] on the calling thread.
pub(crate) fn gemm_sequential(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    let (m, n) = (a.rows, b.columns);
    assert_eq!(c.len(), m * n, "gemm: the result is {m} x {n}");
    // SAFETY: `c` has `m` rows of `n` and is borrowed uniquely.
    unsafe { gemm_at(c.as_mut_ptr(), n, a, b, accumulate) };
}

/// The start of a result, for tasks that each write different columns of it.
#[derive(Clone, Copy)]
struct SharedPointer(*mut f32);
// SAFETY: the memory outlives the tasks, and each task accesses its own part only.
unsafe impl Send for SharedPointer {}
// SAFETY: as above.
unsafe impl Sync for SharedPointer {}

impl SharedPointer {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// [`gemm_sequential`] into rows that are `row` elements apart.
///
/// # Safety
/// `c` points to `a.rows` such rows of `b.columns` initialised elements each, which nothing else accesses during the call.
unsafe fn gemm_at(c: *mut f32, row: usize, a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "gemm: {m} x {k} times {} x {n}", b.rows);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for i in 0..if accumulate { 0 } else { m } {
            // SAFETY: the caller vouches for these rows.
            unsafe { std::slice::from_raw_parts_mut(c.add(i * row), n) }.fill(0.0);
        }
        return;
    }
    for (x, what) in [(a, "left"), (b, "right")] {
        let last = (x.rows - 1) * x.row + (x.columns - 1) * x.column;
        assert!(last < x.data.len(), "gemm: the {what} matrix ends past its slice");
    }
    // The crate's microkernels write columns, and a row of C is a column of its transpose: Ct = Bt At.
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    // SAFETY: the assertions above keep every element that `multiply` reads inside the slices; the caller vouches for what it
    // writes.
    unsafe {
        multiply(
            n,
            m,
            k,
            c,
            row as isize,
            1,
            accumulate,
            b.data.as_ptr(),
            b.row as isize,
            b.column as isize,
            a.data.as_ptr(),
            a.row as isize,
            a.column as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_transposes_agree_with_the_definition() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect(); // 2 x 3
        let b: Vec<f32> = (0..12).map(|i| (i as f32).sin()).collect(); // 3 x 4
        let mut c = vec![f32::NAN; 8];
        gemm(&mut c, Matrix::new(&a, 2, 3), Matrix::new(&b, 3, 4), false);
        for (i, c) in c.iter().enumerate() {
            let want: f32 = (0..3).map(|t| a[i / 4 * 3 + t] * b[t * 4 + i % 4]).sum();
            assert!((c - want).abs() < 1e-6, "{i}: {c} {want}");
        }
        let mut gram = vec![1.0; 9];
        gemm(&mut gram, Matrix::new(&a, 2, 3).transposed(), Matrix::new(&a, 2, 3), true);
        assert_eq!(gram, [10.0, 13.0, 16.0, 13.0, 18.0, 23.0, 16.0, 23.0, 30.0]);
    }

    #[test]
    fn results_of_few_rows_are_split_by_columns() {
        for (m, n, k) in [(1, 256, 5), (16, 301, 7), (64, 1000, 3), (3, 300, 0)] {
            let values = |len: usize| (0..len).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
            let (a, b) = (values(m * k), values(n * k));
            let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k).transposed());
            for accumulate in [false, true] {
                let mut c = vec![0.5; m * n];
                gemm(&mut c, a, b, accumulate);
                let mut alone = vec![0.5; m * n];
                gemm_sequential(&mut alone, a, b, accumulate);
                for (i, (c, alone)) in c.iter().zip(&alone).enumerate() {
                    assert!((c - alone).abs() < 1e-5, "{m} x {n} x {k}, {i}: {c} {alone}");
                }
            }
        }
    }
}
