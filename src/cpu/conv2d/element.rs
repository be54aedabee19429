//! The elements of images for Winograd's transforms, which read and write floats: f32 where it lies, bf16 by way of scratch
//! that stays in the first-level cache.

use half::bf16;
use multiversion::multiversion;

use crate::cpu::bf16::{rounded, widened};

/// A row of an image, or a block of its channels.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub pixels: usize,
    /// Channels of the block.
    pub width: usize,
    /// Channels of the image.
    pub channels: usize,
}

impl Row {
    /// Elements from the first to the last of the row.
    fn span(self) -> usize {
        (self.pixels - 1) * self.channels + self.width
    }
}

/// An element of an image.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Whether the transforms work on the image itself.
    const IN_PLACE: bool;

    /// Floats of scratch for `floats` elements.
    fn scratch_len(floats: usize) -> usize;

    /// Floats from a pixel of a row to the next where the transforms find them.
    fn step(row: Row) -> usize;

    /// The floats of the row at the start of `from`.
    fn read(from: &[Self], row: Row, scratch: &mut [f32]) -> *const f32;

    /// Where the transforms put the floats of the row at the start of `to`.
    fn place(to: &mut [Self], row: Row, scratch: &mut [f32]) -> *mut f32;

    /// Stores the floats of `scratch`, or adds them.
    fn store(to: &mut [Self], row: Row, scratch: &[f32], accumulate: bool);
}

/// They are read and written where they lie.
impl Element for f32 {
    const IN_PLACE: bool = true;

    fn scratch_len(_: usize) -> usize {
        0
    }

    fn step(row: Row) -> usize {
        row.channels
    }

    fn read(from: &[f32], row: Row, _: &mut [f32]) -> *const f32 {
        from[..row.span()].as_ptr()
    }

    fn place(to: &mut [f32], row: Row, _: &mut [f32]) -> *mut f32 {
        to[..row.span()].as_mut_ptr()
    }

    fn store(_: &mut [f32], _: Row, _: &[f32], _: bool) {}
}

/// They are widened into scratch, and rounded from it once.
impl Element for bf16 {
    const IN_PLACE: bool = false;

    fn scratch_len(floats: usize) -> usize {
        floats
    }

    fn step(row: Row) -> usize {
        row.width
    }

    fn read(from: &[bf16], row: Row, scratch: &mut [f32]) -> *const f32 {
        let scratch = &mut scratch[..row.pixels * row.width];
        widen_row(scratch, bytemuck::cast_slice(&from[..row.span()]), row);
        scratch.as_ptr()
    }

    fn place(to: &mut [bf16], row: Row, scratch: &mut [f32]) -> *mut f32 {
        assert!(to.len() >= row.span(), "a row of {row:?} in {} elements", to.len());
        scratch[..row.pixels * row.width].as_mut_ptr()
    }

    fn store(to: &mut [bf16], row: Row, scratch: &[f32], accumulate: bool) {
        let (to, scratch) = (&mut to[..row.span()], &scratch[..row.pixels * row.width]);
        let store = if accumulate { add_rounded_row } else { round_row };
        store(bytemuck::cast_slice_mut(to), scratch, row);
    }
}

/// Channels of a loop that becomes whole vectors: what is left of a block is stored one by one.
const LOOP: usize = 16;

#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
fn widen_row(scratch: &mut [f32], from: &[u16], row: Row) {
    for (to, from) in scratch.chunks_exact_mut(row.width).zip(from.chunks(row.channels)) {
        let (whole, rest) = to.as_chunks_mut::<LOOP>();
        let (from, last) = from[..row.width].as_chunks::<LOOP>();
        for (to, from) in whole.iter_mut().zip(from) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = widened(*from);
            }
        }
        for (to, from) in rest.iter_mut().zip(last) {
            *to = widened(*from);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
fn round_row(to: &mut [u16], scratch: &[f32], row: Row) {
    for (to, from) in to.chunks_mut(row.channels).zip(scratch.chunks_exact(row.width)) {
        let (whole, rest) = to[..row.width].as_chunks_mut::<LOOP>();
        let (from, last) = from.as_chunks::<LOOP>();
        for (to, from) in whole.iter_mut().zip(from) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = rounded(*from);
            }
        }
        for (to, from) in rest.iter_mut().zip(last) {
            *to = rounded(*from);
        }
    }
}

/// `to = round(to + scratch)`.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
fn add_rounded_row(to: &mut [u16], scratch: &[f32], row: Row) {
    for (to, from) in to.chunks_mut(row.channels).zip(scratch.chunks_exact(row.width)) {
        let (whole, rest) = to[..row.width].as_chunks_mut::<LOOP>();
        let (from, last) = from.as_chunks::<LOOP>();
        for (to, from) in whole.iter_mut().zip(from) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = rounded(widened(*to) + from);
            }
        }
        for (to, from) in rest.iter_mut().zip(last) {
            *to = rounded(widened(*to) + from);
        }
    }
}
