//! Filters packed for the tile kernels: blocks of outputs, each `[c/block][r][s][block][width]`.
//!
//! A block of outputs is two vectors wide; the last block has one vector if that suffices. Padding
//! outputs are zeros.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

/// How `k` outputs split into blocks of `2 * lanes`, the last of `lanes` if that is enough.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub k: usize,
    pub lanes: usize,
}

impl Blocks {
    pub fn count(&self) -> usize {
        self.k.div_ceil(2 * self.lanes)
    }

    /// Outputs of a full block.
    pub fn full(&self) -> usize {
        2 * self.lanes
    }

    /// Vectors (1 or 2) of block `i`.
    pub fn vectors(&self, i: usize) -> usize {
        if self.live(i) <= self.lanes { 1 } else { 2 }
    }

    /// Outputs of block `i`, with and without those that are padding.
    pub fn width(&self, i: usize) -> usize {
        self.vectors(i) * self.lanes
    }

    pub fn live(&self, i: usize) -> usize {
        (self.k - i * self.full()).min(self.full())
    }

    /// Outputs of all blocks, padding included.
    pub fn padded(&self) -> usize {
        match self.count() {
            0 => 0,
            count => (count - 1) * self.full() + self.width(count - 1),
        }
    }
}

/// The index of output `o`, tap `(i, j)` and input `c` in the unpacked filter:
/// `start + o * output + i * row + j * column + c * input` (steps may be negative).
#[derive(Clone, Copy, Debug)]
pub struct FilterView {
    pub start: isize,
    pub output: isize,
    pub row: isize,
    pub column: isize,
    pub input: isize,
    pub r: usize,
    pub s: usize,
    pub c: usize,
}

impl FilterView {
    /// Packs `w` into `packed`, `blocks.padded() * r * s * c` floats, with channels in blocks of `block`.
    pub fn pack(&self, packed: &mut [f32], w: &[f32], blocks: Blocks, block: usize) {
        let per_output = self.r * self.s * self.c;
        if per_output == 0 {
            return;
        }
        packed.par_chunks_mut(blocks.full() * per_output).enumerate().each(|(b, out)| {
            self.pack_block(out, w, b * blocks.full(), blocks.live(b), blocks.width(b), block);
        });
    }

    pub fn pack_block(
        &self,
        mut out: &mut [f32],
        w: &[f32],
        first: usize,
        live: usize,
        width: usize,
        block: usize,
    ) {
        for c in (0..self.c).step_by(block) {
            let channels = block.min(self.c - c);
            for i in 0..self.r {
                for j in 0..self.s {
                    let start = self.start
                        + first as isize * self.output
                        + i as isize * self.row
                        + j as isize * self.column
                        + c as isize * self.input;
                    let (tap, rest) = out.split_at_mut(channels * width);
                    self.pack_tap(tap, w, start, live, width);
                    out = rest;
                }
            }
        }
    }

    /// `tap` `[channels][width]`.
    fn pack_tap(&self, tap: &mut [f32], w: &[f32], start: isize, live: usize, width: usize) {
        if self.output == 1 {
            for (channel, out) in tap.chunks_exact_mut(width).enumerate() {
                let from = (start + channel as isize * self.input) as usize;
                out[..live].copy_from_slice(&w[from..from + live]);
                out[live..].fill(0.0);
            }
        } else {
            let channels = tap.len() / width;
            let step = self.input as usize;
            let from = |o: usize| (start + o as isize * self.output) as usize;
            // four filters at a time: one load of each and one store of four, instead of single stores
            // a row apart
            let fours = live / 4 * 4;
            for o in (0..fours).step_by(4) {
                let rows: [&[f32]; 4] =
                    std::array::from_fn(|i| &w[from(o + i)..][..(channels - 1) * step + 1]);
                for (channel, out) in tap.chunks_exact_mut(width).enumerate() {
                    let four = rows.map(|row| row[channel * step]);
                    out[o..o + 4].copy_from_slice(&four);
                }
            }
            for o in fours..live {
                for channel in 0..channels {
                    tap[channel * width + o] = w[from(o) + channel * step];
                }
            }
            for out in tap.chunks_exact_mut(width) {
                out[live..].fill(0.0);
            }
        }
    }
}
