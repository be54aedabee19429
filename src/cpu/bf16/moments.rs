//! Batch norm statistics from a convolution's epilogue: mean and variance of each channel of the stored, rounded output.
//!
//! Each block of rows gives sums of `y - shift` and its square, with the block's first row as shift, so that no digits are lost
//! where the mean is far from zero; blocks are merged in order in f64 (Chan, Golub and LeVeque 1979).

use crate::cpu::parallel::Each;
use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

use super::convert::{bits, widened};

/// Mean and biased variance of a convolution's output `[n, p, q, k]`, over each of `groups` equal groups of images. Both are
/// `[groups, k]` and are overwritten.
#[derive(Debug)]
pub struct Moments<'a> {
    /// Groups of images with statistics of their own, at least 1; they divide the images.
    pub groups: usize,
    /// Means.
    pub mean: &'a mut [f32],
    /// Mean squared deviations from the mean.
    pub variance: &'a mut [f32],
}

/// Floats of a block's sums per channel: shift, sum, sum of squares.
pub(super) const LINES: usize = 3;

/// Rows of a block of the portable path: sums in f32 stay short.
fn block_rows(columns: usize) -> usize {
    (8192 / columns.max(1)).clamp(16, 256)
}

/// The blocks of each group for `rows` rows in all, and rows in a block.
fn blocks(rows: usize, columns: usize, groups: usize) -> (usize, usize) {
    let block = block_rows(columns);
    ((rows / groups.max(1)).div_ceil(block), block)
}

/// Floats of scratch for [`of_rows`].
pub(super) fn workspace_len(rows: usize, columns: usize, groups: usize) -> usize {
    groups * blocks(rows, columns, groups).0 * LINES * columns
}

impl Moments<'_> {
    /// Checks the lengths for an output of `images` images and `columns` channels.
    #[track_caller]
    pub(super) fn check(&self, images: usize, columns: usize) {
        let Moments { groups, mean, variance } = self;
        assert!(
            *groups > 0 && images.is_multiple_of(*groups),
            "moments: {images} images in {groups} equal groups"
        );
        assert_eq!(
            [mean.len(), variance.len()],
            [groups * columns; 2],
            "moments: mean and variance of {groups} groups of {columns} channels"
        );
    }

    /// The moments of rows in memory, `y [rows, columns]`.
    pub(super) fn of_rows(self, y: &[bf16], columns: usize, workspace: &mut [f32]) {
        let rows = y.len() / columns.max(1);
        let (count, block) = blocks(rows, columns, self.groups);
        if count * columns == 0 {
            self.mean.fill(0.0);
            return self.variance.fill(0.0);
        }
        let group_rows = rows / self.groups;
        let sums = &mut workspace[..self.groups * count * LINES * columns];
        let groups = y.par_chunks_exact(group_rows * columns);
        groups.zip(sums.par_chunks_exact_mut(count * LINES * columns)).each(|(y, sums)| {
            let blocks = y.par_chunks(block * columns);
            blocks.zip(sums.par_chunks_exact_mut(LINES * columns)).each(|(y, sums)| {
                block_sums(sums, bits(y));
            });
        });
        self.merge(sums, columns, |i| block.min(group_rows - i * block));
    }

    /// From the sums `[groups, blocks, 3, columns]` of blocks; block `i` of every group has `rows(i)` rows.
    pub(super) fn merge(self, sums: &[f32], columns: usize, rows: impl Fn(usize) -> usize + Sync) {
        let per_group = sums.len() / self.groups;
        let outputs = self.mean.par_iter_mut().zip(self.variance.par_iter_mut()).with_min_len(32);
        outputs.enumerate().for_each(|(i, (mean, variance))| {
            let (group, column) = (i / columns, i % columns);
            let (mut seen, mut mu, mut m2) = (0.0_f64, 0.0_f64, 0.0_f64);
            let blocks = sums[group * per_group..][..per_group].chunks_exact(LINES * columns);
            for (block, sums) in blocks.enumerate() {
                let line = |line: usize| f64::from(sums[line * columns + column]);
                let count = rows(block) as f64;
                if count == 0.0 {
                    continue;
                }
                let (shift, sum, squares) = (line(0), line(1), line(2));
                let delta = shift + sum / count - mu;
                m2 += (squares - sum * sum / count).max(0.0);
                m2 += delta * delta * seen * count / (seen + count);
                mu += delta * count / (seen + count);
                seen += count;
            }
            *mean = mu as f32;
            *variance = (m2 / seen) as f32;
        });
    }
}

/// Shift, sums and sums of squares of the columns of some rows.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
fn block_sums(sums: &mut [f32], y: &[u16]) {
    let columns = sums.len() / LINES;
    let (shift, sums) = sums.split_at_mut(columns);
    let (sum, squares) = sums.split_at_mut(columns);
    for (shift, y) in shift.iter_mut().zip(y) {
        *shift = widened(*y);
    }
    sum.fill(0.0);
    squares.fill(0.0);
    for row in y.chunks_exact(columns) {
        let out = sum.iter_mut().zip(squares.iter_mut());
        for (((sum, squares), y), shift) in out.zip(row).zip(&*shift) {
            let d = widened(*y) - shift;
            *sum += d;
            *squares += d * d;
        }
    }
}
