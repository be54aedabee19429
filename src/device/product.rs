//! Matrix products in f32 over slices, on the `gemm` crate: the one place that hands it raw pointers.

use rayon::prelude::*;

/// Rows of the result that one task computes: fixed, so that no sum depends on the number of threads.
const BLOCK: usize = 64;

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
        assert!(data.len() >= rows * columns, "matrix: {rows} x {columns} in {}", data.len());
        Self { data, rows, columns, row: columns, column: 1 }
    }

    /// Its transpose.
    pub(crate) fn transposed(self) -> Self {
        let Self { data, rows, columns, row, column } = self;
        Self { data, rows: columns, columns: rows, row: column, column: row }
    }

    /// `count` rows from `from` on.
    fn rows_from(self, from: usize, count: usize) -> Self {
        Self { data: &self.data[from * self.row..], rows: count, ..self }
    }
}

/// `c = a b`, or `c += a b`; `c` row-major. In parallel over blocks of rows, each product's terms in one fixed order.
///
/// # Panics
/// When the sizes do not fit.
pub(crate) fn product(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    assert_eq!(c.len(), a.rows * b.columns, "product: the result is {} x {}", a.rows, b.columns);
    if c.is_empty() {
        return;
    }
    c.par_chunks_mut(BLOCK * b.columns).enumerate().for_each(|(i, c)| {
        let rows = c.len() / b.columns;
        product_alone(c, a.rows_from(i * BLOCK, rows), b, accumulate);
    });
}

/// [`product`] on the calling thread.
pub(crate) fn product_alone(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, accumulate: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "product: {m} x {k} times {} x {n}", b.rows);
    assert_eq!(c.len(), m * n, "product: the result is {m} x {n}");
    if k == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    if c.is_empty() {
        return;
    }
    for (x, what) in [(a, "left"), (b, "right")] {
        let last = (x.rows - 1) * x.row + (x.columns - 1) * x.column;
        assert!(last < x.data.len(), "product: the {what} matrix ends past its slice");
    }
    // SAFETY: the assertions above keep every element that `gemm` reads inside the slices and every element that it
    // writes inside `c`, which is borrowed uniquely.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
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
        product(&mut c, Matrix::new(&a, 2, 3), Matrix::new(&b, 3, 4), false);
        for (i, c) in c.iter().enumerate() {
            let want: f32 = (0..3).map(|t| a[i / 4 * 3 + t] * b[t * 4 + i % 4]).sum();
            assert!((c - want).abs() < 1e-6, "{i}: {c} {want}");
        }
        let mut gram = vec![1.0; 9];
        product(&mut gram, Matrix::new(&a, 2, 3).transposed(), Matrix::new(&a, 2, 3), true);
        assert_eq!(gram, [10.0, 13.0, 16.0, 13.0, 18.0, 23.0, 16.0, 23.0, 30.0]);
    }
}
