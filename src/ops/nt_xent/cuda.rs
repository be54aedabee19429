//! `kernels/nt_xent.cu`: tiles of 64 x 64 similarities in registers, columns in slices that are put together in order.

use super::Dims;
use crate::device::cuda::{self, Launch};
use crate::ops::row_losses;
use crate::tensor::{Tensor, TensorMut};

const TILE: usize = 64;
const THREADS: [usize; 3] = [256, 1, 1];

/// How columns are cut: by the shape alone, so that sums have one order on every chip.
#[derive(Clone, Copy, Debug)]
struct Slices {
    columns: usize,
    count: usize,
}

impl Slices {
    fn new(dims: Dims) -> Self {
        /// Blocks that a large GPU has work for.
        const BLOCKS: usize = 256;
        let tiles = dims.rows.div_ceil(TILE);
        let columns = tiles.div_ceil((BLOCKS / tiles).clamp(1, tiles)) * TILE;
        Self { columns, count: dims.rows.div_ceil(columns) }
    }
}

/// Fills `lse [rows]` and returns the loss.
pub(super) fn forward(lse: &mut Tensor, z: &Tensor, dims: Dims) -> Tensor {
    let (device, slices) = (z.device(), Slices::new(dims));
    let [rows, d, columns, count] =
        [dims.rows, dims.d, slices.columns, slices.count].map(|size| size as i32);
    let inv_t = 1.0 / dims.temperature;
    let mut maxima = Tensor::floats(device, [slices.count, dims.rows]);
    let mut sums = maxima.empty_like();
    let mut row_losses = Tensor::floats(device, [dims.rows]);
    let tiles = Launch::new(device.gpu(), [dims.rows.div_ceil(TILE), slices.count, 1], THREADS);
    let warps = Launch::new(device.gpu(), [dims.rows.div_ceil(8), 1, 1], THREADS);
    // SAFETY: `z` has `rows` rows of `d`, the workspaces a row for each slice, the rest a number for each row.
    unsafe {
        cuda::nt_xent_sums(
            tiles,
            maxima.device_out(),
            sums.device_out(),
            z.device_in(),
            rows,
            d,
            columns,
            inv_t,
        );
        cuda::nt_xent_finish(
            warps,
            lse.device_out(),
            row_losses.device_out(),
            maxima.device_in(),
            sums.device_in(),
            z.device_in(),
            rows,
            d,
            count,
            inv_t,
        );
    }
    row_losses::mean(&row_losses)
}

/// `dz` from `dy`, the gradient of the loss, which stays where it is.
pub(super) fn backward(
    dz: &mut TensorMut<'_>,
    z: &Tensor,
    lse: &Tensor,
    dy: &Tensor,
    dims: Dims,
    accumulate: bool,
) {
    /// Columns of `z` that a block sums.
    const WIDTH: usize = 128;
    let (device, slices) = (z.device(), Slices::new(dims));
    let [rows, d, columns, count] =
        [dims.rows, dims.d, slices.columns, slices.count].map(|size| size as i32);
    let mut partial = Tensor::floats(device, [slices.count, dims.rows, dims.d]);
    let grid = [dims.rows.div_ceil(TILE), dims.d.div_ceil(WIDTH), slices.count];
    let (tiles, sum) =
        (Launch::new(device.gpu(), grid, THREADS), Launch::over(device.gpu(), z.len(), 1));
    // SAFETY: sizes as in the forward; `partial` has a plane of `z`'s size for each slice.
    unsafe {
        cuda::nt_xent_gradient(
            tiles,
            partial.device_out(),
            z.device_in(),
            lse.device_in(),
            dy.device_in(),
            rows,
            d,
            columns,
            1.0 / dims.temperature,
        );
        let (partial, n) = (partial.device_in(), z.len() as i64);
        cuda::sum_slices_f32(sum, dz.device_out(), partial, count, n, i32::from(accumulate));
    }
}
