//! Similarity GEMMs on a GPU (`kernels/similarity.cu`), for the contrastive losses and for nearest neighbours: f32 rows split
//! into bf16 terms for tensor cores, the split of columns over blocks, and the maximum subtracted in the exponentials.

use half::bf16;

use crate::device::Precision;
use crate::device::cuda::{self, In, Launch, int};
use crate::tensor::{DType, Tensor};

/// The lowest temperature at which the fixed maximum `1 / T`, an upper bound on the logits of unit rows, is subtracted from
/// all logits. Below it the exponentials would leave f32's range, so each row's own maximum is used.
pub(crate) const FIXED_MAXIMUM_FROM: f64 = 0.025;

/// Rows and columns of a tile of similarities.
pub(crate) const TILE: usize = 128;
/// Rows and columns of a tile of weights in gradients.
pub(crate) const WEIGHT_TILE: usize = 64;
/// Columns of a tile of gradients.
pub(crate) const WEIGHT_WIDTH: usize = 128;
/// Threads of a block.
pub(crate) const THREADS: [usize; 3] = [128, 1, 1];

/// f32 rows `x [rows, d]` split into bf16 terms `[terms, rows, pitch]`: each term is the bf16 value nearest to the remainder
/// after the previous terms.
#[derive(Clone, Debug)]
pub(crate) struct SplitRows {
    data: Tensor,
    terms: usize,
    pitch: usize,
}

impl SplitRows {
    /// Splits into the number of terms for the run's precision: two terms (three mma per product) if activations are bf16;
    /// three terms (six mma), which match plain f32 arithmetic, if they are f32.
    pub(crate) fn of(x: &Tensor) -> Self {
        let precise = x.device().gpu().precision() == Precision::F32;
        Self::split(x, if precise { 3 } else { 2 })
    }

    /// Splits into `terms` terms.
    pub(crate) fn split(x: &Tensor, terms: usize) -> Self {
        let [rows, d] = x.dims("rows of similarities");
        let pitch = d.next_multiple_of(8);
        let mut data = Tensor::empty(x.device(), DType::Bf16, [terms, rows, pitch]);
        if data.len() > 0 {
            let launch = Launch::over(x.device().gpu(), rows * pitch, 8);
            let (rows, d, row_pitch) = (rows as i64, int(d), int(pitch));
            // SAFETY: `x` is `[rows, d]` and `data` is `[terms, rows, pitch]`, where `pitch` is `d` rounded up to 8.
            unsafe {
                cuda::split_rows(
                    launch,
                    data.device_out(),
                    x.device_in(),
                    rows,
                    d,
                    row_pitch,
                    int(terms),
                );
            }
        }
        Self { data, terms, pitch }
    }

    pub(crate) fn device_in(&self) -> In<'_, bf16> {
        self.data.device_in()
    }

    /// Number of terms.
    pub(crate) fn terms(&self) -> i32 {
        int(self.terms)
    }

    /// Elements from one row of a term to the next.
    pub(crate) fn pitch(&self) -> i32 {
        int(self.pitch)
    }
}

/// The split of columns over blocks. It depends on the shape alone, so that sums have the same order on every chip.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnSplits {
    /// Columns of a split.
    pub(crate) columns: usize,
    /// Number of splits; 0 without columns.
    pub(crate) count: usize,
}

impl ColumnSplits {
    /// A split has at least two tiles. The number of row tiles times the number of splits is about two waves of two blocks on
    /// each of 132 multiprocessors.
    pub(crate) fn new(rows: usize, columns: usize, tile: usize) -> Self {
        const BLOCKS: usize = 528;
        let (row_tiles, column_tiles) = (rows.div_ceil(tile), columns.div_ceil(tile).max(1));
        let tiles = column_tiles.div_ceil((BLOCKS / row_tiles).max(1)).max(2);
        Self { columns: tiles * tile, count: columns.div_ceil(tiles * tile) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workspace holds rows times splits values: its size is bounded or grows linearly with the rows, never quadratically.
    #[test]
    fn splits_times_rows_grow_linearly_with_the_rows() {
        for rows in (4..200_000).step_by(331).chain([1 << 17, 1 << 20]) {
            for tile in [TILE, WEIGHT_TILE] {
                let splits = ColumnSplits::new(rows, rows, tile);
                assert!(splits.count * splits.columns >= rows, "{rows}: {splits:?}");
                let tiles = rows.div_ceil(tile) * splits.count;
                assert!(tiles <= 528.max(rows.div_ceil(tile)), "{rows}: {splits:?}");
                assert!(splits.count * rows <= (528 * tile).max(rows), "{rows}: {splits:?}");
            }
        }
        let none = ColumnSplits::new(7, 0, TILE);
        assert_eq!(none.count, 0, "no columns: {none:?}");
    }
}
