//! `kernels/similarity.cu`: f32 rows as the bf16 planes that tensor cores multiply, for the contrastive losses and for
//! nearest neighbours; how the columns of such a product are cut; and what may be taken out of its exponentials.

use half::bf16;

use crate::device::cuda::{self, In, Launch, Precision};
use crate::tensor::{DType, Tensor};

/// Down to this temperature `1 / T`, which no logit of unit rows exceeds, may be taken out of all of them; below it the
/// exponentials would leave f32's range, and each row's own maximum takes its place.
pub(crate) const FIXED_MAXIMUM_FROM: f64 = 0.025;

/// Rows and columns of a tile of similarities, and threads of its block.
pub(crate) const TILE: usize = 128;
/// Rows and columns of a tile of weights, which gradients sum, columns of its sums, and threads of its block.
pub(crate) const WEIGHT_TILE: usize = 64;
pub(crate) const WEIGHT_WIDTH: usize = 128;
pub(crate) const THREADS: [usize; 3] = [128, 1, 1];

/// Rows `x [rows, d]`, f32, as `[planes, rows, pitch]`: each plane is the bf16 nearest to what those before it have left.
#[derive(Clone, Debug)]
pub(crate) struct SplitRows {
    data: Tensor,
    count: usize,
    pitch: usize,
}

impl SplitRows {
    /// As many planes as a run's precision asks for: two (three products) where activations are bf16, and three (six), with
    /// which a similarity is as good as one of f32 lanes, where they are f32.
    pub(crate) fn of(x: &Tensor) -> Self {
        let precise = x.device().gpu().precision() == Precision::F32;
        Self::split(x, if precise { 3 } else { 2 })
    }

    /// So many planes.
    pub(crate) fn split(x: &Tensor, count: usize) -> Self {
        let [rows, d] = x.dims("rows of similarities");
        let pitch = d.next_multiple_of(8);
        let mut data = Tensor::empty(x.device(), DType::Bf16, [count, rows, pitch]);
        if data.len() > 0 {
            let launch = Launch::over(x.device().gpu(), rows * pitch, 8);
            let (rows, d, line) = (rows as i64, d as i32, pitch as i32);
            // SAFETY: `x` has `rows` rows of `d`, `data` so many planes of `rows` lines of `pitch`, `d` rounded up to 8.
            unsafe {
                cuda::split_rows(
                    launch,
                    data.device_out(),
                    x.device_in(),
                    rows,
                    d,
                    line,
                    count as i32,
                );
            }
        }
        Self { data, count, pitch }
    }

    pub(crate) fn device_in(&self) -> In<'_, bf16> {
        self.data.device_in()
    }

    pub(crate) fn count(&self) -> i32 {
        self.count as i32
    }

    /// Elements from one row of a plane to the next.
    pub(crate) fn pitch(&self) -> i32 {
        self.pitch as i32
    }
}

/// How columns are cut: by the shape alone, so that sums have one order on every chip. No columns have no slices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnSplits {
    pub(crate) columns: usize,
    pub(crate) count: usize,
}

impl ColumnSplits {
    /// Two tiles at least, and so many that tiles of rows times slices are about two waves of two blocks on each of 132
    /// multiprocessors.
    pub(crate) fn new(rows: usize, columns: usize, tile: usize) -> Self {
        const BLOCKS: usize = 528;
        let (down, across) = (rows.div_ceil(tile), columns.div_ceil(tile).max(1));
        let tiles = across.div_ceil((BLOCKS / down).max(1)).max(2);
        Self { columns: tiles * tile, count: columns.div_ceil(tiles * tile) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Workspaces are rows times slices: they end at a size, or grow with the rows, and never with their square.
    #[test]
    fn slices_times_rows_grow_with_the_rows() {
        for rows in (4..200_000).step_by(331).chain([1 << 17, 1 << 20]) {
            for tile in [TILE, WEIGHT_TILE] {
                let slices = ColumnSplits::new(rows, rows, tile);
                assert!(slices.count * slices.columns >= rows, "{rows}: {slices:?}");
                let tiles = rows.div_ceil(tile) * slices.count;
                assert!(tiles <= 528.max(rows.div_ceil(tile)), "{rows}: {slices:?}");
                assert!(slices.count * rows <= (528 * tile).max(rows), "{rows}: {slices:?}");
            }
        }
        let none = ColumnSplits::new(7, 0, TILE);
        assert_eq!(none.count, 0, "no columns: {none:?}");
    }
}
