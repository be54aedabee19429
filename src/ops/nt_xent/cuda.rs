//! Launches `kernels/nt_xent.cu`: tiles of 128 x 128 similarities in registers, computed by tensor cores from the bf16 terms
//! that each f32 row is split into.

use super::{NtXentDims, Rows};
use crate::device::cuda::{self, In, Launch, int};
use crate::ops::gemm::reduce_launch;
use crate::ops::gemm::similarity::{
    ColumnSplits, FIXED_MAXIMUM_FROM, SplitRows, THREADS, TILE, WEIGHT_TILE, WEIGHT_WIDTH,
};
use crate::ops::row_losses;
use crate::tensor::{Tensor, TensorMut};

/// Maximum number of groups of tiles. Each pair of groups is one block: 528 pairs are two waves of two blocks on each of 132
/// multiprocessors. The workspace has one sum per row and group, so it grows linearly with the rows.
const GROUPS: usize = 32;

/// Returns the number of tiles in a group and the number of groups.
pub(crate) fn groups(rows: usize) -> [usize; 2] {
    let tiles = rows.div_ceil(TILE);
    let tiles_per_group = tiles.div_ceil(GROUPS);
    [tiles_per_group, tiles.div_ceil(tiles_per_group)]
}

/// The bf16 terms of this rank's rows and of all: the same on one rank.
pub(super) struct Terms {
    own: SplitRows,
    all: SplitRows,
}

/// Fills `lse [rows]`, and returns the loss and the terms of `z`.
pub(super) fn forward(lse: &mut Tensor, z: &Rows, dims: NtXentDims) -> (Tensor, Terms) {
    let (device, own) = (z.own.device(), SplitRows::of(&z.own));
    let alone = dims.rows == dims.all;
    let terms = Terms { all: if alone { own.clone() } else { SplitRows::of(&z.all) }, own };
    let [rows, d] = [dims.rows, dims.d].map(int);
    let inv_t = 1.0 / dims.temperature;
    let fixed = alone && dims.temperature >= FIXED_MAXIMUM_FROM;
    let [tiles_per_group, groups] = groups(dims.rows);
    let splits = ColumnSplits::new(dims.rows, dims.all, TILE);
    let count = if fixed { groups } else { splits.count };
    let mut sums = Tensor::floats(device, [count, dims.rows]);
    let mut maxima = (!fixed).then(|| sums.empty_like());
    let mut row_losses = Tensor::floats(device, [dims.rows]);
    let warps = Launch::new(device.gpu(), [dims.rows.div_ceil(8), 1, 1], [256, 1, 1]);
    // SAFETY: `own` and each of its terms have `rows` rows of `d`, those of `all` have `all`, the workspaces one row per group or
    // split, the other tensors `rows` elements.
    unsafe {
        if let Some(maxima) = &mut maxima {
            let grid = [dims.rows.div_ceil(TILE), splits.count, 1];
            cuda::nt_xent_sums_online(
                Launch::new(device.gpu(), grid, THREADS),
                maxima.device_out(),
                sums.device_out(),
                terms.own.device_in(),
                terms.all.device_in(),
                rows,
                int(dims.all),
                int(dims.first),
                terms.own.pitch(),
                terms.own.terms(),
                int(splits.columns),
                inv_t,
            );
        } else {
            let pairs = [groups * (groups + 1) / 2, 1, 1];
            cuda::nt_xent_sums(
                Launch::new(device.gpu(), pairs, THREADS),
                sums.device_out(),
                terms.own.device_in(),
                rows,
                terms.own.pitch(),
                terms.own.terms(),
                int(tiles_per_group),
                inv_t,
            );
        }
        cuda::nt_xent_finish(
            warps,
            lse.device_out(),
            row_losses.device_out(),
            maxima.as_ref().map_or(In::null(), Tensor::device_in),
            sums.device_in(),
            z.own.device_in(),
            rows,
            d,
            int(count),
            inv_t,
        );
    }
    (row_losses::mean(&row_losses), terms)
}

/// Fills `dz`. `lse` is that of all rows; `dy`, the gradient of the loss, is read on the device.
pub(super) fn backward(
    dz: &mut TensorMut<'_>,
    z: &Terms,
    lse: &Tensor,
    dy: &Tensor,
    dims: NtXentDims,
    accumulate: bool,
) {
    let device = lse.device();
    let splits = ColumnSplits::new(dims.rows, dims.all, WEIGHT_TILE);
    let [rows, d, columns] = [dims.rows, dims.d, splits.columns].map(int);
    let mut partial = Tensor::floats(device, [splits.count, dims.rows, dims.d]);
    let grid = [dims.rows.div_ceil(WEIGHT_TILE), dims.d.div_ceil(WEIGHT_WIDTH), splits.count];
    let tiles = Launch::new(device.gpu(), grid, THREADS);
    let n = dims.rows * dims.d;
    let two = z.own.terms() == 2;
    let gradient = if two { cuda::nt_xent_gradient_2 } else { cuda::nt_xent_gradient_3 };
    // SAFETY: sizes as in the forward pass; `partial` has the size of `dz` per split, `lse` has `all` elements.
    unsafe {
        gradient(
            tiles,
            partial.device_out(),
            z.own.device_in(),
            z.all.device_in(),
            lse.device_in(),
            dy.device_in(),
            rows,
            int(dims.all),
            int(dims.first),
            d,
            z.own.pitch(),
            columns,
            1.0 / dims.temperature,
        );
        let (sum, to) =
            (reduce_launch(device.gpu(), n, splits.count), dz.device_out().updating(accumulate));
        let (count, accumulate) = (int(splits.count), i32::from(accumulate));
        cuda::split_k_reduce_f32(sum, to, partial.device_in(), count, n as i64, accumulate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_groups_is_bounded_and_no_group_is_empty() {
        for rows in (4..200_000).step_by(331).chain([1 << 17, 1 << 20]) {
            let [tiles_per_group, groups] = groups(rows);
            assert!(groups <= GROUPS, "{rows} rows: {groups} groups");
            let tiles = rows.div_ceil(TILE);
            let last = tiles - (groups - 1) * tiles_per_group;
            assert!(
                (1..=tiles_per_group).contains(&last),
                "{rows} rows: the last group has {last} tiles"
            );
        }
    }
}
